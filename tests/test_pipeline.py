"""The batch stream: complete, reshuffled, the same for any workers and processes, and resumable."""

import multiprocessing
import pickle
import shutil
from collections import Counter
from dataclasses import replace

import cv2
import grain
import numpy as np
import pytest
from tensorflow_datasets.core.utils.shard_utils import ShardConfig

from input_pipeline import pipeline
from input_pipeline.images import decode_checked, pixel_hash
from input_pipeline.pipeline import (
    Faces,
    decode_image,
    decode_once,
    eval_loader,
    evenly_spread,
    open_split,
    train_loader,
)
from input_pipeline.prepare import prepare
from input_pipeline.prepared import read_account, read_labels

N = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A prepared folder of 60 small pictures."""
    work = tmp_path_factory.mktemp("pipeline")
    rng = np.random.default_rng(0)
    (work / "faces").mkdir()
    for i in range(N):
        small = rng.integers(0, 256, (5, 5, 3), np.uint8)
        image = cv2.resize(small, (40, 40), interpolation=cv2.INTER_CUBIC)
        name = f"{i * 2 % 117}_{i % 2}_{i % 5}_{20170116000000000 + i}.jpg.chip.jpg"
        cv2.imwrite(str(work / "faces" / name), image)
    prepare(work / "faces", work, name="utkface", progress=None)
    return work / "utkface"


@pytest.fixture(scope="module")
def faces(folder):
    return open_split(folder, "train")


def take(loader, n):
    iterator = iter(loader)
    batches = [next(iterator) for _ in range(n)]
    iterator.close()
    return batches


def indices(batches):
    return np.concatenate([batch["index"] for batch in batches])


def options(**changes):
    return dict(batch_size=8, image_size=16, seed=3) | changes


def test_splits_are_disjoint_and_complete(folder):
    parts = [open_split(folder, split) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [42, 9, 9]
    assert len({file for part in parts for file in part.labels["file"]}) == N
    assert len({part.fingerprint for part in parts}) == 1
    assert len(open_split(folder, "train+validation")) == 51


def test_random_access_gives_the_bytes_and_labels_of_a_row(folder, faces):
    for i in (0, 5, len(faces) - 1):
        row = faces[i]
        assert row["file"] == faces.labels["file"][i] and row["index"] == i
        assert row["image"] == (folder.parent / "faces" / row["file"]).read_bytes()
    age, gender, race = map(int, row["file"].split("_")[:3])
    assert (row["age"], row["gender"], row["race"]) == (age, gender, race)
    assert decode_image(row["image"], 40).shape == (40, 40, 3)
    assert faces[-1]["index"] == len(faces) - 1
    with pytest.raises(IndexError):
        faces[len(faces)]


def test_batch_has_the_agreed_arrays_and_the_right_labels(faces):
    (batch,) = take(train_loader(faces, **options()), 1)
    shapes = {name: (array.dtype.name, array.shape) for name, array in batch.items()}
    assert shapes == {
        "image": ("uint8", (8, 16, 16, 3)),
        "age": ("int32", (8,)),
        "gender": ("int32", (8,)),
        "race": ("int32", (8,)),
        "index": ("int32", (8,)),
        "weight": ("float32", (8,)),
    }
    assert (batch["weight"] == 1).all()
    for i, row in enumerate(batch["index"]):
        for name in ("age", "gender", "race"):
            assert batch[name][i] == faces.labels[name][row]
        np.testing.assert_array_equal(batch["image"][i], decode_image(faces[row]["image"], 16))


def test_no_image_is_lost_over_epochs_and_each_epoch_has_its_own_order(faces):
    n = len(faces)
    seen = indices(take(train_loader(faces, **options()), 4 * n // 8 + 1))
    epochs = [seen[i * n : (i + 1) * n] for i in range(3)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(n))
    assert (epochs[0] != epochs[1]).mean() > 0.5 and (epochs[1] != epochs[2]).mean() > 0.5
    assert (epochs[0] != np.arange(n)).mean() > 0.5


def test_seed_chooses_the_order(faces):
    first = indices(take(train_loader(faces, **options()), 5))
    np.testing.assert_array_equal(indices(take(train_loader(faces, **options()), 5)), first)
    assert (indices(take(train_loader(faces, **options(seed=4)), 5)) != first).mean() > 0.5


def test_batch_larger_than_the_split_repeats_in_training_and_pads_in_evaluation(faces):
    n = len(faces)
    (batch,) = take(train_loader(faces, **options(batch_size=100)), 1)
    counts = Counter(batch["index"].tolist())
    assert len(counts) == n and set(counts.values()) == {2, 3}
    (batch,) = list(eval_loader(faces, batch_size=100, image_size=16))
    assert batch["weight"].sum() == n and batch["image"].shape == (100, 16, 16, 3)


def test_processes_share_the_batches_of_one(faces):
    whole = take(train_loader(faces, **options(batch_size=12)), 8)
    shares = [
        take(train_loader(faces, **options(batch_size=4), process_index=p, process_count=3), 8)
        for p in range(3)
    ]
    for step, batch in enumerate(whole):
        for name, array in batch.items():
            joined = np.concatenate([share[step][name] for share in shares])
            np.testing.assert_array_equal(joined, array)


def test_pixels_decoded_once_give_the_same_batches(faces):
    lines = []
    held = decode_once(faces, 16, progress=lines.append)
    assert held.pixels.shape == (len(faces), 16, 16, 3) and faces.pixels is None
    assert lines[-1].startswith(f"decoded {len(faces)} of {len(faces)} images of train")
    for loader in (train_loader, eval_loader):
        changes = options() if loader is train_loader else dict(batch_size=8, image_size=16)
        fresh, kept = (take(loader(source, **changes), 5) for source in (faces, held))
        for a, b in zip(fresh, kept, strict=True):
            for name, array in a.items():
                np.testing.assert_array_equal(b[name], array)
    (other,) = take(train_loader(held, **options(image_size=20)), 1)  # another size is decoded anew
    assert other["image"].shape == (8, 20, 20, 3) and other["image"].any()


def test_files_held_in_memory_give_the_same_batches(faces, monkeypatch):
    held = take(train_loader(faces, **options()), 5)
    read = []
    read_images = Faces.read_images

    def counted(self, rows):
        read.append(len(rows))
        return read_images(self, rows)

    monkeypatch.setattr(Faces, "read_images", counted)
    monkeypatch.setattr(pipeline, "_FILES_BYTES", 0)  # too large a data set to be held
    for a, b in zip(held, take(train_loader(faces, **options()), 5), strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
        np.testing.assert_array_equal(a["index"], b["index"])
    assert sum(read) >= 5 * 8  # batches read as they came
    assert faces.files is None


def test_rows_taken_are_the_same_faces_wherever_they_are_held(faces):
    rows = [5, 0, 3]
    held = replace(
        decode_once(faces, 32), files=[memoryview(f) for f in faces.read_images(range(len(faces)))]
    )
    for some in (faces.take(rows), held.take(np.array(rows))):
        assert [some[i]["file"] for i in range(3)] == [faces[row]["file"] for row in rows]
        assert [bytes(some[i]["image"]) for i in range(3)] == [faces[row]["image"] for row in rows]
    np.testing.assert_array_equal(held.take(rows).pixels, held.pixels[rows])


def test_evenly_spread_rows_reach_from_the_first_to_the_last():
    assert evenly_spread(10, 4).tolist() == [0, 3, 6, 9]
    assert evenly_spread(3, 8).tolist() == [0, 1, 2]


def test_batches_without_images_have_the_same_rows(faces):
    whole, bare = (take(train_loader(faces, **options(with_images=w)), 4) for w in (True, False))
    assert all("image" not in batch for batch in bare)
    np.testing.assert_array_equal(indices(bare), indices(whole))


def test_more_pixels_than_memory_raise(faces, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 100)
    with pytest.raises(ValueError, match="42 images of 16 px take 0.0 GB, and this machine has"):
        decode_once(faces, 16)


def test_two_workers_give_the_stream_of_none(faces):
    alone, helped = (take(train_loader(faces, **options(workers=w)), 9) for w in (0, 2))
    for a, b in zip(alone, helped, strict=True):
        for name, array in a.items():
            np.testing.assert_array_equal(b[name], array)
    alone, helped = (
        list(eval_loader(faces, batch_size=16, image_size=8, workers=w)) for w in (0, 2)
    )
    np.testing.assert_array_equal(indices(alone), indices(helped))


@pytest.mark.parametrize("before", [0, 1, 7])
def test_iterator_resumes_exactly(faces, before):
    expected = take(train_loader(faces, **options()), before + 4)[before:]
    iterator = iter(train_loader(faces, **options()))
    for _ in range(before):
        next(iterator)
    state = iterator.get_state()
    assert state == {"examples_seen": before * 8}
    next(iterator)  # read on: the state must not move with it
    fresh = iter(train_loader(faces, **options()))
    next(fresh)
    for resumed in (fresh, iterator):
        resumed.set_state(state)
        np.testing.assert_array_equal(indices([next(resumed) for _ in range(4)]), indices(expected))
    assert fresh.get_state() == {"examples_seen": (before + 4) * 8}


def test_killed_worker_is_told_in_one_line(faces):
    stream = iter(train_loader(faces, **options(workers=1)))
    next(stream)
    for worker in multiprocessing.active_children():
        worker.kill()
    with pytest.raises(ValueError, match="was killed, .*: lower data.workers"):
        take(stream, 100)


def test_state_outlives_a_change_of_workers_and_processes(faces):
    iterator = iter(train_loader(faces, **options()))
    for _ in range(3):
        next(iterator)
    state, following = iterator.get_state(), next(iterator)
    helped = iter(train_loader(faces, **options(workers=1)))
    helped.set_state(state)
    np.testing.assert_array_equal(next(helped)["index"], following["index"])
    helped.close()
    half = iter(train_loader(faces, **options(batch_size=4), process_index=1, process_count=2))
    half.set_state(state)
    np.testing.assert_array_equal(next(half)["index"], following["index"][4:])


def test_iterator_is_saved_and_loaded_by_grain_checkpoint(faces, tmp_path):
    handler = grain.checkpoint.CheckpointHandler()
    iterator = iter(train_loader(faces, **options()))
    next(iterator)
    handler.save(tmp_path, iterator)
    expected = next(iterator)["index"]
    restored = handler.restore(tmp_path, iter(train_loader(faces, **options())))
    np.testing.assert_array_equal(next(restored)["index"], expected)


def test_closed_iterator_says_so(faces):
    iterator = iter(train_loader(faces, **options()))
    iterator.close()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)


def test_four_processes_see_every_image_of_an_epoch_once(faces):
    """Each stretch of 4 x 7 images is read by four processes, and an epoch of 42 by all of them."""
    shares = [
        take(train_loader(faces, **options(batch_size=7, process_index=p, process_count=4)), 3)
        for p in range(4)
    ]
    steps = [indices([share[step] for share in shares]) for step in range(3)]
    assert all(len(set(step.tolist())) == 28 for step in steps[:1])
    np.testing.assert_array_equal(np.sort(np.concatenate(steps)), np.repeat(np.arange(42), 2))


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [5, 7, 42])
def test_evaluation_sees_every_row_once_in_order_and_pads_the_end(faces, processes, batch_size):
    parts = [
        list(
            eval_loader(
                faces,
                batch_size=batch_size,
                image_size=8,
                process_index=p,
                process_count=processes,
            )
        )
        for p in range(processes)
    ]
    assert len({len(part) for part in parts}) == 1
    rows = [batch for step in zip(*parts, strict=True) for batch in step]
    index, weight = indices(rows), np.concatenate([batch["weight"] for batch in rows])
    n = len(faces)
    np.testing.assert_array_equal(index[:n], np.arange(n))
    assert (index[n:] == -1).all() and (weight[:n] == 1).all() and (weight[n:] == 0).all()
    assert len(index) - n < batch_size * processes
    for name, padding in (("age", 0), ("gender", -1), ("race", -1), ("image", 0)):
        assert (np.concatenate([batch[name] for batch in rows])[n:] == padding).all()


def test_external_split_file_is_joined_by_name(folder, tmp_path, capsys):
    everything = open_split(folder, "train+validation+test").labels["file"]
    path = tmp_path / "protocol.csv"
    lines = [f"UTKFace/{file},{'a' if i < 10 else 'b'}" for i, file in enumerate(everything[:30])]
    lines += ["1_0_0_20200101000000000.jpg,b", *(f"{s}/{everything[30]},{s}" for s in "ab")]
    path.write_text("\n".join(["file,split", *lines]))
    part = open_split(folder, "a", splits=path)
    assert sorted(part.labels["file"]) == sorted(everything[:10])
    said = f"{path}: 1 of its 33 files not found in {folder}, or with other pixels; 1 images that "
    assert capsys.readouterr().out == f"{said}fit rows of several splits are in none\n"
    open_split(folder, "b", splits=path)
    assert not capsys.readouterr().out  # said once
    assert part.fingerprint != open_split(folder, "train").fingerprint
    (folder / "splits" / "mine.csv").write_text(path.read_text())
    assert open_split(folder, "a", splits="mine").fingerprint == part.fingerprint
    (folder / "splits" / "mine.csv").unlink()


def test_pictures_in_no_split_do_not_shift_the_others(folder, tmp_path):
    listed = open_split(folder, "all").labels["file"][5::3]
    path = tmp_path / "some.csv"
    lines = [f"{file},{'ab'[i % 2]}" for i, file in enumerate(listed)]
    path.write_text("\n".join(["file,split", *lines]))
    for split, files in (("a", listed[::2]), ("b", listed[1::2])):
        part = open_split(folder, split, splits=path)
        assert sorted(part.labels["file"]) == sorted(files)
        for row in part:
            assert row["image"] == (folder.parent / "faces" / row["file"]).read_bytes()


def test_unknown_names_list_the_known_ones(folder, tmp_path):
    known = "it has test, train, validation; did you mean validation\\?"
    with pytest.raises(ValueError, match=f"unknown split 'valdation' .*{known}"):
        open_split(folder, "valdation")
    with pytest.raises(
        ValueError,
        match="unknown splits 'other': .* has 80_10_10, 82_3_15, default, fold0, .*; a CSV",
    ):
        open_split(folder, "train", splits="other")
    few = tmp_path / "few.csv"
    few.write_text(f"file,split\n{open_split(folder, 'train')[0]['file']},train\n")
    with pytest.raises(ValueError, match="'test' in .*few.csv.*1 picture.* too few for three"):
        open_split(folder, "test", splits=few)
    with pytest.raises(FileNotFoundError, match="coatnet-jax prepare UTKFace.zip"):
        open_split(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match="none.csv does not exist"):
        open_split(folder, "train", splits=tmp_path / "none.csv")


def test_split_without_images_here_is_an_error(folder, tmp_path):
    path, file = tmp_path / "s.csv", open_split(folder, "test").labels["file"][0]
    path.write_text(f"file,split\n{file},train\nelsewhere.jpg,test\n")
    with pytest.raises(ValueError, match="split test is empty"):
        open_split(folder, "test", splits=path)
    path.write_text("file,split\nelsewhere.jpg,test\n")
    with pytest.raises(ValueError, match="none of its 1 files is in"):
        open_split(folder, "test", splits=path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"batch_size": 0}, "batch_size 0"),
        ({"image_size": 0}, "image_size 0"),
        ({"workers": -1}, "workers must be 0 or more"),
        ({"process_index": 2, "process_count": 2}, "process_index 2 is not within the 2 processes"),
        ({"seed": -1}, "seed must be within"),
    ],
)
def test_wrong_loader_settings_are_refused(faces, changes, reason):
    with pytest.raises(ValueError, match=reason):
        train_loader(faces, **options(**changes))


@pytest.mark.slow
def test_real_faces_are_counted_as_published(real_faces, tmp_path):
    protocol = real_faces / "utkface-protocol-21-60.csv"
    info = prepare(
        f"{real_faces}/utkface-*.tar",
        tmp_path,
        splits={"utkface_21_60": protocol} if protocol.exists() else {},
        progress=None,
    )
    if info["found"] != 21_287:
        pytest.skip(f"{info['found']} faces here, not the 21,287 whose counts are known")
    assert info["kept"] == 21_287 and info["straddling_groups"] == 0
    assert (info["duplicate_groups"], info["duplicate_files"]) == (344, 702)
    assert info["conflicting_age_groups"] == 189 and info["near_groups"] == 497
    if published := info["protocols"].get("utkface_21_60"):
        assert published["splits"] == {"train": 11_802, "test": 2_934}
        assert published["straddling_identical_groups"] == 77
    shares = [count / info["kept"] for count in info["classes"].values()]
    np.testing.assert_allclose(shares, (0.179, 0.539, 0.182, 0.101), atol=0.002)


def test_damaged_records_ask_to_prepare_again(folder, tmp_path):
    damaged = tmp_path / "utkface"
    shutil.copytree(folder, damaged)
    (records,) = damaged.rglob("*.array_record*")
    records.write_bytes(records.read_bytes()[:2000])
    faces = open_split(damaged, "train")
    with pytest.raises(ValueError, match="records of .*utkface cannot be read .*prepare the data"):
        faces.read_images(range(len(faces)))


def test_records_of_another_build_than_the_labels_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(ShardConfig, "get_number_shards", lambda *_: 3)
    rng = np.random.default_rng(1)

    def build(n):
        for i in range(n):
            path = tmp_path / "in" / f"{20 + i}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), rng.integers(0, 256, (24, 24, 3), np.uint8))
        prepare(tmp_path / "in", tmp_path, name="own", progress=None)
        return open_split(tmp_path / "own", "train")

    before = build(12)
    read, sent = replace(before), pickle.dumps(before)
    first = read.read_images([0])
    after = build(12)
    assert len(list((tmp_path / "own").rglob("*.array_record*"))) == 3
    for late in (before, pickle.loads(sent)):
        with pytest.raises(ValueError, match="own was prepared again .* start the command again"):
            late.read_images([0])
    # What was open is read to its end, every file of it, for its pixels are those of its labels.
    for faces, images in ((read, first), (after, after.read_images([0]))):
        images = images + faces.read_images(range(1, len(faces)))
        hashes = [pixel_hash(decode_checked(image)) for image in images]
        assert hashes == faces.labels["pixel_hash"].tolist()
    assert not {*read.labels["pixel_hash"]} & {*after.labels["pixel_hash"]}


@pytest.mark.parametrize(
    ("file", "content"),
    [("labels.csv", b"file,age\xff\n"), ("labels.csv", None), ("prepare.json", b"{")],
)
def test_damaged_account_or_labels_ask_to_prepare_again(folder, tmp_path, file, content):
    damaged = tmp_path / "utkface"
    shutil.copytree(folder, damaged)
    whole = (damaged / file).read_bytes()
    (damaged / file).write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(ValueError, match=f"{file} .*prepare the data again"):
        read_labels(damaged) if file == "labels.csv" else read_account(damaged)

"""Preparing: every file is kept or accounted for, and nothing half-made is ever left behind."""

import csv
import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core import shuffle

from input_pipeline.agedb.agedb_dataset_builder import Builder as AgeDBBuilder
from input_pipeline.face_builder import _Bucket as Bucket
from input_pipeline.folder.folder_dataset_builder import Builder as FolderBuilder
from input_pipeline.images import (
    MAX_PIXELS,
    decode_checked,
    decode_image,
    decode_into,
    pixel_hash,
)
from input_pipeline.names import FaceLabel
from input_pipeline.pipeline import open_split
from input_pipeline.prepare import _is_running, prepare, read_labels, records_folder, summary
from input_pipeline.scan import Copies
from input_pipeline.splits import read_splits
from input_pipeline.utkface.utkface_dataset_builder import Builder as UTKFaceBuilder


def picture(seed, size=48):
    """Smooth noise, uint8 [size, size, 3]: it compresses like a photo."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return cv2.resize(small, (size, size), interpolation=cv2.INTER_CUBIC)


def jpeg(seed, size=48):
    return cv2.imencode(".jpg", picture(seed, size))[1].tobytes()


def with_comment(data):
    """The same picture in other bytes: a JPEG comment after the start marker."""
    return data[:2] + b"\xff\xfe\x00\x08camera" + data[2:]


def name(age, gender, race, i):
    return f"{age}_{gender}_{race}_{20170116000000000 + i}.jpg.chip.jpg"


def faces(n=40):
    return {f"UTKFace/{name(i * 3 % 18, i % 2, i % 5, i)}": jpeg(i) for i in range(n)}


def write_folder(folder, files):
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for inside, data in files.items():
            archive.writestr(inside, data)
    return path


def write_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for inside, data in reversed(files.items()):
            member = tarfile.TarInfo(inside)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def quiet(source, root, **options):
    return prepare(source, root, name="utkface", progress=None, **options)


def skipped(root):
    with (root / "utkface" / "skipped.csv").open(newline="") as lines:
        return {row["file"]: row["reason"] for row in csv.DictReader(lines)}


@pytest.fixture(scope="module")
def kaggle(tmp_path_factory):
    """A download with every trouble that is known: (source files, root where it was prepared)."""
    work = tmp_path_factory.mktemp("kaggle")
    good = faces()
    first, second, third = list(good)[:3]
    bare = [path.removeprefix("UTKFace/") for path in (first, second, third)]
    files = (
        good
        | {
            f"crop_part1/{bare[0]}": good[first],  # the same bytes again
            f"crop_part1/{bare[1]}": with_comment(good[second]),  # the same pixels in other bytes
            f"crop_part1/{bare[2]}": jpeg(1000),  # the same name on another face
            f"UTKFace/{name(70, 0, 0, 900)}": with_comment(good[first]),  # a copy of another age
            "UTKFace/readme.jpg": jpeg(1),
            f"UTKFace/{name(200, 0, 0, 901)}": jpeg(2),
            f"UTKFace/{name(20, 0, 0, 902)}": jpeg(3)[:700],
            f"UTKFace/{name(20, 0, 0, 903)}": b"no image at all",
            f"UTKFace/{name(20, 0, 0, 904)}": b"",
            "UTKFace/Thumbs.db": b"windows",
            f"__MACOSX/UTKFace/._{name(20, 0, 0, 905)}": b"mac",
        }
    )
    info = quiet(write_zip(work / "archive.zip", files), work)
    return files, work, info


def test_found_is_kept_plus_skipped(kaggle):
    files, root, info = kaggle
    assert info["found"] == len(files)
    assert info["kept"] == 42 and sum(info["skipped"].values()) == len(files) - 42
    assert len(skipped(root)) == len(files) - 42
    assert json.loads((root / "utkface" / "prepare.json").read_text()) == info


def test_every_skipped_file_has_its_reason(kaggle):
    files, root, info = kaggle
    first, second, third = list(files)[:3]
    reasons = skipped(root)
    assert reasons == {
        first.replace("UTKFace", "crop_part1"): f"duplicate file name (first at {first})",
        second.replace("UTKFace", "crop_part1"): f"duplicate file name (first at {second})",
        "UTKFace/readme.jpg": reasons["UTKFace/readme.jpg"],
        f"UTKFace/{name(200, 0, 0, 901)}": "age outside 0-116 (200)",
        f"UTKFace/{name(20, 0, 0, 902)}": "image cut short",
        f"UTKFace/{name(20, 0, 0, 903)}": "not an image, or its header is damaged",
        f"UTKFace/{name(20, 0, 0, 904)}": "empty file",
        "UTKFace/Thumbs.db": "not an image file",
        f"__MACOSX/UTKFace/._{name(20, 0, 0, 905)}": "macOS metadata",
    }
    assert reasons["UTKFace/readme.jpg"].startswith("not a UTKFace name")
    assert info["skipped"]["duplicate file name"] == 2


def test_same_name_on_another_face_is_kept_under_its_path(kaggle):
    files, root, _ = kaggle
    third = list(files)[2]
    kept = read_labels(root / "utkface")["file"]
    assert third.removeprefix("UTKFace/") in kept
    assert third.replace("UTKFace", "crop_part1") in kept


def test_duplicates_with_other_ages_are_counted_and_kept_together(kaggle):
    _, root, info = kaggle
    assert (info["duplicate_groups"], info["duplicate_files"]) == (1, 2)
    assert (info["conflicting_age_groups"], info["straddling_groups"]) == (1, 0)
    labels = read_labels(root / "utkface")
    where = read_splits(root / "utkface" / "splits" / "default.csv")
    assert all(row.pixel_hash for row in where.values())
    assert sorted(where) == sorted(labels["file"])
    twice = [i for i, key in enumerate(labels["pixel_hash"]) if labels["pixel_hash"].count(key) > 1]
    assert len({where[labels["file"][i]].split for i in twice}) == 1
    assert {labels["age"][i] for i in twice} == {0, 70}


def test_label_rows_are_the_records_in_order_with_their_original_bytes(kaggle):
    files, root, _ = kaggle
    labels = read_labels(root / "utkface")
    builder = tfds.builder_from_directory(records_folder(root / "utkface"))
    records = builder.as_data_source(split="faces", decoders={"image": tfds.decode.SkipDecoding()})
    assert len(records) == len(labels["file"])
    for i, record in enumerate(records):
        file = labels["file"][i]
        assert record["file"].decode() == file
        assert record["image"] == files[file if "/" in file else f"UTKFace/{file}"]
        assert record["age"] == labels["age"][i] == int(file.split("/")[-1].split("_")[0])
        assert labels["pixel_hash"][i] == pixel_hash(decode_checked(record["image"]))
        assert labels["height"][i] == labels["width"][i] == 48


def test_crop_and_the_photo_it_was_cut_from_stay_together(tmp_path):
    crops = {f"UTKFace/{name(i * 3 % 18, i % 2, i % 5, i)}": jpeg(i) for i in range(30)}
    photos = {
        path.replace("UTKFace", "part1").replace(".chip.jpg", ""): jpeg(100 + i, size=64)
        for i, path in enumerate(crops)
    }
    info = quiet(write_zip(tmp_path / "both.zip", crops | photos), tmp_path)
    assert info["kept"] == 60 and info["near_groups"] == 30
    for path in (tmp_path / "utkface" / "splits").glob("*.csv"):
        where = {file: row.split for file, row in read_splits(path).items()}
        for crop in map(os.path.basename, crops):
            assert where[crop] == where[crop.replace(".chip.jpg", "")]


def by_file(folder):
    labels = read_labels(folder)
    return dict(zip(labels["file"], labels["age"], strict=True))


def test_published_splits_hold_where_names_repeat_in_other_folders(tmp_path):
    rows = [(f"{part}/{i}.jpg", part) for part in ("train", "test") for i in range(1, 6)]
    files = {f"set/{path}": jpeg(k) for k, (path, _) in enumerate(rows)}
    table = "".join(f"{path},{20 + k},{part}\n" for k, (path, part) in enumerate(rows))
    source = write_zip(tmp_path / "a.zip", files | {"set/labels.csv": f"file,age,split\n{table}"})
    info = prepare(source, tmp_path, name="own", progress=None)
    assert info["protocols"]["published"]["splits"] == {"train": 5, "test": 5}
    where = read_splits(tmp_path / "own" / "splits" / "published.csv")
    assert {file: row.split for file, row in where.items()} == {f"set/{f}": p for f, p in rows}
    assert by_file(tmp_path / "own") == {f"set/{f}": 20 + k for k, (f, _) in enumerate(rows)}


def test_names_of_a_mac_match_tables_that_were_typed(tmp_path):
    files = {f"Zoe\u0308 {i}.jpg": jpeg(i) for i in range(6)}
    typed = [f"Zo\u00eb {i}.jpg" for i in range(6)]
    rows = "".join(f"{file},{20 + i}\n" for i, file in enumerate(typed))
    (tmp_path / "t.csv").write_text(f"file,age\n{rows}", encoding="utf-8")
    rows = "".join(f"{file},train\n" for file in typed)
    (tmp_path / "s.csv").write_text(f"file,split\n{rows}", encoding="utf-8")
    info = prepare(
        write_zip(tmp_path / "a.zip", files),
        tmp_path,
        name="own",
        labels=[tmp_path / "t.csv"],
        splits={"theirs": tmp_path / "s.csv"},
        progress=None,
    )
    assert info["kept"] == 6 and info["rows_without_image"] == 0
    assert info["protocols"]["theirs"]["splits"] == {"train": 6}
    assert by_file(tmp_path / "own") == {file: 20 + i for i, file in enumerate(files)}


def test_rows_of_a_missing_folder_and_of_two_splits_are_counted(tmp_path):
    rows = [f"a/{i}.jpg,{20 + i},train\n" for i in range(5)] + ["b/1.jpg,30,\n", "a/0.jpg,20,test"]
    files = {f"a/{i}.jpg": jpeg(i) for i in range(5)}
    source = write_zip(tmp_path / "a.zip", files | {"t.csv": "file,age,split\n" + "".join(rows)})
    info = prepare(source, tmp_path, name="own", progress=None)
    without = (tmp_path / "own" / "rows_without_image.csv").read_text()
    assert without == "file\nb/1.jpg\n" and info["rows_without_image"] == 1
    assert info["protocols"]["published"]["splits"] == {"train": 4}
    assert info["protocols"]["published"]["ambiguous"] == 1


def test_copies_of_one_name_with_other_ages_are_conflicts(tmp_path):
    files = {f"0{i + 10}/{i}.jpg": jpeg(i) for i in range(5)}
    files |= {"025/x.jpg": jpeg(9), "060/x.jpg": jpeg(9), "061/x.jpg": with_comment(jpeg(9))}
    files |= {"025/again/x.jpg": jpeg(9)}
    info = prepare(write_folder(tmp_path / "in", files), tmp_path, name="own", progress=None)
    assert info["kept"] == 8 and info["skipped"] == {"duplicate file name": 1}
    ages = by_file(tmp_path / "own")
    assert {f: ages[f] for f in ages if "x" in f} == {"x.jpg": 25, "060/x.jpg": 60, "061/x.jpg": 61}
    with (tmp_path / "own" / "conflicts.csv").open() as lines:
        conflicts = [(row["group"], row["file"]) for row in csv.DictReader(lines)]
    assert sorted(conflicts) == [("0", "060/x.jpg"), ("0", "061/x.jpg"), ("0", "x.jpg")]
    assert info["conflicting_age_groups"] == 1 and info["straddling_groups"] == 0


def test_any_number_of_pictures_may_have_one_public_name(tmp_path):
    people = ("Ann", "Bea", "Cleo", "Dora")
    files = {f"AgeDB/0_{who}_25_f.jpg": jpeg(i) for i, who in enumerate(people)}
    info = prepare(write_zip(tmp_path / "a.zip", files), tmp_path, progress=None)
    assert info["kept"] == info["identities"] == 4
    names = ["0_25_f.jpg", "AgeDB/0_25_f.jpg", "AgeDB/0_25_f.jpg#2", "AgeDB/0_25_f.jpg#3"]
    assert sorted(by_file(tmp_path / "agedb")) == names


def test_set_larger_than_its_share_of_memory_has_the_same_records(tmp_path, monkeypatch):
    source = write_zip(tmp_path / "faces.zip", faces(60))
    quiet(source, tmp_path / "memory")
    adding, spilled = Bucket.add, []
    monkeypatch.setattr(
        Bucket, "add", lambda self, *entry: spilled.append(entry) or adding(self, *entry)
    )
    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 20_000)
    quiet(source, tmp_path / "disk")
    assert len(spilled) == 60
    one, other = (tmp_path / place / "utkface" for place in ("memory", "disk"))
    assert {path.relative_to(one) for path in one.rglob("*")} == {
        path.relative_to(other) for path in other.rglob("*")
    }
    assert (one / "labels.csv").read_bytes() == (other / "labels.csv").read_bytes()
    images = [open_split(folder, "all").read_images(range(60)) for folder in (one, other)]
    assert images[0] == images[1]


def test_many_pictures_of_one_name_are_told_apart_in_time():
    copies, started = Copies("face.jpg"), time.monotonic()
    paths = [f"p{i:05}/face.jpg" for i in range(20_000)]
    files = [copies.place(path, path, FaceLabel(3)).file for path in paths]
    assert files == ["face.jpg", *paths[1:]]
    assert copies.place(paths[7], "other", FaceLabel(3)).file == f"{paths[7]}#20000"
    assert time.monotonic() - started < 2  # ten seconds where each is compared with all before


def test_given_split_that_fits_a_picture_twice_is_counted_and_shown(tmp_path):
    files = {f"{i + 10}/{i}.jpg": jpeg(i) for i in range(5)}
    rows = ["a/0.jpg,train", "b/0.jpg,test", *(f"{i}.jpg,train" for i in range(1, 5))]
    (tmp_path / "s.csv").write_text("\n".join(["file,split", *rows]))
    source = write_folder(tmp_path / "in", files)
    info = prepare(
        source, tmp_path, name="own", splits={"theirs": tmp_path / "s.csv"}, progress=None
    )
    assert info["protocols"]["theirs"]["ambiguous"] == 1
    assert "train 4; 1 images that fit rows of several splits" in summary(info)


def test_dropped_pictures_leave_the_splits_that_were_there_before(tmp_path):
    files = faces(12) | {f"UTKFace/{name(70, 0, 0, 900)}": with_comment(jpeg(0))}
    source, lines = write_zip(tmp_path / "faces.zip", files), []
    quiet(source, tmp_path)
    folder = tmp_path / "utkface" / "splits"
    bare = [path.removeprefix("UTKFace/") for path in files]
    mine = ["split,file,why", *(f"train,{path},x" for path in files), "test,gone.jpg,x"]
    (folder / "mine.csv").write_text("\n".join(mine) + "\n")
    (folder / "other.csv").write_text(f"file,split\n{bare[3]},test\n")
    (folder / "broken.csv").write_text("file,split\n")
    info = prepare(source, tmp_path, name="utkface", drop_conflicts=10, progress=lines.append)
    assert info["dropped"] == 2
    kept = [line for line in mine if bare[0] not in line and bare[12] not in line]
    assert (folder / "mine.csv").read_text() == "\n".join(kept) + "\n" and len(kept) == 13
    assert (folder / "other.csv").read_text() == f"file,split\n{bare[3]},test\n"
    assert (folder / "broken.csv").read_text() == "file,split\n"
    (said,) = [line for line in lines if "mine.csv" in line]
    assert (
        said == "pictures dropped for their conflicting ages were left out of splits/mine.csv too"
    )


def test_summary_names_every_count(kaggle):
    _, _, info = kaggle
    table = summary(info)
    for part in ("found", "kept", "duplicate file name", "split train", "class 18-40", "%"):
        assert part in table


def test_folder_zip_and_tar_give_the_same_fingerprint(tmp_path):
    files = faces(24)
    sources = {
        "folder": write_folder(tmp_path / "faces", files),
        "zip": write_zip(tmp_path / "faces.zip", files),
        "tar": write_tar(tmp_path / "faces.tar", files),
    }
    infos = [quiet(source, tmp_path / kind) for kind, source in sources.items()]
    assert len({info["fingerprint"] for info in infos}) == 1
    tables = {(tmp_path / kind / "utkface" / "labels.csv").read_text() for kind in sources}
    assert len(tables) == 1
    other = quiet(sources["tar"], tmp_path / "seed", seed=1)
    assert other["fingerprint"] != infos[0]["fingerprint"]


def test_link_to_itself_is_among_the_skipped(tmp_path):
    source = write_folder(tmp_path / "in", faces(8))
    (source / "UTKFace" / name(30, 0, 0, 900)).symlink_to(name(30, 0, 0, 900))
    assert quiet(source, tmp_path)["kept"] == 8
    assert skipped(tmp_path) == {f"UTKFace/{name(30, 0, 0, 900)}": "a link or device, not a file"}


def test_same_source_is_reused_and_another_replaces_it(tmp_path):
    source, root, lines = write_zip(tmp_path / "faces.zip", faces(12)), tmp_path / "data", []
    first = prepare(source, root, name="utkface", progress=lines.append)
    stamp = (root / "utkface" / "labels.csv").stat().st_mtime_ns
    assert any("fingerprint" in line for line in lines)
    lines.clear()
    assert prepare(source, root, name="utkface", progress=lines.append) == first
    assert (root / "utkface" / "labels.csv").stat().st_mtime_ns == stamp
    assert len(lines) == 1 and "is ready: 12 images" in lines[0]
    (root / "utkface" / "splits" / "mine.csv").write_text("file,split\n")
    other = prepare(
        write_zip(tmp_path / "x.zip", faces(14)), root, name="utkface", progress=lines.append
    )
    assert other["kept"] == 14 and "another source" in lines[1]
    assert (root / "utkface" / "splits" / "mine.csv").is_file()
    assert os.listdir(root) == ["utkface"]


@pytest.mark.parametrize("damage", ["prepare.json", "labels.csv", "record", "splits"])
def test_half_built_folder_is_built_again(tmp_path, damage):
    source = write_zip(tmp_path / "faces.zip", faces(12))
    first, folder = quiet(source, tmp_path), tmp_path / "utkface"
    if damage == "record":
        (record,) = folder.glob("tfds/*/*/*array_record*")
        record.write_bytes(record.read_bytes()[: record.stat().st_size // 2])
    elif damage == "splits":
        (folder / "splits" / "default.csv").unlink()
    else:
        (folder / damage).unlink()
    (tmp_path / ".utkface.partial-999999999").mkdir()  # left by a process that died
    assert quiet(source, tmp_path) == first
    assert quiet(source, tmp_path) == first
    assert sorted(os.listdir(tmp_path)) == ["faces.zip", "utkface"]


def upside_down(data):
    """A transform as pre-processing gives it: new bytes, or a reason to leave the picture out."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if image.shape[0] != 48:
        raise ValueError("no face found")
    return cv2.imencode(".png", image[::-1])[1].tobytes()


def test_transform_makes_the_kept_bytes_or_says_why_not(tmp_path):
    files = faces(10) | {f"UTKFace/{name(30, 0, 0, 900)}": jpeg(900, size=40)}
    source = write_zip(tmp_path / "faces.zip", files)
    plain = quiet(source, tmp_path / "plain")
    turned = {"transform": upside_down, "transform_id": "upside_down 1"}
    info = quiet(source, tmp_path / "turned", **turned)
    assert info["kept"] == 10 and info["skipped"] == {"no face found": 1}
    assert info["transform_id"] == "upside_down 1" and plain["transform_id"] == ""
    faces_ = open_split(tmp_path / "turned" / "utkface", "train+validation+test")
    assert faces_.fingerprint == info["fingerprint"] != plain["fingerprint"]
    for i in range(len(faces_)):
        row = faces_[i]
        expected = decode_checked(files[f"UTKFace/{row['file']}"])[::-1]
        np.testing.assert_array_equal(decode_checked(row["image"]), expected)
    lines = []
    prepare(source, tmp_path / "turned", name="utkface", progress=lines.append, **turned)
    assert "is ready" in lines[0]
    turned["transform_id"] = "upside_down 2"
    prepare(source, tmp_path / "turned", name="utkface", progress=lines.append, **turned)
    assert "another source or settings" in lines[1]
    with pytest.raises(ValueError, match="go together"):
        quiet(source, tmp_path, transform=upside_down)


def test_failure_leaves_nothing_behind(tmp_path):
    source = write_tar(tmp_path / "faces.tar", faces(12))
    source.write_bytes(source.read_bytes()[:9000])
    with pytest.raises(ValueError, match="cut short"):
        quiet(source, tmp_path / "data", layout="utkface")
    assert os.listdir(tmp_path / "data") == []


def test_process_that_was_killed_leaves_its_set_to_the_next(tmp_path):
    source = write_zip(tmp_path / "faces.zip", faces(12))
    root = tmp_path / "data"
    quiet(source, root)
    (root / "utkface" / "splits" / "mine.csv").write_text("file,split\n")
    # Killed between the two renames; another is at work, in a container that has our process id.
    (root / f".utkface.partial-{os.getpid()}-dead").mkdir()
    (root / "utkface").rename(root / f".utkface.partial-{os.getpid()}-dead-old")
    (root / f".utkface.partial-{os.getpid()}-live").mkdir()
    (root / f".utkface.partial-{os.getpid()}-live-old").mkdir()
    lock = os.open(root / f".utkface.partial-{os.getpid()}-live", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    quiet(write_zip(tmp_path / "others.zip", faces(13)), root)
    os.close(lock)
    live = f".utkface.partial-{os.getpid()}-live"
    assert sorted(os.listdir(root)) == [live, f"{live}-old", "utkface"]
    assert (root / "utkface" / "splits" / "mine.csv").exists()


def test_set_of_another_process_that_was_quicker_is_replaced(tmp_path, monkeypatch):
    source, rename, seen = write_zip(tmp_path / "faces.zip", faces(12)), Path.rename, []

    def slow(path, target):
        if not seen and ".partial-" in path.name:
            seen.append(path)
            (target / "splits").mkdir(parents=True)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", slow)
    quiet(source, tmp_path / "data")
    assert seen and os.listdir(tmp_path / "data") == ["utkface"]
    assert (tmp_path / "data" / "utkface" / "prepare.json").exists()


def killed(data):
    os.kill(os.getpid(), signal.SIGKILL)


def test_killed_worker_is_told_in_one_line(tmp_path):
    source = write_zip(tmp_path / "faces.zip", faces(4))
    with pytest.raises(ValueError, match="was killed, most likely for lack of memory") as error:
        quiet(source, tmp_path / "data", transform=killed, transform_id="killed")
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path / "data") == []


def test_worker_ends_with_the_process_that_made_it(tmp_path):
    program = (
        "import os, time\n"
        "from input_pipeline.scan import _pool\n"
        "if __name__ == '__main__':\n"
        "    pool = _pool(str)\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    time.sleep(60)\n"
    )
    (tmp_path / "program.py").write_text(program)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "program.py"], stdout=subprocess.PIPE, env=environment
    )
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(100):
        if not _is_running(worker):
            return
        time.sleep(0.1)
    pytest.fail("the worker outlives its parent")


def test_folder_of_other_files_is_never_replaced(tmp_path):
    source = write_zip(tmp_path / "faces.zip", faces(4))
    write_folder(tmp_path / "utkface", {"my_photo.jpg": b"precious"})
    with pytest.raises(ValueError, match="holds other files \\(my_photo.jpg\\)"):
        quiet(source, tmp_path)
    assert (tmp_path / "utkface" / "my_photo.jpg").read_bytes() == b"precious"
    with pytest.raises(ValueError, match="lies within the source"):
        quiet(tmp_path, tmp_path)
    quiet(source, tmp_path / "data")
    (tmp_path / "data" / "utkface" / ".DS_Store").write_bytes(b"of a desktop")
    quiet(write_zip(tmp_path / "faces.zip", faces(5)), tmp_path / "data")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ValueError, match="loop is a link to nothing or to itself"):
        quiet(source, tmp_path / "loop")


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"a.txt": b"x", "b.csv": b"y"}, "holds no images \\(2 other files\\)"),
        ({}, "holds no images \\(0 other files\\)"),
        (
            {"a.tar.gz": b"x", "b.zip": b"y", "c.txt": b"z"},
            "holds no images \\(3 other files, 2 of them archives: unpack it, or name them as the",
        ),
        (
            {f"photos/img{i}.jpg": jpeg(i) for i in range(5)},
            "the ages of its 5 or more images were not found: not in names such as "
            "photos/img0.jpg, photos/img1.jpg, photos/img2.jpg, .*--labels",
        ),
        ({name(20, 0, 0, 0): jpeg(0)[:-9]}, "none of 1 images can be used; 1 of them: image cut"),
    ],
)
def test_source_without_usable_images_raises_one_clear_line(tmp_path, files, reason):
    with pytest.raises(ValueError, match=reason) as error:
        quiet(write_zip(tmp_path / "faces.zip", files), tmp_path / "data")
    assert "\n" not in str(error.value)


def test_missing_source_and_bad_name_raise(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.zip does not exist"):
        quiet(tmp_path / "nowhere.zip", tmp_path)
    with pytest.raises(ValueError, match="plain folder name"):
        prepare(tmp_path, tmp_path, name="../up", progress=None)
    with pytest.raises(FileNotFoundError, match="prepare it first"):
        read_labels(tmp_path)


@pytest.mark.parametrize(
    ("builder_class", "form"),
    [
        (UTKFaceBuilder, "UTKFace/2{i}_0_1_2017011617452512{i}.jpg.chip.jpg"),
        (AgeDBBuilder, "AgeDB/{i}_SomeBody_2{i}_m.jpg"),
        (FolderBuilder, "02{i}/me.jpg"),
    ],
)
def test_builder_reads_the_manual_folder_as_tfds_does(tmp_path, builder_class, form):
    write_folder(tmp_path / "manual", {form.format(i=i): jpeg(i) for i in range(6)})
    builder = builder_class(data_dir=tmp_path / "tfds")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=tmp_path / "manual")
    )
    records = builder.as_data_source(split="faces")
    assert sorted(int(record["age"]) for record in records) == list(range(20, 26))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"drop_conflicts": -1}, "0 years or more, got -1"),
        ({"splits": {"a/b": "s.csv"}}, "splits name 'a/b' must be a plain word"),
        ({"splits": {"theirs": "none.csv"}}, "none.csv does not exist"),
        ({"splits": {"fold0": "s.csv"}}, "the splits fold0 are made here"),
        ({"beam_runner": "DirectRunner"}, "pip install 'coatnet-jax\\[beam\\]'"),
        ({"layout": "agedb"}, "none of 4 images can be used; 4 of them: not an AgeDB name"),
    ],
)
def test_wrong_settings_raise_one_clear_line(tmp_path, monkeypatch, options, reason):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    files = faces(4)
    rows = "".join(f"{path},train\n" for path in files)
    (tmp_path / "s.csv").write_text(f"file,split\n{rows}")
    with pytest.raises((ValueError, FileNotFoundError), match=reason) as error:
        quiet(write_zip(tmp_path / "faces.zip", files), tmp_path / "data", **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("s.csv", b"file,part\na.jpg,train\n", "but split must be among them"),
        ("s.csv", b"file,split\na.jpg,\n", "line 2: file or split is empty"),
        ("s.csv.gz", b"\x1f\x8b\x08 cut", "cannot be unpacked .*: fetch it again"),
        ("s.csv", None, "split file .*s.csv does not exist"),
    ],
)
def test_bad_split_file_is_told_before_any_picture_is_read(tmp_path, name, content, reason):
    if content:
        (tmp_path / name).write_bytes(content)
    source, lines = write_zip(tmp_path / "faces.zip", faces(4)), []
    with pytest.raises((ValueError, FileNotFoundError), match=reason) as error:
        prepare(
            source, tmp_path / "data", splits={"theirs": tmp_path / name}, progress=lines.append
        )
    assert "\n" not in str(error.value) and not lines and not (tmp_path / "data").exists()


def test_name_of_our_own_splits_is_refused_before_any_picture_is_read(tmp_path):
    lines = []
    made = quiet(write_zip(tmp_path / "faces.zip", faces(4)), tmp_path)["protocols"]
    for name in made:
        (tmp_path / "s.csv").write_text("file,split\na.jpg,train\n")
        with pytest.raises(ValueError, match=f"the splits {name} are made here"):
            prepare(
                tmp_path / "faces.zip",
                tmp_path / "data",
                splits={name: tmp_path / "s.csv"},
                progress=lines.append,
            )
    assert len(made) == 8 and not lines


def test_split_file_at_home_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    files = faces(8)
    rows = "".join(f"{path},train\n" for path in files)
    (tmp_path / "s.csv").write_text(f"file,split\n{rows}")
    source = write_zip(tmp_path / "faces.zip", files)
    info = quiet(source, tmp_path / "data", splits={"theirs": "~/s.csv"})
    assert info["protocols"]["theirs"]["splits"] == {"train": 8}


def encode(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "1", "CMYK", "I;16"])
def test_other_colour_modes_decode_as_rgb(mode):
    rgb = Image.fromarray(picture(7))
    if mode == "I;16":
        data = encode(Image.fromarray(picture(7)[..., 0].astype(np.uint16) * 257), "PNG")
        expected = np.repeat(picture(7)[..., :1], 3, axis=2)
    else:
        image = rgb.convert(mode)
        data = encode(image, "JPEG", quality=95) if mode == "CMYK" else encode(image, "PNG")
        expected = np.asarray(image.convert("RGB"))
    pixels = decode_checked(data)
    assert pixels.shape == (48, 48, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - expected).mean() < 4


def test_exif_rotation_is_applied():
    image = Image.fromarray(picture(8)[:32])
    exif = Image.Exif()
    exif[274] = 6  # turned by 90 degrees
    upright = decode_checked(encode(image, "JPEG", quality=95, exif=exif))
    assert upright.shape == (48, 32, 3)
    turned = np.rot90(np.asarray(image), -1)
    assert np.abs(upright.astype(int) - turned).mean() < 4


@pytest.mark.parametrize("keep", [0.5, 0.9, "end marker", "zeros"])
def test_jpeg_cut_short_is_refused(keep):
    data = jpeg(3, size=200)
    if keep == "end marker":
        cut = data[:-2]
    elif keep == "zeros":
        cut = data[: len(data) // 2].ljust(len(data), b"\0")
    else:
        cut = data[: int(len(data) * keep)]
    with pytest.raises(ValueError, match="image cut short"):
        decode_checked(cut)


@pytest.mark.parametrize("damage", ["half", "zeros"])
def test_jpeg_damaged_between_its_ends_is_refused(damage, capfd):
    data = jpeg(3, size=200)
    half, end = len(data) // 2, b"\xff\xd9"
    broken = data[:half] + (end if damage == "half" else bytes(half)) + end
    with pytest.raises(ValueError, match="image damaged \\((Corrupt|Premature)"):
        decode_checked(broken)
    assert capfd.readouterr().err == ""  # where OpenCV would not say which file it means


def test_bytes_after_the_end_of_a_jpeg_do_no_harm():
    data = jpeg(4)
    np.testing.assert_array_equal(decode_checked(data + b"trailer"), decode_checked(data))


def test_png_cut_in_half_is_refused():
    data = encode(Image.fromarray(picture(5)), "PNG")
    with pytest.raises(ValueError, match="image cut short"):
        decode_checked(data[: len(data) // 2])


@pytest.mark.parametrize("side", [10_001, 20_000])  # Pillow itself refuses only the second
def test_image_of_too_many_pixels_is_refused_before_decoding(monkeypatch, side):
    monkeypatch.setattr(cv2, "imdecode", None)  # would raise
    small = encode(Image.fromarray(picture(6)), "PNG")
    header = small[:16] + side.to_bytes(4, "big") * 2 + small[24:29]
    bomb = header + zlib.crc32(header[12:29]).to_bytes(4, "big") + small[33:]
    assert side**2 > MAX_PIXELS
    with pytest.raises(ValueError, match="larger than 100 megapixels"):
        decode_checked(bomb)


def test_metadata_does_not_change_the_pixel_hash_and_the_shape_does():
    data = jpeg(9)
    assert pixel_hash(decode_checked(with_comment(data))) == pixel_hash(decode_checked(data))
    flat = np.zeros((4, 6, 3), np.uint8)
    assert pixel_hash(flat) != pixel_hash(flat.reshape(6, 4, 3))


def test_decode_image_crops_the_centre_square_and_resizes():
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, 20:60] = (10, 100, 200)
    data = cv2.imencode(".png", wide[..., ::-1])[1].tobytes()
    for size in (16, 40, 64):  # shrunk, kept, grown
        image = decode_image(data, size)
        assert image.shape == (size, size, 3) and image.dtype == np.uint8
        assert (image == (10, 100, 200)).all()
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode_image(b"nothing", 16)


def odd_files():
    """Files of 48 px unless the name says otherwise, of all kinds that a batch may meet."""
    photo = Image.fromarray(picture(7))
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: a quarter turn
    return {
        "jpeg": jpeg(7),
        "progressive": encode(photo, "JPEG", progressive=True, subsampling=0),
        "after a comment": with_comment(jpeg(7)),
        "grey": encode(photo.convert("L"), "JPEG"),
        "CMYK": encode(photo.convert("CMYK"), "JPEG"),
        "turned": encode(photo, "JPEG", exif=turned),
        "PNG": encode(photo, "PNG"),
        "32 px": jpeg(7, 32),
        "64 px": jpeg(7, 64),
        "96 x 24 px": encode(photo.resize((96, 24)), "JPEG"),
        "47 x 48 px": encode(photo.resize((47, 48)), "JPEG"),
        "trailer": jpeg(7) + b"trailer",
    }


@pytest.mark.parametrize("kind", odd_files())
def test_decoding_into_a_row_gives_the_pixels_of_decode_image(kind):
    data = odd_files()[kind]
    batch = np.full((3, 48, 48, 3), 77, np.uint8)
    decode_into(batch[1], memoryview(data))
    np.testing.assert_array_equal(batch[1], decode_image(data, 48))
    assert (batch[[0, 2]] == 77).all()


@pytest.mark.parametrize("data", [b"nothing", b"", jpeg(7)[:100]])
def test_decoding_into_a_row_refuses_what_is_no_image(data):
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode_into(np.empty((48, 48, 3), np.uint8), data)

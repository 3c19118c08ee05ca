"""Copies whose ages disagree: what is left out, what is widened, and what is never touched."""

import csv

import cv2
import numpy as np
import pytest

from coatnet_jax.config import load_config
from coatnet_jax.stage import open_stage
from input_pipeline.face_drawing import draw_face
from input_pipeline.images import encode_jpeg
from input_pipeline.label_noise import settle_conflicts
from input_pipeline.pipeline import Faces, open_split, train_loader
from input_pipeline.prepare import prepare

# file: age, and its group in conflicts.csv; f's two copies agree on the age and not on the gender.
ROWS = {"a": (20, 0), "b": (30, 0), "c": (20, 0), "d": (50, None), "e": (61, 1), "f": (7, 2)}
ROWS |= {"g": (7, 2), "h": (44, 3), "i": (40, 3)}


@pytest.fixture
def faces(tmp_path):
    """A split with the groups of `ROWS`; of e's group the other copy is in another split."""
    lines = ["group,file,age,gender,race,copy,kept", "1,elsewhere,90,0,0,near,kept"]
    lines += [f"{g},{file},{age},0,0,near,kept" for file, (age, g) in ROWS.items() if g is not None]
    (tmp_path / "conflicts.csv").write_text("\n".join(lines) + "\n")
    labels = {
        "age": np.array([age for age, _ in ROWS.values()], np.int32),
        "gender": np.zeros(len(ROWS), np.int32),
        "race": np.zeros(len(ROWS), np.int32),
        "file": np.array(list(ROWS)),
    }
    records = np.arange(100, 100 + len(ROWS))
    return Faces(tmp_path, "train", labels, records, fingerprint="x")


def test_drop_leaves_out_the_groups_that_disagree_within_the_split(faces):
    kept, account = settle_conflicts(faces, "drop")
    assert kept.labels["file"].tolist() == ["d", "e", "f", "g"]
    assert kept.records.tolist() == [103, 104, 105, 106]
    assert kept.labels["age"].tolist() == [50, 61, 7, 7]
    assert [row["file"] for row in account] == ["a", "b", "c", "h", "i"]
    assert account[1] == {"group": "0", "file": "b", "age": "30", "ages": "20 30 20"}


def test_widen_gives_each_copy_the_ages_of_all_and_changes_no_other_label(faces):
    wide, account = settle_conflicts(faces, "widen")
    expected = [[20, 30, 20], [20, 30, 20], [20, 30, 20], [50, -1, -1], [61, -1, -1]]
    expected += [[7, -1, -1], [7, -1, -1], [44, 40, -1], [44, 40, -1]]
    assert wide.labels["ages"].tolist() == expected
    assert len(account) == 5
    for name, values in faces.labels.items():
        np.testing.assert_array_equal(wide.labels[name], values)
    batch = next(iter(train_loader(wide, batch_size=4, image_size=8, seed=0, with_images=False)))
    assert batch["ages"].tolist() == [expected[row] for row in batch["index"]]


def test_keep_is_the_default_and_changes_nothing(faces):
    assert settle_conflicts(faces, "keep") == (faces, [])
    assert load_config("finetune").data.label_noise == "keep"


def test_bad_word_missing_table_and_nothing_left_are_one_line(faces):
    with pytest.raises(ValueError, match="keep, drop, widen, not 'remove'"):
        settle_conflicts(faces, "remove")
    two = Faces(
        faces.folder, "train", {k: v[:2] for k, v in faces.labels.items()}, np.arange(2), "x"
    )
    with pytest.raises(ValueError, match="every face of the split train has a copy of another age"):
        settle_conflicts(two, "drop")
    (faces.folder / "conflicts.csv").unlink()
    with pytest.raises(FileNotFoundError, match="conflicts.csv is missing, .* prepare the data"):
        settle_conflicts(faces, "widen")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Drawn faces, eight of them twice with another age, in splits that part some of the copies."""
    root = tmp_path_factory.mktemp("noise")
    pictures = root / "pictures"
    pictures.mkdir()
    rows = []
    for i in range(48):
        drawn = draw_face(np.random.default_rng([3, i % 40]), 20 + i % 40, 0, 0, 48)
        name = f"{20 + i % 40 + 5 * (i >= 40)}_0_0_201701161745251{i:02d}.jpg.chip.jpg"
        image = cv2.convertScaleAbs(drawn, alpha=0.9) if i >= 40 else drawn
        (pictures / name).write_bytes(encode_jpeg(image, 92))
        part = ("train", "validation", "test")[i % 3] if i >= 40 else "train" if i < 20 else None
        rows.append((name, part or ("validation", "test")[i % 2]))
    with (root / "own.csv").open("w", newline="") as out:
        csv.writer(out).writerows([("file", "split"), *rows])
    prepare([str(pictures)], root, name="noisy", splits={"own": root / "own.csv"}, progress=None)
    return root


@pytest.mark.parametrize(("how", "done"), [("drop", "left out"), ("widen", "trained on with")])
def test_training_counts_them_and_validation_and_test_stay(root, tmp_path, capsys, how, done):
    config = load_config("finetune:atto,drawn,tiny")
    config.data.update(root=str(root), name="noisy", splits="own", label_noise=how)
    config.batch_size = 8
    setting = open_stage(config, tmp_path)
    whole = {
        split: open_split(root / "noisy", split, splits="own")
        for split in ("train", "validation", "test")
    }
    # Copies 42 and 45 lie in train, as do their originals 2 and 5; the other six do not.
    said = capsys.readouterr().out
    assert f"4 training images in 2 groups of copies whose ages disagree: {done}" in said
    assert len(setting.train_faces) == len(whole["train"]) - (4 if how == "drop" else 0)
    assert setting.schedule.steps_per_epoch == len(setting.train_faces) / 8
    if how == "widen":
        ages = setting.train_faces.labels["ages"]
        found = [sorted(row) for row in ages[ages[:, 1] >= 0].tolist()]
        assert sorted(found) == [[22, 27], [22, 27], [25, 30], [25, 30]]
    assert "ages" not in setting.validation_faces.labels
    for name, values in whole["validation"].labels.items():
        np.testing.assert_array_equal(setting.validation_faces.labels[name], values)
    assert {row["file"] for row in setting.conflicts} <= set(whole["train"].labels["file"])
    assert setting.train_faces.fingerprint == whole["test"].fingerprint

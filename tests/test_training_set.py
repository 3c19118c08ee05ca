"""What a release keeps of its training faces: enough to count them and to know them again."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from coatnet_jax import training_set
from coatnet_jax.training_set import open_training_set, read_record, short_hashes, write_record
from input_pipeline.pipeline import open_split


@pytest.fixture(scope="module")
def folder(drawn_root):
    return drawn_root / "drawn"


@pytest.fixture
def make(folder, tmp_path):
    """`make(*stages)` writes a run on the default splits after these stages, and its record."""

    def run(*stages):
        print_ = open_split(folder, "train").fingerprint
        told = {"data_fingerprint": print_, "before": [*stages, {"stage": "timm", "name": "x"}]}
        (tmp_path / "run.json").write_text(json.dumps(told))
        write_record(tmp_path, tmp_path, folder, "default")
        return tmp_path

    return run


def hashes(folder, split="train", **options):
    return set(open_split(folder, split, **options).labels["pixel_hash"])


def test_short_hashes_are_the_first_64_bits():
    text = "0123456789abcdef" + 48 * "7"
    assert short_hashes([text, "f" * 64]).tolist() == [0x0123456789ABCDEF, 2**64 - 1]


def test_record_counts_labels_and_knows_the_faces_of_every_labelled_stage(folder, make, capsys):
    stage = {"stage": "finetune", "data": "drawn", "splits": "fold0"}
    simclr = stage | {"stage": "pretrain", "method": "simclr", "splits": "fold1"}
    run = make(simclr, stage, stage | {"data": "gone"})
    labels, kept = read_record(run)
    train = open_split(folder, "train").labels
    for name in ("age", "gender", "race"):
        np.testing.assert_array_equal(labels[name], np.sort(train[name]))
    expected = hashes(folder) | hashes(folder, splits="fold0")
    assert expected < hashes(folder, "all")
    assert set(kept.tolist()) == set(short_hashes(sorted(expected)).tolist())
    assert "the stage on gone (fold0) are not here" in capsys.readouterr().out


def test_unknown_labels_are_counted_as_such(folder, make, monkeypatch):
    whole = open_split(folder, "train")
    whole.labels["race"][:] = -1
    whole.labels["gender"][::2] = -1
    monkeypatch.setattr(training_set, "open_trained", lambda *_: (whole, "default"))
    labels, _ = read_record(make())
    assert set(labels["race"]) == {-1} and len(labels["race"]) == len(whole)
    assert (labels["gender"] < 0).sum() == (len(whole) + 1) // 2


def test_without_the_data_the_record_stands_for_them(folder, make, tmp_path):
    run, gone = make(), tmp_path / "gone"
    whole, kept = (open_training_set(run, place, "default") for place in (folder, gone))
    assert whole.fingerprint == kept.fingerprint and kept.train is kept.validation is None
    test, train = (open_split(folder, split) for split in ("test", "train"))
    for known in (whole, kept):
        told = known.check(test, run_dir=run, folder=folder)
        assert told == {
            "training_faces": len(train), "evaluated_faces": len(test), "identical": 0,
            "before": [],
        }  # fmt: skip
        both = open_split(folder, "train+test")
        with pytest.raises(ValueError, match=f"^{len(train)} of the {len(both)} faces"):
            known.check(both, run_dir=run, folder=folder)


def test_other_data_under_the_same_name_are_no_obstacle(folder, make, tmp_path):
    run, other = make(), tmp_path / "drawn"
    shutil.copytree(folder, other)
    for path in (other / "splits").glob("*.csv"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert open_training_set(run, other, "default").hashes is not None
    (run / training_set.FILE).unlink()
    with pytest.raises(ValueError, match="prepare the data as they were"):
        open_training_set(run, other, "default")
    with pytest.raises(FileNotFoundError, match="nothing can be said of overlap"):
        open_training_set(run, tmp_path / "gone", "default")


def test_damaged_record_is_told(make):
    run = make()
    save_file({"hashes": np.zeros(3, np.uint64)}, run / training_set.FILE)
    with pytest.raises(ValueError, match="is damaged: it lacks age, gender, race"):
        read_record(run)

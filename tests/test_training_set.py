"""What a release keeps of its training faces: enough to count them and to know them again."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from coatnet_jax import training_set
from coatnet_jax.config import load_config
from coatnet_jax.finetune import open_finetuning
from coatnet_jax.logs import write_run_info
from coatnet_jax.training_set import (
    open_training_set,
    read_record,
    short_hashes,
    told_before,
    told_so_far,
    write_record,
)
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
        (tmp_path / "config.json").write_text(load_config("finetune:atto,drawn").to_json())
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


@pytest.fixture
def chain(folder, tmp_path):
    """`chain(name, splits=…, …)` writes a run with these settings; gives back its folder."""

    def write(name, stage="finetune", *, splits="default", **settings):
        config = load_config(f"{stage}:atto,drawn")
        config.data.root = str(folder.parent)
        config.data.splits = splits
        config.update_from_flattened_dict(settings)
        print_ = open_split(folder, "train", splits=splits).fingerprint
        write_run_info(tmp_path / name, config, data_fingerprint=print_, parameters=1)
        return tmp_path / name

    return write


def later(start, root, **settings):
    """The config of a fine-tuning that starts from `start`, on the default splits."""
    config = load_config("finetune:atto,drawn")
    config.data.root, config.init_from = str(root), str(start)
    config.update_from_flattened_dict(settings)
    return config


def test_validation_faces_whose_ages_were_told_before_are_found(folder, chain, tmp_path):
    validation = open_split(folder, "validation")
    names = validation.labels["pixel_hash"]
    in_fold = np.array([name in hashes(folder, splits="fold0") for name in names])
    assert 0 < in_fold.sum() < len(names)

    def told(config, run="new"):
        before = told_before(config, tmp_path / run, folder, own=validation.fingerprint)
        return before.among(validation).tolist()

    nobody = [False] * len(names)
    fold = chain("fold", splits="fold0")
    for start, expected in (
        ("", nobody),
        (chain("simclr", "pretrain", splits="fold0"), nobody),
        (chain("same"), nobody),
        (fold, in_fold.tolist()),
        (chain("behind", init_from=str(fold)), in_fold.tolist()),
    ):
        assert told(later(start, folder.parent)) == expected
    taught = {"distill.teachers": str(fold)}
    assert told(later("", folder.parent, **taught)) == in_fold.tolist()
    # A run remembers the stages before, whose folders may be gone.
    run = chain("begun", init_from=str(fold))
    shutil.rmtree(fold)
    assert told(later(fold, folder.parent), run.name) == in_fold.tolist()
    assert told(later(fold, folder.parent)) == nobody  # nothing tells it any more


def test_a_release_remembers_what_it_was_told_where_the_table_is_gone(folder, chain, tmp_path):
    fold = chain("fold", splits="fold0")
    write_record(fold, fold, folder, "fold0")
    (fold / "run.json").write_text(json.dumps({"data_fingerprint": "of other data"}))
    config = later(fold, folder.parent)
    test = open_split(folder, "test")
    before = told_before(config, tmp_path / "new", folder, own=test.fingerprint)
    both = [name in hashes(folder, splits="fold0") for name in test.labels["pixel_hash"]]
    assert before.among(test).tolist() == both and 0 < sum(both) < len(test)
    run = chain("run", init_from=str(fold))
    trained = open_training_set(run, folder, "default")
    assert len(trained.validation) < len(open_split(folder, "validation"))
    assert not before.among(trained.validation).any()
    with pytest.raises(ValueError, match=f"^{sum(both)} of the {len(test)} .* of a released model"):
        trained.check(test, run_dir=run, folder=folder)


def test_a_run_was_told_its_own_training_faces_and_those_of_stages_before(folder, chain):
    def told(run):
        whole = open_split(folder, "all")
        found = told_so_far(run, folder).among(whole)
        return set(np.array(whole.labels["pixel_hash"])[found])

    own, before = hashes(folder), hashes(folder, splits="fold0")
    simclr = chain("simclr", "pretrain")
    assert told(simclr) == set()
    older = json.loads((simclr / "config.json").read_text())
    del older["method"]  # which was SimCLR, the only one there was
    (simclr / "config.json").write_text(json.dumps(older))
    assert told(simclr) == set()
    fold = chain("fold", splits="fold0")
    assert told(fold) == before
    run = chain("run", init_from=str(fold))
    assert told(run) == own | before > own
    assert told(chain("supcon", "pretrain", method="supcon")) == own
    assert told(chain("simclr again", "pretrain", init_from=str(fold))) == before
    # A release's record is enough.
    write_record(run, run, folder, "default")
    shutil.rmtree(fold)
    (run / "run.json").write_text(json.dumps({"data_fingerprint": "of other data"}))
    assert told(run) == own | before
    (run / training_set.FILE).unlink()
    with pytest.raises(ValueError, match="prepare the data as they were"):
        told_so_far(run, folder)


def test_no_face_that_was_told_chooses_the_checkpoint(folder, chain, tmp_path, capsys):
    fold = chain("fold", splits="fold0")
    config, whole = later(fold, folder.parent), open_split(folder, "validation")
    setting = open_finetuning(config, tmp_path / "new")
    left = set(setting.validation_faces.labels["pixel_hash"])
    assert left == hashes(folder, "validation") - hashes(folder, splits="fold0")
    out = capsys.readouterr().out
    assert f"{len(whole) - len(left)} of the {len(whole)} validation faces are left out" in out
    assert "such stages had the splits fold0, this one has default" in out
    assert "evaluate will refuse them" in out
    everyone = (folder / "splits/default.csv").read_text()
    everyone = everyone.replace(",test", ",train").replace(",validation", ",train")
    (tmp_path / "data").mkdir()
    copy = shutil.copytree(folder, tmp_path / "data" / "drawn")
    (copy / "splits/all.csv").write_text(everyone)
    told = {"data_fingerprint": open_split(copy, "train", splits="all").fingerprint}
    write_run_info(tmp_path / "all", later("", copy.parent, **{"data.splits": "all"}),
                   parameters=1, **told)  # fmt: skip
    with pytest.raises(ValueError, match="no validation face .* had the splits all, this"):
        open_finetuning(later(tmp_path / "all", copy.parent), tmp_path / "new")

"""Which faces a run was trained on, found by fingerprint in data that were prepared again."""

import json
import shutil
from dataclasses import replace
from functools import partial

import pytest

from coatnet_jax.config import load_config
from coatnet_jax.leaks import check_no_leak, check_stages_before, open_trained, trained_on
from coatnet_jax.logs import write_run_info
from input_pipeline.pipeline import open_split


@pytest.fixture
def folder(drawn_root, tmp_path):
    shutil.copytree(drawn_root / "drawn", tmp_path / "drawn")
    return tmp_path / "drawn"


def write_run(run_dir, fingerprint):
    run_dir.mkdir(exist_ok=True)
    (run_dir / "run.json").write_text(json.dumps({"data_fingerprint": fingerprint}))
    return run_dir


def test_splits_are_found_by_fingerprint_under_another_name(folder, tmp_path):
    assert open_trained(tmp_path, folder, "default")[1] == "default"  # a run that tells none
    fold = open_split(folder, "train", splits="fold3").fingerprint
    run = write_run(tmp_path / "run", fold)
    for named in ("fold3", "default"):
        train, splits = open_trained(run, folder, named)
        assert (train.split, train.fingerprint, splits) == ("train", fold, "fold3")


def test_tables_without_a_training_split_are_passed_over(folder, tmp_path):
    run = write_run(tmp_path / "run", open_split(folder, "train", splits="fold3").fingerprint)
    header, *rows = (folder / "splits/default.csv").read_text().splitlines()
    tests = [row for row in rows if ",test" in row]
    (folder / "splits/a_benchmark.csv").write_text("\n".join([header, *tests]))
    assert open_trained(run, folder, "default")[1] == "fold3"


def test_data_that_the_run_was_not_trained_on_are_refused(folder, tmp_path):
    run = write_run(tmp_path / "run", "0123456789abcdef0")
    with pytest.raises(ValueError, match="fingerprint 0123456789abcdef, but .* no other") as error:
        open_trained(run, folder, "default")
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="nothing can be said of overlap"):
        open_trained(run, tmp_path / "gone", "default")


def test_only_faces_of_the_training_split_are_a_leak(folder, tmp_path):
    train = open_split(folder, "train")
    for split in ("test", "validation", "validation+test"):
        found = check_no_leak(open_split(folder, split), train, run_dir=tmp_path)
        assert found["identical"] == 0 and found["training_faces"] == len(train)
    for split, splits in (("train", "default"), ("all", "default"), ("test", "fold0")):
        faces = open_split(folder, split, splits=splits)
        both = len(set(faces.labels["pixel_hash"]) & set(train.labels["pixel_hash"]))
        with pytest.raises(ValueError, match=f"^{both} of the {len(faces)} faces"):
            check_no_leak(faces, train, run_dir=tmp_path)


def test_copies_are_forgiven_within_one_table_alone(folder, tmp_path):
    train, test = (open_split(folder, name) for name in ("train", "test"))
    hashes = test.labels["pixel_hash"].copy()
    hashes[[0, 4]] = train.labels["pixel_hash"][[5, 9]]
    copies = replace(test, labels=test.labels | {"pixel_hash": hashes})
    assert trained_on(copies, train).nonzero()[0].tolist() == [0, 4]
    assert check_no_leak(copies, train, run_dir=tmp_path)["identical"] == 2
    elsewhere = replace(copies, fingerprint="of another table")
    with pytest.raises(ValueError, match=f"^2 of the {len(test)} faces"):
        check_no_leak(elsewhere, train, run_dir=tmp_path)


def test_stages_before_may_have_seen_the_pictures_but_not_their_ages(folder, tmp_path, capsys):
    fingerprints = {
        name: open_split(folder, "train", splits=name).fingerprint for name in ("default", "fold0")
    }

    def seen(*stages, splits="default", **changed):
        stages = [
            {"data": "drawn", "splits": name, "fingerprint": fingerprints[name], **stage, **changed}
            for name, stage in stages
        ]
        (tmp_path / "run.json").write_text(json.dumps({"before": stages}))
        return check_stages_before(
            open_split(folder, "test", splits=splits),
            tmp_path,
            folder,
            fingerprint=fingerprints[splits],
        )

    simclr, tuned = {"stage": "pretrain", "method": "simclr"}, {"stage": "finetune"}
    test, other = (
        set(open_split(folder, split, splits=splits).labels["pixel_hash"])
        for split, splits in (("test", "default"), ("train", "fold0"))
    )
    both = len(test & other)
    assert 0 < both < len(test)
    assert seen(("default", simclr), ("default", tuned)) == []  # what check_no_leak looks at
    for stage in (simclr, {"stage": "pretrain"}):  # one without a method is older: SimCLR
        told = {"stage": "pretrain", "data": "drawn", "splits": "fold0", "seen": both}
        assert seen(("fold0", stage), ("default", tuned)) == [told]
    for stage in (tuned, {"stage": "pretrain", "method": "supcon"}):
        with pytest.raises(
            ValueError, match=f"^{both} of the {len(test)} faces .* 'fold0' of drawn, of a "
        ):
            seen(("fold0", stage))
    (told,) = seen(("fold0", tuned), data="elsewhere")
    assert told["seen"] is None
    folder.with_name("twin").symlink_to(folder)  # the same faces under another name
    with pytest.raises(ValueError, match=f"^{both} of the {len(test)} faces .* 'fold0' of twin"):
        seen(("fold0", tuned), data="twin")
    assert seen(("fold0", tuned), fingerprint="of old")[0]["seen"] is None  # another table now
    assert seen(("fold0", tuned), splits="fold0") == []


def test_ages_that_a_teacher_was_told_are_a_leak(folder, tmp_path):
    fingerprints = {
        name: open_split(folder, "train", splits=name).fingerprint for name in ("default", "fold0")
    }

    def write(name, *, splits="default", teachers=()):
        config = load_config("finetune:atto,drawn")
        config.data.splits = splits
        config.distill.teachers = ",".join(str(tmp_path / teacher) for teacher in teachers)
        told = {"data_fingerprint": fingerprints[splits], "parameters": 1}
        write_run_info(tmp_path / name, config, **told)

    def check(name):
        own = {"fingerprint": fingerprints["default"]}
        return check_stages_before(open_split(folder, "test"), tmp_path / name, folder, **own)

    write("alike")
    write("other", splits="fold0")
    write("taught", teachers=["alike"])
    write("cheat", teachers=["alike", "other"])
    write("taught_by_cheat", teachers=["cheat"])
    assert check("taught") == []
    refused = partial(pytest.raises, ValueError, match=r"of the 24 faces .* 'fold0' of drawn")
    for name in ("cheat", "taught_by_cheat"):
        with refused():
            check(name)
        (tmp_path / name / "run.json").unlink()  # config.json still names the teachers
        with refused():
            check(name)


def test_lost_stages_are_not_known(folder, tmp_path, capsys):
    config = load_config("finetune:atto,drawn")
    config.init_from = str(tmp_path / "gone")
    (tmp_path / "config.json").write_text(config.to_json())
    faces = open_split(folder, "test")
    assert check_stages_before(faces, tmp_path, folder, fingerprint="of the run") is None
    assert "not known whether an earlier stage" in capsys.readouterr().out


def test_all_splits_are_all_faces(folder):
    parts = [open_split(folder, name) for name in ("train", "validation", "test")]
    assert len(open_split(folder, "all")) == sum(map(len, parts)) == 160

"""A run as a folder to hand on: the same answers, no paths of the machine, a model card."""

import csv
import json
import math
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from coatnet_jax import main as main_module
from coatnet_jax import predict, pretrained, release, release_weights
from coatnet_jax.checkpoint import check_unused, load_variables
from coatnet_jax.config import load_config, read_config
from coatnet_jax.lineage import stages_before
from coatnet_jax.main import main
from coatnet_jax.release_card import release_card
from coatnet_jax.training_set import FILE as RECORD

METRICS = {
    "split": "test",
    "images": 40,
    "mae": 6.5,
    "mae_interval": [6.0, 7.0],
    "median_error": 5.0,
    "cs5": 0.5,
    "cs5_interval": [0.4, 0.6],
    "accuracy": 0.75,
    "accuracy_interval": [0.7, 0.8],
    "balanced_accuracy": 0.6,
    "balanced_accuracy_interval": [0.5, 0.7],
    "baseline": {"mae": 15.0, "cs5": 0.3, "accuracy": 0.54, "balanced_accuracy": 0.25},
    "groups": [
        {"by": "age", "group": "0–9", "support": 9, "mae": 3.25, "mae_interval": [2.0, 4.0],
         "bias": 1.5},
        {"by": "age", "group": "80–89", "support": 1, "mae": 7.25, "mae_interval": None,
         "bias": -7.25},
        {"by": "age", "group": "90–99", "support": 0, "mae": None, "mae_interval": None,
         "bias": None},
        {"by": "gender × race", "group": "other", "support": 9, "mae": 9.99,
         "mae_interval": [2.0, 4.0], "bias": 1.5},
    ],
    "calibration": {"ece": 0.021},
    "conformal": {"constants": {"years": 1.0}, "covered": 0.91, "width": 25.0},
    "trained_on": {"same_data": True},
    "environment": {"command": "coatnet-jax evaluate /home/me/runs", "git_revision": "abc"},
    "run": "/home/me/runs/a",
    "data": "/home/me/data/utkface",
}  # fmt: skip


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    """A fine-tuning run's folder without its checkpoints, pre-trained by another."""
    pretrain, run = tmp_path / "pretrain", tmp_path / "run"
    for folder, spec in ((pretrain, "pretrain:atto"), (run, "finetune:atto")):
        folder.mkdir()
        config = load_config(spec)
        config.data.root = "/home/me/data"
        if folder == run:
            config.init_from = str(pretrain)
        (folder / "config.json").write_text(config.to_json())
    told = {"parameters": 400_000, "data_fingerprint": "f" * 64, "git_revision": "abc"}
    told |= {"devices": ["cpu cpu"], "wall_seconds": 120.0, "command": "train /home/me"}
    (run / "run.json").write_text(json.dumps(told))
    monkeypatch.setattr(release, "write_record", lambda out, *_: (out / RECORD).write_text("kept"))
    return run


@pytest.fixture
def variables():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return {
        "params": {"backbone": {"stem": {"kernel": draw(3, 3)}}, "age": {"bias": draw(5)}},
        "batch_stats": {"backbone": {"stem": {"mean": draw(3)}}},
    }


def test_weights_come_back_rounded_to_bfloat16(tmp_path, variables):
    release_weights.save_weights(tmp_path, release_weights.pack_weights(variables, step=7))
    for which in ("best", "latest", "7"):
        loaded, step = load_variables(tmp_path, which=which)
        assert step == 7
    expected = {
        "params": jax.tree.map(
            lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), variables["params"]
        ),
        "batch_stats": variables["batch_stats"],
    }
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)
    assert loaded["params"]["age"]["bias"].dtype == np.float32
    with pytest.raises(ValueError, match="it holds step 7 alone"):
        load_variables(tmp_path, which="3")


def test_files_that_are_no_release_are_refused(tmp_path, variables):
    path = tmp_path / release_weights.FILE
    save_file({"x": np.zeros(3)}, path)
    with pytest.raises(ValueError, match="not written by coatnet-jax release"):
        load_variables(tmp_path)
    path.write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match="neither .safetensors nor"):
        load_variables(tmp_path)


def test_release_holds_no_path_of_the_machine(run_dir, variables, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def evaluated(folder, data, **options):
        assert (folder.name, data) == (out.name, tmp_path / "data")
        assert options["called"] == out  # on the page, which is kept; the scratch folder is not
        assert not out.exists()  # until all is done
        assert load_variables(folder)[1] == 9  # what is measured is what was written
        return METRICS

    monkeypatch.setattr(release, "load_variables", lambda *_: (variables, 9))
    monkeypatch.setattr(release, "evaluate", SimpleNamespace(run=evaluated))
    release.write_release(run_dir, tmp_path / "data", out)
    assert sorted(path.name for path in out.iterdir()) == [
        "MODEL_CARD.md", "config.json", "evaluation.json", "run.json",
        "training_faces.safetensors", "weights.safetensors",
    ]  # fmt: skip
    for path in out.iterdir():
        for private in ("/home/me", str(tmp_path)):
            assert private.encode() not in path.read_bytes(), path.name
    assert read_config(out / "config.json").model.name == "coatnet_atto"
    run = json.loads((out / "run.json").read_text())
    (before,) = run["before"]
    assert (before["method"], before["epochs"], before["image_size"]) == ("simclr", 100.0, 112)
    card = (out / "MODEL_CARD.md").read_text()
    split = "112 | the training split of `utkface` |"
    rows = f"from random weights | 100 | {split}\n| fine-tuning, stopped at step 9 | 60 | {split}"
    assert rows in card and "No outside weights or labels. Seed" in card


def test_a_release_is_told_where_its_weights_come_from(run_dir, variables, tmp_path, monkeypatch):
    monkeypatch.setattr(release, "evaluate", SimpleNamespace(run=lambda *_, **__: METRICS))
    monkeypatch.setattr(release, "load_variables", lambda *_: (variables, 9))
    told = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps(told | {"averaged": 3, "finished": True}))
    release.write_release(run_dir, "data", tmp_path / "once")
    release.write_release(tmp_path / "once", "data", tmp_path / "twice")
    cards = [(tmp_path / name / "MODEL_CARD.md").read_text() for name in ("once", "twice")]
    assert cards[0] == cards[1]
    assert "the mean of 3 such runs" in cards[0] and "pre-training, `simclr`" in cards[0]
    (run_dir / "run.json").write_text(json.dumps(told))
    release.write_release(run_dir, "data", tmp_path / "stopped")
    card = (tmp_path / "stopped" / "MODEL_CARD.md").read_text()
    assert "| fine-tuning, stopped at step 9 | 60 |" in card


def test_card_names_the_teachers_and_the_release_has_no_path_of_theirs(
    run_dir, variables, tmp_path, monkeypatch
):
    monkeypatch.setattr(release, "evaluate", SimpleNamespace(run=lambda *_, **__: METRICS))
    monkeypatch.setattr(release, "load_variables", lambda *_: (variables, 9))
    config, teachers = read_config(run_dir / "config.json"), []
    for i, model in enumerate(("micro", "atto", "micro")):
        theirs = load_config(f"finetune:{model}")
        theirs.init_from = config.init_from
        teachers.append(tmp_path / f"teacher{i}")
        teachers[i].mkdir()
        (teachers[i] / "config.json").write_text(theirs.to_json())
    config.distill.teachers = ", ".join(map(str, teachers))
    for init_from, own in (
        (config.init_from, "| fine-tuning, stopped"),
        ("", "| fine-tuning, from random"),
    ):
        config.init_from = init_from
        (run_dir / "config.json").write_text(config.to_json())
        for source, name in (run_dir, "once"), (tmp_path / "once", "twice"):
            release.write_release(source, "data", tmp_path / name)
            card = (tmp_path / name / "MODEL_CARD.md").read_text()
            assert own in card and "No outside weights" in card
            assert "Distilled from coatnet_micro and coatnet_atto, whose answers are mixed" in card
            assert card.count("\n| coatnet_micro: ") == 4 and card.count("\n| coatnet_atto: ") == 2
    for path in (tmp_path / "twice").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name
    released = read_config(tmp_path / "twice" / "config.json")
    assert (released.distill.teachers, released.distill.weight) == ("", 0.5)
    marks = [before["teacher"] for before in stages_before(tmp_path / "twice")]
    assert marks == [f"coatnet_{x}" for x in ("micro", "micro", "atto", "atto", "micro", "micro")]


def test_a_release_spoils_no_run(run_dir, variables, tmp_path, monkeypatch):
    monkeypatch.setattr(release, "load_variables", lambda *_: (variables, 9))
    other = tmp_path / "other"
    (other / "checkpoints").mkdir(parents=True)
    for out in (run_dir, other):
        with pytest.raises(ValueError, match="folder of a run, which this would ruin"):
            release.write_release(run_dir, "data", out)
    for path in (other, tmp_path / "new"):
        path.mkdir(exist_ok=True)
        release_weights.save_weights(path, release_weights.pack_weights(variables, step=1))
    for path, holds in ((other, "a run"), (tmp_path / "new", "a released model")):
        with pytest.raises(ValueError, match=f"holds {holds} already; give a new --workdir"):
            check_unused(path, flag="--workdir")


def test_a_release_does_not_lie_where_its_report_goes(run_dir, variables, monkeypatch):
    monkeypatch.setattr(release, "evaluate", SimpleNamespace(run=lambda *_, **__: METRICS))
    monkeypatch.setattr(release, "load_variables", lambda *_: (variables, 9))
    with pytest.raises(ValueError, match="report .* names every face; give another --out"):
        release.write_release(run_dir, "data", run_dir / "released")
    assert not (run_dir / "released").exists()


def test_a_release_that_cannot_be_told_from_its_data_leaves_the_one_before(
    run_dir, variables, tmp_path, monkeypatch
):
    monkeypatch.setattr(release, "evaluate", SimpleNamespace(run=lambda *_, **__: METRICS))
    monkeypatch.setattr(release, "load_variables", lambda *_: (variables, 9))
    out = tmp_path / "out"
    release.write_release(run_dir, "data", out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(release, "load_variables", lambda *_: (variables, 10))

    def missing(*_, **__):
        raise FileNotFoundError("prepare it")

    broken = SimpleNamespace(run=missing)
    for where, stand_in in (("evaluate", broken), ("write_record", missing)):
        monkeypatch.setattr(release, where, stand_in)
        with pytest.raises(FileNotFoundError, match="prepare it"):
            release.write_release(run_dir, "data", out)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert not list(tmp_path.glob(".release-*"))


def test_other_sets_are_evaluated_again_with_the_released_weights(
    run_dir, variables, tmp_path, monkeypatch
):
    monkeypatch.setattr(release, "load_variables", lambda *_: (variables, 9))
    wild = METRICS | {"data_name": "wild", "split": "all", "splits": "default", "step": 9}
    wild |= {"trained_on": {"same_data": False}}
    (run_dir / "evaluate/wild-all").mkdir(parents=True)
    (run_dir / "evaluate/wild-all/metrics.json").write_text(json.dumps(wild))
    (tmp_path / "data/wild").mkdir(parents=True)

    def evaluated(folder, data, **options):
        assert release_weights.is_released(folder)
        if data.name == "utkface":
            return METRICS
        assert options["training_folder"] == tmp_path / "data/utkface"
        assert (data.name, options["split"], options["splits"]) == ("wild", "all", "default")
        return wild | {"mae": 8.25}

    monkeypatch.setattr(release, "evaluate", SimpleNamespace(run=evaluated))
    release.write_release(run_dir, tmp_path / "data/utkface", tmp_path / "out")
    assert (
        "| wild, all | 40 | 8.25 | 75.0 % | 91.0 % |"
        in (tmp_path / "out/MODEL_CARD.md").read_text()
    )


def test_files_of_something_else_are_not_replaced(run_dir, variables, tmp_path, monkeypatch):
    monkeypatch.setattr(release, "evaluate", SimpleNamespace(run=lambda *_, **__: METRICS))
    monkeypatch.setattr(release, "load_variables", lambda *_: (variables, 9))
    mine = tmp_path / "project"
    mine.mkdir()
    (mine / "config.json").write_text("mine")
    with pytest.raises(ValueError, match="holds config.json of something else than a release"):
        release.write_release(run_dir, "data", mine)
    assert [(path.name, path.read_text()) for path in mine.iterdir()] == [("config.json", "mine")]


def test_a_release_that_does_not_fit_leaves_the_one_before(
    run_dir, variables, tmp_path, monkeypatch
):
    monkeypatch.setattr(release, "evaluate", SimpleNamespace(run=lambda *_, **__: METRICS))
    monkeypatch.setattr(release, "load_variables", lambda *_: (variables, 9))
    out = tmp_path / "out"
    variables["params"]["head"] = {"kernel": np.ones((128, 128), np.float32)}
    release.write_release(run_dir, "data", out)
    (out / RECORD).write_text("of before")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for max_mb, said in (
        (1e-4, "allow as much"),
        (0, "over 0"),
        (-1, "over 0"),
        (math.nan, "over"),
    ):
        with pytest.raises(ValueError, match=said):
            release.write_release(run_dir, "data", out, max_mb=max_mb)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
        with pytest.raises(ValueError, match=said):
            release.write_release(run_dir, "data", tmp_path / "new", max_mb=max_mb)
        assert not (tmp_path / "new").exists()


def test_a_smaller_release_says_so_and_computes_in_float32(
    run_dir, variables, tmp_path, monkeypatch
):
    monkeypatch.setattr(release, "evaluate", SimpleNamespace(run=lambda *_, **__: METRICS))
    monkeypatch.setattr(release, "load_variables", lambda *_: (variables, 9))
    kernel = np.random.default_rng(0).normal(size=(128, 128))
    variables["params"]["head"] = {"kernel": kernel.astype(np.float32)}
    config = read_config(run_dir / "config.json")
    config.model.dtype, config.model.attention = "bfloat16", "cudnn"
    (run_dir / "config.json").write_text(config.to_json())
    monkeypatch.setattr(main_module, "_data_of", lambda *_, **__: "data")
    for name, options in (("whole", ["--max-mb=0.04"]), ("small", ["--max-mb=0.015"])):
        with pytest.raises(SystemExit) as end:
            main(["release", str(run_dir), f"--out={tmp_path / name}", *options])
        assert end.value.code == 0
    # Rounded once, it stays so.
    monkeypatch.setattr(release, "load_variables", load_variables)
    release.write_release(tmp_path / "small", "data", tmp_path / "again")
    for name, file, kept_in in (
        ("whole", "weights.safetensors", "bfloat16"),
        ("small", "weights.safetensors.gz", "8-bit integers"),
        ("again", "weights.safetensors", "8-bit integers"),
    ):
        out = tmp_path / name
        assert release_weights.weights_file(out).name == file
        card = (out / "MODEL_CARD.md").read_text()
        assert f"kept in {kept_in}. Its answer" in card
        model = read_config(out / "config.json").model
        assert (model.dtype, model.attention) == ("float32", "xla")


def test_evaluations_made_in_another_way_are_left_out_of_the_card(run_dir, tmp_path, capsys):
    cases = (
        *(("test", 9, True, True), ("wild-all", 9, True, False)),
        *(("old-all", 3, True, False), ("plain-all", 9, False, False)),
        ("gone-all", 9, True, False),
    )
    for name, step, flip, same in cases:
        folder = run_dir / "evaluate" / name
        folder.mkdir(parents=True)
        told = {"step": step, "flip": flip, "trained_on": {"same_data": same}, "data_name": name}
        (folder / "metrics.json").write_text(json.dumps(told))
    (tmp_path / "data/wild-all").mkdir(parents=True)
    released = {"step": 9, "flip": True, "sides": [1.0]}
    found = release._other_sets(run_dir, released, tmp_path / "data/utkface")
    assert [result["data_name"] for result in found] == ["wild-all"]
    printed = capsys.readouterr().out
    assert f"{tmp_path}/data/gone-all is missing" in printed
    assert "old-all has step 3, the release 9: left out" in printed
    assert "plain-all has flip False, the release True: left out" in printed


def test_card_tells_every_stage_that_the_weights_went_through(run_dir):
    again = run_dir.parent / "again"
    again.mkdir()
    config = read_config(run_dir / "config.json")
    config.epochs, config.init_from = 6.0, str(run_dir)
    (again / "config.json").write_text(config.to_json())
    after = again.parent / "after"
    after.mkdir()
    config.init_from = str(again)
    (after / "config.json").write_text(config.to_json())
    before = stages_before(after)
    assert [stage["stage"] for stage in before] == ["pretrain", "finetune", "finetune"]
    run = {"parameters": 1, "data_fingerprint": "f", "git_revision": "abc", "before": before}
    run |= {"devices": ["cpu cpu"], "wall_seconds": 120.0}
    (again / "run.json").write_text(json.dumps({"before": before[:2]}))  # as a release has it
    config.init_from = ""
    (again / "config.json").write_text(config.to_json())
    assert stages_before(after) == before
    card = release_card(config, run, METRICS)
    rows = [line.split(" | ")[:2] for line in card.splitlines() if line.endswith("`utkface` |")]
    assert rows == [
        ["| pre-training, `simclr`, from random weights", "100"],
        ["| fine-tuning", "60"],
        ["| fine-tuning", "6"],
        ["| fine-tuning", "6"],
    ]
    config.init_from = str(run_dir.parent / "gone")
    (after / "config.json").write_text(config.to_json())
    with pytest.raises(ValueError, match="where the weights come from"):
        stages_before(after)


def test_card_names_tables_of_splits_other_than_the_default(run_dir):
    config = read_config(run_dir / "config.json")
    config.data.splits = "82_3_15"
    stage = {"stage": "finetune", "image_size": 64, "data": "utkface", "epochs": 6.0}
    before = [stage, stage | {"splits": "default"}, stage | {"splits": "fold2"}]
    run = {"parameters": 1, "data_fingerprint": "f", "git_revision": "abc", "before": before}
    card = release_card(config, run | {"devices": ["cpu cpu"]}, METRICS)
    assert card.count("| the training split of `utkface` (table of splits `82_3_15`) |") == 1
    assert card.count("| 64 | the training split of `utkface` |") == 2
    assert card.count("| 64 | the training split of `utkface` (table of splits `fold2`) |") == 1


def test_card_of_a_model_from_timms_weights_says_so(tmp_path, run_dir):
    imported = pretrained.run_config(
        "coatnet_nano_rw",
        {"head.fc.weight": np.zeros((1000, 2))},
        {},
        timm_name="coatnet_nano_rw_224",
    )
    (tmp_path / "config.json").write_text(imported.to_json())
    config = read_config(run_dir / "config.json")
    config.init_from = str(tmp_path)
    (run_dir / "config.json").write_text(config.to_json())
    before = stages_before(run_dir)
    run = {"parameters": 1, "data_fingerprint": "f", "git_revision": "abc", "before": before}
    run |= {"devices": ["cpu cpu"], "wall_seconds": 120.0}
    card = release_card(config, run, METRICS)
    assert "timm's `coatnet_nano_rw_224`, outside" in card and "No outside weights" not in card
    assert "random weights" not in card


def test_a_pretraining_is_not_released(tmp_path, run_dir, variables, monkeypatch):
    monkeypatch.setattr(release, "load_variables", lambda *_: (variables, 9))
    with pytest.raises(ValueError, match="is a pretrain run without an age head"):
        release.write_release(run_dir.parent / "pretrain", tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_card_says_results_by_group_terms_and_use():
    run = {"parameters": 3_600_000, "data_fingerprint": "f" * 64, "git_revision": "abc"}
    run |= {"devices": ["cpu cpu"], "wall_seconds": 120.0}
    config = load_config("finetune:micro")
    wild = METRICS | {"data_name": "wild", "split": "all", "images": 1774, "mae": 8.75}
    card = release_card(config, run, METRICS, [wild])
    for text in (
        "from random weights",
        "the mean over the centres of the picture with 100 % and 90 % of its side and the mirror",
        "| mean absolute error, years | 6.50 | 6.00-7.00 | 15.00 |",
        "| 0–9 | 9 | 3.25 (2.00-4.00) | +1.50 |",
        "| 80–89 | 1 | 7.25 | -7.25 |",
        "cover 91.0 % of the ages and are 25.0 years wide",
        "| wild, all | 1,774 | 8.75 | 75.0 % | 91.0 % |",
        "non-commercial research",
        "Do not use it to decide anything about a person",
    ):
        assert text in card, text
    assert "90–99" not in card  # no face
    assert "9.99" not in card  # crossings are in evaluation.json


def test_card_tells_of_copies_that_were_trained_on():
    run = {"parameters": 1, "data_fingerprint": "f", "git_revision": "abc", "devices": ["cpu"]}
    config = load_config("finetune:micro")
    assert "split, none of them trained on; with 95 %" in release_card(config, run, METRICS)
    rest = {"images": 38, "mae": 7.25, "mae_interval": [6.5, 8.0], "cs5": 0.4, "accuracy": 0.7}
    torn = {"leak_check": {"identical": 2}, "splits": "theirs", "without_copies": rest}
    card = release_card(config, run, METRICS | torn)
    assert "none of them trained on" not in card
    assert "2 of these faces are pixel-identical copies of training faces" in card
    assert "The other 38: MAE 7.25 years" in card


@pytest.mark.parametrize("small", [False, True])
def test_the_packaged_models_are_small_and_answer(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COATNET_JAX_HOME", str(tmp_path / "home"))
    folder = release_weights.SMALL if small else release_weights.PACKAGED
    assert release_weights.weights_file(folder).stat().st_size <= 12e6
    card = (folder / "MODEL_CARD.md").read_text()
    assert "non-commercial research" in card and "## Limits" in card
    crop = tmp_path / "a.png"
    Image.fromarray(np.full((120, 120, 3), 128, np.uint8)).save(crop)
    options = ["--small"] if small else []
    with pytest.raises(SystemExit) as end:
        main(["predict", str(crop), "--no-detect", f"--out={tmp_path}/out", *options])
    assert end.value.code == 0
    assert f"answered by {folder}, step" in capsys.readouterr().out
    (row,) = csv.DictReader((tmp_path / "out/predictions.csv").read_text().splitlines())
    assert row["interval"] == "conformal"
    assert 0 <= float(row["low"]) <= float(row["age"]) <= float(row["high"]) <= 116


def test_a_run_is_told_from_pictures(run_dir, tmp_path, capsys):
    photo = tmp_path / "a.jpg"
    assert predict.split_run([run_dir, photo]) == (run_dir, [photo])
    config = (run_dir / "config.json").rename(
        tmp_path / "kept.json"
    )  # it stays a run, though a damaged one
    assert predict.split_run([run_dir, photo]) == (run_dir, [photo])
    assert predict.split_run([photo]) == (None, [photo])
    assert predict.split_run([tmp_path, photo]) == (None, [tmp_path, photo])
    for other in ('{"model_type": "vit"}', "[1]", "no JSON"):  # of another program
        (tmp_path / "config.json").write_text(other)
        assert predict.split_run([tmp_path, photo]) == (None, [tmp_path, photo])
    config.rename(tmp_path / "config.json")  # all that is left of a run
    assert predict.split_run([tmp_path, photo]) == (tmp_path, [photo])
    for command in (["predict", str(run_dir), "a.jpg", "--no-detect"], ["evaluate", str(run_dir)]):
        with pytest.raises(SystemExit) as end:
            main([*command, "--small"])
        assert end.value.code == 1
        assert f"{run_dir} and --small are two models" in capsys.readouterr().err

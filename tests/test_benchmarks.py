"""The parts of `benchmarks/` that choose what is compared; what they measure is not tested."""

import argparse
import csv
import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest

from coatnet_jax.checkpoint import FOLDER
from coatnet_jax.logs import write_run_info
from coatnet_jax.paths import data_folder
from coatnet_jax.xla_flags import ROLLED_LOOPS
from input_pipeline.pipeline import open_split


@pytest.fixture(scope="module")
def label_efficiency():
    path = Path(__file__).parents[1] / "benchmarks" / "label_efficiency.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def arguments(drawn_root) -> argparse.Namespace:
    return argparse.Namespace(
        **{"model": "atto", "name": "drawn", "root": str(drawn_root), "image_size": 32},
        **{"pretrained": "", "steps": 40, "batch_size": 8, "lr": 2e-3, "layer_decay": 0.9},
    )


@pytest.mark.parametrize("percent", [10, 100])
def test_a_run_of_few_labels_has_its_steps_and_its_share(
    label_efficiency, arguments, percent, tmp_path
):
    whole = len(open_split(data_folder("drawn", arguments.root), "train"))
    config = label_efficiency.few_labels_config(arguments, "scratch", percent, 0)
    setting = label_efficiency.few_labels(config, percent, tmp_path / "run")
    assert len(setting.train_faces) == round(whole * percent / 100)
    assert setting.schedule.total_steps == 40
    assert setting.schedule.evaluate_every == 10


def test_a_stopped_run_of_few_labels_is_recognised(label_efficiency, arguments, tmp_path):
    workdir = tmp_path / "run"
    config = label_efficiency.few_labels_config(arguments, "scratch", 10, 0)
    begun = label_efficiency.few_labels(config, 10, workdir)
    write_run_info(workdir, begun.config, data_fingerprint="", parameters=1)
    (workdir / FOLDER).mkdir()
    config = label_efficiency.few_labels_config(arguments, "scratch", 10, 0)
    again = label_efficiency.few_labels(config, 10, workdir)
    assert again.schedule == begun.schedule
    np.testing.assert_array_equal(again.train_faces.labels["age"], begun.train_faces.labels["age"])


def test_a_finished_run_of_other_settings_is_not_taken_for_this_one(
    label_efficiency, arguments, tmp_path
):
    arguments.out, arguments.split = str(tmp_path), "test"
    workdir = tmp_path / "drawn-atto-32px-40steps" / "pretrained-10-0"
    evaluated = workdir / "evaluate" / "test"
    evaluated.mkdir(parents=True)
    (evaluated / "predictions.csv").write_text("file,age,predicted\na.jpg,20,23.5\n")
    config = label_efficiency.few_labels_config(arguments, "pretrained", 10, 0)
    write_run_info(workdir, config, data_fingerprint="", parameters=1)
    assert label_efficiency.run_errors(arguments, "pretrained", 10, 0).tolist() == [3.5]
    arguments.pretrained = "runs/another"
    with pytest.raises(SystemExit, match="init_from '' there, 'runs/another' here.* a new --out"):
        label_efficiency.run_errors(arguments, "pretrained", 10, 0)


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("task", ["build", "train"])
def test_speed_is_told_of_the_contenders_that_run(task, at_once, capsys, monkeypatch):
    model_speed = importlib.import_module("model_speed")

    class Process:
        compile_seconds = {"forward": 1.0, "train": 1.0}

        def __init__(self, make, *arguments):
            self.fails = make is model_speed.Timm and not arguments[-1]  # as PyTorch comes

        def wait(self):
            self.ask("build")

        def ask(self, request, *_):
            if self.fails and request == task:
                raise RuntimeError("out of memory")
            return {"device": "cpu"}.get(request, 1.0)

        def close(self):
            pass

    monkeypatch.setattr(model_speed, "Process", Process)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    monkeypatch.setattr(model_speed, "_has_cuda", lambda: False)
    options = {"size": 32, "batch": 2, "dtype": "float32", "rounds": 1}
    model_speed.compare("coatnet_0", **options, scan=False, cudnn=False, at_once=at_once)
    printed = capsys.readouterr().out
    assert printed.count("timm is left out: out of memory") == 1
    assert "| ours | train | 500.00 | 2.0 | - |" in printed and "| timm |" not in printed
    assert "| timm, our allocator | train |" in printed


def test_compiling_is_timed_with_and_without_unrolled_loops(capsys, monkeypatch):
    compile_speed = importlib.import_module("compile_speed")
    slow = iter([1.0, 9.0, 5.0])  # of unrolled loops, by round

    class Process:
        def __init__(self, make, *arguments):
            rolled, scan = ROLLED_LOOPS in os.environ["XLA_FLAGS"], arguments[-1]
            seconds = 2.0 if rolled else 7.0 if scan else next(slow)
            self.compile_seconds = {"forward": 100.0, "train": seconds}

        def wait(self):
            pass

        def close(self):
            pass

    monkeypatch.setattr(compile_speed, "Process", Process)
    monkeypatch.setenv("XLA_FLAGS", f"--xla_backend_extra_options={ROLLED_LOOPS}")  # of the shell
    monkeypatch.setattr("sys.argv", ["compile_speed.py", "--rounds", "3"])
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")
    compile_speed.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row for row in rows if "5.0" in row and "2.50" in row]
    assert [row for row in rows if "7.0" in row and "3.50" in row]


def test_the_peer_sees_the_very_faces_that_were_evaluated(
    drawn_root, tmp_path, capsys, monkeypatch
):
    test_split = importlib.import_module("test_split")
    folder = data_folder("drawn", drawn_root)
    default, faces = (open_split(folder, "test", splits=name) for name in ("default", "fold1"))
    assert set(default.labels["file"]) != set(faces.labels["file"])
    told = {"baseline": {"median_age": 30}, "splits": "fold1"}
    (tmp_path / "metrics.json").write_text(json.dumps(told))
    with (tmp_path / "predictions.csv").open("w", newline="") as lines:
        rows = csv.writer(lines)
        rows.writerow(("file", "predicted", "low", "high"))
        rows.writerows(
            (file, age + 1, age, age + 2)
            for file, age in zip(faces.labels["file"], faces.labels["age"], strict=True)
        )
    monkeypatch.setattr(test_split, "load", lambda: (lambda image: [], lambda image: 30))
    argv = ["test_split.py", str(tmp_path), f"--root={drawn_root}", "--name=drawn"]
    monkeypatch.setattr("sys.argv", argv)
    test_split.main()
    printed = capsys.readouterr().out
    ours = next(line.split("|") for line in printed.splitlines() if line.startswith("| ours"))
    assert [cell.strip() for cell in ours[2:4]] == [str(len(faces)), "1.00"]
    assert f"found no face in {len(faces)} crops" in printed


def test_few_labels_are_spread_over_the_ages(label_efficiency, drawn_root):
    faces = open_split(data_folder("drawn", drawn_root), "train")
    few = label_efficiency.labelled_share(faces, 0.25, seed=0)
    assert len(set(few.records.tolist())) == len(few) == round(len(faces) / 4)
    for age in range(0, 117, 5):  # below any age lie a quarter of those who were there
        share = np.sum(faces.labels["age"] < age) * len(few) / len(faces)
        assert abs(np.sum(few.labels["age"] < age) - share) < 1

"""The parts of `benchmarks/` that choose what is compared; what they measure is not tested."""

import argparse
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from coatnet_jax.checkpoint import FOLDER
from coatnet_jax.logs import write_run_info
from coatnet_jax.paths import data_folder
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
    setting = label_efficiency.few_labels(arguments, "scratch", percent, 0, tmp_path / "run")
    assert len(setting.train_faces) == round(whole * percent / 100)
    assert setting.schedule.total_steps == 40
    assert setting.schedule.evaluate_every == 10


def test_a_stopped_run_of_few_labels_is_recognised(label_efficiency, arguments, tmp_path):
    workdir = tmp_path / "run"
    begun = label_efficiency.few_labels(arguments, "scratch", 10, 0, workdir)
    write_run_info(workdir, begun.config, data_fingerprint="", parameters=1)
    (workdir / FOLDER).mkdir()
    again = label_efficiency.few_labels(arguments, "scratch", 10, 0, workdir)
    assert again.schedule == begun.schedule
    np.testing.assert_array_equal(again.train_faces.labels["age"], begun.train_faces.labels["age"])


def test_few_labels_are_spread_over_the_ages(label_efficiency, drawn_root):
    faces = open_split(data_folder("drawn", drawn_root), "train")
    few = label_efficiency.labelled_share(faces, 0.25, seed=0)
    assert len(set(few.records.tolist())) == len(few) == round(len(faces) / 4)
    for age in range(0, 117, 5):  # below any age lie a quarter of those who were there
        share = np.sum(faces.labels["age"] < age) * len(few) / len(faces)
        assert abs(np.sum(few.labels["age"] < age) - share) < 1

"""Monitors of the latent space against definitions, and metrics sent elsewhere."""

import sys
from types import SimpleNamespace

import ml_collections
import numpy as np
import pytest

from coatnet_jax import pretrain
from coatnet_jax.logs import MetricsLog
from coatnet_jax.ssl.watch import alignment_and_uniformity, collapse_warning, rank_me, spread
from coatnet_jax.tracking import open_trackers


def test_rank_me_counts_the_dimensions_in_use():
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(40, 8)))
    assert rank_me(basis) == pytest.approx(8, rel=1e-3)
    assert rank_me(basis[:, :3] @ rng.normal(size=(3, 8))) < 3.01
    assert rank_me(np.ones((40, 8))) == pytest.approx(1, rel=1e-3)
    values = np.array([3.0, 2.0, 1.0]) / 6
    expected = np.exp(-(values * np.log(values)).sum())
    assert rank_me(basis[:, :3] * [3, 2, 1]) == pytest.approx(expected, rel=1e-4)


def test_spread_is_one_on_the_sphere_and_zero_when_collapsed():
    z = np.random.default_rng(0).normal(size=(2000, 64))
    assert spread(z) == pytest.approx(1, abs=0.01)
    assert spread(np.ones((50, 64))) == pytest.approx(0, abs=1e-6)


def test_alignment_and_uniformity_match_loops():
    z = np.random.default_rng(0).normal(size=(12, 5))
    found = alignment_and_uniformity(z.astype(np.float32))
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    alignment = np.mean([((z[i] - z[i + 6]) ** 2).sum() for i in range(6)])
    uniformity = []
    for view in (z[:6], z[6:]):
        pairs = [(view[i], view[j]) for i in range(6) for j in range(i)]
        uniformity.append(np.log(np.mean([np.exp(-2 * ((a - b) ** 2).sum()) for a, b in pairs])))
    assert float(found["alignment"]) == pytest.approx(alignment, rel=1e-5)
    assert float(found["uniformity"]) == pytest.approx(np.mean(uniformity), rel=1e-5)


@pytest.mark.parametrize(
    ("std", "rank", "words"),
    [(0.01, 40, "to one point"), (0.5, 1.2, "to a line"), (0.05, 40, "narrow"), (0.6, 40, "")],
)
def test_collapse_is_said_in_words(std, rank, words):
    warning = collapse_warning(embedding_std=std, rank_me=rank)
    assert words in warning and bool(warning) == bool(words)


@pytest.mark.parametrize("wrong", [0, 1, 60], ids=["no row", "one row", "all rows"])
def test_features_that_are_no_numbers_give_no_score_and_end_nothing(wrong, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(60, 16)).astype(np.float32)
    z[:wrong] = np.nan
    run = SimpleNamespace(features=lambda images: z[images])
    monkeypatch.setattr(pretrain, "Run", lambda *_, **__: run)
    monitor = {"train_image": np.arange(60), "validation_image": np.arange(59, -1, -1)}
    monitor |= {"train_age": np.arange(60), "validation_age": np.arange(60)}
    setting = SimpleNamespace(config=SimpleNamespace(batch_size=8), mesh=None)
    state = SimpleNamespace(eval_variables={})
    found = pretrain.evaluate(state, monitor=monitor, setting=setting)
    assert set(found) == {"knn_mae", "probe_mae", "embedding_std", "rank_me"}
    assert {bool(np.isnan(value)) for value in found.values()} == {wrong > 0}
    assert ("no numbers" in capsys.readouterr().out) == (wrong > 0)


def test_metrics_go_to_tensorboard_too(tmp_path, monkeypatch):
    written = []
    writer = SimpleNamespace(add_scalar=lambda *row: written.append(row), flush=lambda: None)
    package = SimpleNamespace(SummaryWriter=lambda folder: writer)
    monkeypatch.setitem(sys.modules, "tensorboardX", package)
    config = ml_collections.ConfigDict({"track": "tensorboard"})
    log = MetricsLog(tmp_path, trackers=open_trackers(config, tmp_path))
    log.write(step=3, epoch=0.5, split="train", loss=1.5)
    assert written == [("train/loss", 1.5, 3)]


def test_wandb_runs_go_on_where_they_are_resumed_and_are_others_elsewhere(tmp_path, monkeypatch):
    calls = []

    def init(**told):
        calls.append(told["id"])
        return SimpleNamespace(log=lambda *_, **__: None)

    package = SimpleNamespace(
        init=init, finish=lambda: calls.append("finish"), Error=ConnectionError
    )
    monkeypatch.setitem(sys.modules, "wandb", package)
    config = ml_collections.ConfigDict({"track": "wandb"})
    for folder in ("here/finetune", "here/finetune", "there/finetune"):
        open_trackers(config, tmp_path / folder)
    assert calls[::2] == ["finish"] * 3  # of one process: each is closed before the next
    first, again, elsewhere = calls[1::2]
    assert first == again != elsewhere


def test_wandb_that_refuses_a_run_is_told_in_one_line(tmp_path, monkeypatch):
    class UsageError(Exception):
        pass

    def init(**_):
        raise UsageError("No API key configured.")

    package = SimpleNamespace(init=init, finish=lambda: None, Error=UsageError)
    monkeypatch.setitem(sys.modules, "wandb", package)
    with pytest.raises(ValueError, match="No API key.*wandb login.*WANDB_MODE=offline"):
        open_trackers(ml_collections.ConfigDict({"track": "wandb"}), tmp_path)


def test_tracker_without_its_package_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    for track, message in (("wandb", "pip install wandb"), ("mlflow", "choose from tensorboard")):
        with pytest.raises(ValueError, match=message):
            open_trackers(ml_collections.ConfigDict({"track": track}), tmp_path)
    assert open_trackers(ml_collections.ConfigDict(), tmp_path) == []

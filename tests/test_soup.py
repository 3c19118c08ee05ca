"""The mean of several runs: its weights, its BatchNorm statistics, which runs are taken, errors."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import linen as nn

from coatnet_jax import evaluate, inference, release, soup
from coatnet_jax.ages import get_decoder
from coatnet_jax.batchnorm import BatchNorm
from coatnet_jax.checkpoint import load_variables, save_variables
from coatnet_jax.config import load_config
from coatnet_jax.inference import build_model, predict_split
from coatnet_jax.train_state import init_variables
from input_pipeline import progress
from input_pipeline.images import decode_image
from input_pipeline.pipeline import open_split


@pytest.fixture(scope="module", autouse=True)
def quick_compiles(small_atto):
    small_atto(soup, inference)


@pytest.fixture(scope="module")
def config(drawn_root):
    config = load_config("finetune:atto,drawn")
    config.data.root, config.data.image_size, config.model.image_size = str(drawn_root), 32, 32
    config.batch_size = 16
    return config


@pytest.fixture(scope="module")
def variables(config):
    start = init_variables(jax.random.key(0), build_model(config), image_size=32)
    return jax.tree.map(np.asarray, start)


@pytest.fixture
def write_run(drawn_root, tmp_path):
    fingerprint = open_split(drawn_root / "drawn", "train").fingerprint

    def write(name, config, variables, **told):
        save_variables(tmp_path / name, variables)
        (tmp_path / name / "config.json").write_text(config.to_json())
        told = {"data_fingerprint": fingerprint, "git_revision": "abc", "wall_seconds": 60.0} | told
        told = {"parameters": 9, "devices": ["cpu"], "finished": True} | told
        (tmp_path / name / "run.json").write_text(json.dumps(told))
        return tmp_path / name

    return write


def shifted(variables, seed, scale):
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda x: (x + scale * rng.normal(size=x.shape)).astype(x.dtype), variables["params"]
    )
    return {**variables, "params": params}


def test_uniform_mean_is_a_run_that_is_evaluated_and_released(
    config, variables, write_run, drawn_root, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(progress, "EVERY", 0)
    some = [shifted(variables, seed, 0.02) for seed in range(3)]
    runs = [write_run(f"run{i}", config, each) for i, each in enumerate(some)]
    told = soup.run(runs, tmp_path / "soup", drawn_root / "drawn", uniform=True)
    mean, step = load_variables(tmp_path / "soup")
    assert step == 0
    leaves = [jax.tree.leaves(each["params"]) for each in some]
    for found, *theirs in zip(jax.tree.leaves(mean["params"]), *leaves, strict=True):
        np.testing.assert_allclose(found, sum(theirs) / 3, rtol=1e-5, atol=1e-6)
    assert [row["taken"] for row in told["runs"]] == [True] * 3
    errors = [row["validation_mae"] for row in told["runs"]]
    assert errors == sorted(errors)
    data, decode = drawn_root / "drawn", get_decoder("median")
    validation = open_split(data, "validation")
    loaded = [inference.load_run(run) for run in runs]
    p, labels = zip(
        *(predict_split(each, validation, each.probabilities) for each in loaded), strict=True
    )
    off = np.abs(decode(np.mean(p, axis=0, dtype=np.float64)) - labels[0]["age"])
    assert told["ensemble_mae"] == pytest.approx(off.mean(), abs=1e-3)
    run = json.loads((tmp_path / "soup" / "run.json").read_text())
    assert run["soup"] == told and run["wall_seconds"] == 180
    # What the soup says of itself and of its runs is what `evaluate` finds.
    best = told["runs"][0]
    for folder, said in (
        (tmp_path / "soup", told["validation_mae"]),
        (best["run"], best["validation_mae"]),
    ):
        found = evaluate.run(folder, data, split="validation", show_faces=False)
        assert found["mae"] == pytest.approx(said, abs=1e-3)
    printed = capsys.readouterr().out
    for done in ("predicted", "evaluated", "calibrated on", "read gender and race of"):
        assert f"{done} {len(validation)} of {len(validation)} faces of validation, " in printed
    release.write_release(tmp_path / "soup", data, tmp_path / "released")
    card = (tmp_path / "released" / "MODEL_CARD.md").read_text()
    assert "the mean of 3 such runs" in card and "3 minutes" in card
    assert str(tmp_path) not in (tmp_path / "released" / "run.json").read_text()


def test_greedy_takes_what_helps_and_leaves_out_what_does_not(
    config, variables, write_run, drawn_root, tmp_path, capsys
):
    good = write_run("good", config, variables)
    bad = shifted(variables, 1, 0.0)
    bad["params"]["head"]["age"]["bias"] = np.eye(117, dtype=np.float32)[116] * 50  # all are 116
    ruined = write_run("ruined", config, bad)
    told = soup.run([ruined, good], tmp_path / "soup", drawn_root / "drawn")
    assert [(row["run"], row["taken"]) for row in told["runs"]] == [
        (str(good), True),
        (str(ruined), False),
    ]
    found = load_variables(tmp_path / "soup")[0]["params"]
    jax.tree.map(np.testing.assert_array_equal, found, variables["params"])
    out = capsys.readouterr().out
    assert "the mean of 1 of 2 runs" in out and f"{good}, new statistics" in out


def test_faces_whose_ages_an_earlier_stage_was_told_do_not_choose(
    config, write_run, drawn_root, tmp_path, monkeypatch
):
    data = drawn_root / "drawn"
    ages = open_split(data, "validation").labels["age"]
    told = ages > np.median(ages)
    assert 0 < told.sum() < len(told)
    plain = {"params": {"bias": np.zeros(3, np.float32)}, "batch_stats": {}}
    runs = [write_run(name, config, plain) for name in ("a", "b")]
    seen = []

    def predict(run, faces, fn, **options):  # all are 40
        seen.append(faces.labels["age"])
        return np.eye(117)[np.full(len(faces), 40)], None

    monkeypatch.setattr(soup, "predict_split", predict)
    before = SimpleNamespace(among=lambda faces: told)
    monkeypatch.setattr(soup, "told_before", lambda *_, **__: before)
    found = soup.run(runs, tmp_path / "soup", data, uniform=True)
    assert len(seen) == 3  # both and their mean
    for each in seen:
        np.testing.assert_array_equal(each, ages[~told])
    error = pytest.approx(np.abs(ages[~told] - 40).mean(), abs=1e-3)
    assert found["validation_mae"] == found["ensemble_mae"] == error
    assert [row["validation_mae"] for row in found["runs"]] == [error] * 2
    told[:] = True
    with pytest.raises(ValueError, match="none are left to choose by"):
        soup.run(runs, tmp_path / "another", data)


def test_greedy_order():
    # Numbers for weights: the error is the distance of their mean from 10.
    values = [12.0, 7.0, 30.0, 8.0]

    def mix(some):
        mean = np.mean([values[i] for i in some])
        return mean, abs(mean - 10)

    order = [0, 3, 1, 2]
    chosen, (mean, error) = soup.greedy(order, (12.0, 2.0), mix)
    # 12 and 8 are taken; a 7 or a 30 more is further off.
    assert (chosen, mean, error) == ([0, 3], 10.0, 0.0)
    # Where the error stays as it is, nothing is gained.
    assert soup.greedy([0, 1], ("first", 2.0), lambda _: ("both", 2.0)) == ([0], ("first", 2.0))


def test_statistics_are_those_of_the_training_views(config, drawn_root, monkeypatch):
    class Only(nn.Module):
        @nn.compact
        def __call__(self, images, *, train):
            return BatchNorm(name="norm")(images, train=train)

    monkeypatch.setattr(soup, "build_model", lambda config: Only())
    config = config.copy_and_resolve_references()
    config.augment.update(crop=(1.0, 1.0), ratio=(1.0, 1.0), flip_prob=0.0, jitter_prob=0.0)
    config.augment.erase_prob = 0.0
    config.data.image_size, config.model.image_size = 48, 48  # as drawn: nothing is resized
    faces = open_split(drawn_root / "drawn", "train")
    pixels = np.stack([decode_image(data, 48) for data in faces.read_images(range(len(faces)))])
    views = (pixels / 255 - config.model.mean) / config.model.std
    start = {"mean": np.full(3, 9.0, np.float32), "var": np.full(3, 9.0, np.float32)}
    params = {"norm": {"scale": np.ones(3, np.float32), "bias": np.zeros(3, np.float32)}}
    start = {"params": params, "batch_stats": {"norm": start}}
    for batch_size in (len(faces), len(faces) // 7):
        config.batch_size = batch_size
        found = soup.with_new_statistics(config, start, faces, n_faces=len(faces))["batch_stats"]
        np.testing.assert_allclose(found["norm"]["mean"], views.mean((0, 1, 2)), atol=2e-3)
        if batch_size == len(faces):
            np.testing.assert_allclose(found["norm"]["var"], views.var((0, 1, 2)), rtol=2e-3)
        else:  # within a batch colours vary less than between all
            assert (found["norm"]["var"] < views.var((0, 1, 2))).all()


def test_statistics_are_measured_on_whole_batches_with_a_key_each(config, drawn_root, monkeypatch):
    config = config.copy_and_resolve_references()
    config.batch_size, keys = 4, []

    def step(params, statistics, images, key, **options):
        assert len(images) == 4
        keys.append(tuple(jax.random.key_data(key).tolist()))
        return statistics

    monkeypatch.setattr(soup, "_statistics_step", step)
    faces = open_split(drawn_root / "drawn", "train")
    start = {"norm": {"mean": np.full(3, 7, np.float32)}}
    found = soup.with_new_statistics(
        config, {"params": {}, "batch_stats": start}, faces, n_faces=10
    )
    assert len(keys) == len(set(keys)) == 3  # as many as hold 10 faces
    # A batch that moves nothing has the statistics of the start.
    np.testing.assert_allclose(found["batch_stats"]["norm"]["mean"], 7, rtol=1e-4)


def test_frozen_stages_keep_their_statistics(config, variables, drawn_root):
    config = config.copy_and_resolve_references()
    config.optim.train_from = "stage2"
    faces = open_split(drawn_root / "drawn", "train")
    found = soup.with_new_statistics(config, variables, faces, n_faces=16)["batch_stats"]
    before = variables["batch_stats"]["backbone"]
    same = {
        name: all(np.allclose(a, b) for a, b in zip(*map(jax.tree.leaves, pair), strict=True))
        for name, *pair in ((n, found["backbone"][n], before[n]) for n in before)
    }
    assert same == {name: not name.startswith("stage2") for name in before}


def test_model_without_batchnorm_stays_as_it_is(config, drawn_root):
    plain = {"params": {}, "batch_stats": {}}
    faces = open_split(drawn_root / "drawn", "train")
    assert soup.with_new_statistics(config, plain, faces) is plain


def test_runs_that_do_not_fit_are_refused(
    config, variables, write_run, drawn_root, tmp_path, monkeypatch
):
    data, out = drawn_root / "drawn", tmp_path / "soup"
    good = write_run("good", config, variables)
    with pytest.raises(ValueError, match="two different runs"):
        soup.run([good, good], out, data)
    other = config.copy_and_resolve_references()
    other.loss.name, other.model.image_size = "sord", 48
    with pytest.raises(
        ValueError, match="image_size 48 there, 32 in .*loss.name sord there, kl_l1"
    ):
        soup.run([good, write_run("other", other, variables)], out, data)
    elsewhere = write_run("elsewhere", config, variables, data_fingerprint="f" * 64)
    with pytest.raises(ValueError, match="other training faces"):
        soup.run([good, elsewhere], out, data)
    less = {**variables, "params": {"backbone": variables["params"]["backbone"]}}
    with pytest.raises(ValueError, match="other weights"):
        soup.run([good, write_run("less", config, less)], out, data)
    pretraining = write_run("pretraining", load_config("pretrain:atto"), variables)
    with pytest.raises(ValueError, match="is a pretrain run"):
        soup.run([good, pretraining], out, data)
    both = [write_run(n, config, variables, data_fingerprint="f" * 64) for n in ("old1", "old2")]
    with pytest.raises(ValueError, match="prepare the data as they were"):
        soup.run(both, out, data)
    # Trained on a table that has another name now, they are judged on its validation split.
    fold = open_split(data, "train", splits="fold3").fingerprint
    both = [write_run(n, config, variables, data_fingerprint=fold) for n in ("was3", "also3")]
    opened = []
    monkeypatch.setattr(soup, "open_split", lambda *_, splits: opened.append(splits) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        soup.run(both, out, data)
    assert opened == ["fold3"]
    monkeypatch.undo()
    with pytest.raises(ValueError, match="holds a run already"):
        soup.run([good, elsewhere], good, data)
    stopped = write_run("stopped", config, variables, finished=False)
    with pytest.raises(ValueError, match="stopped before its end"):
        soup.run([good, stopped], out, data)
    started = config.copy_and_resolve_references()
    started.init_from = str(good)
    with pytest.raises(ValueError, match="started from other weights"):
        soup.run([good, write_run("started", started, variables)], out, data)
    with started.unlocked():
        started.init_head = True
    with pytest.raises(ValueError, match="started from other weights"):
        soup.run([out.parent / "started", write_run("with_head", started, variables)], out, data)
    taught = config.copy_and_resolve_references()
    for name in ("taught", "another"):
        taught.distill.teachers = f"{good}, {tmp_path / name}"
        write_run(name, taught, variables)
    soup._read_alike([write_run("again", taught, variables), tmp_path / "another"])
    taught.distill.teachers = f"{tmp_path / 'another'}, {good}"
    soup._read_alike([write_run("reversed", taught, variables), tmp_path / "another"])
    # Random weights of another seed are other weights, with a teacher too.
    with taught.unlocked():
        taught.seed = 1
    seeded = config.copy_and_resolve_references()
    seeded.seed = 1
    for name, of_seed_1 in (("good", seeded), ("another", taught)):
        with pytest.raises(ValueError, match="started from other weights"):
            soup._read_alike([tmp_path / name, write_run("seed1", of_seed_1, variables)])
    seeded.init_from = str(good)  # whose backbone both have
    both = write_run("seed1", seeded, variables), write_run("seed0", seeded, variables)
    soup._read_alike(both)
    # To learn from a run is not to start from it.
    started.init_from, started.init_head, started.distill.teachers = "", False, str(good)
    alone = write_run("alone", started, variables)
    with pytest.raises(ValueError, match="started from other weights"):
        soup._read_alike([out.parent / "started", alone])
    for pair in (("good", "taught"), ("another", "taught")):
        with pytest.raises(ValueError, match="started from other weights"):
            soup.run([tmp_path / name for name in pair], out, data)
    diverged = jax.tree.map(lambda x: np.full_like(x, np.nan), variables)
    with pytest.raises(ValueError, match="diverged"):
        soup.run([good, write_run("diverged", config, diverged)], out, data)
    with pytest.raises(FileNotFoundError):
        soup.run([good, tmp_path / "nowhere"], out, data)
    assert not out.exists()

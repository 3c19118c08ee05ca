"""Tuning: theory, choices, resume, files, the search and the sweep; on a few drawn faces."""

import argparse
import csv
import json
import math
import shlex
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml

from coatnet_jax import (
    finetune,
    inference,
    loop,
    sharding,
    stage,
    tune,
    tune_checks,
    tune_page,
    tune_search,
)
from coatnet_jax.age_losses import AGE_LOSSES
from coatnet_jax.config import flat_keys, load_config, parse_training_flags
from coatnet_jax.logs import MetricsLog
from coatnet_jax.main import main
from coatnet_jax.optim import create_optimizer, optimizer_with_traced_rates

ROOT = Path(__file__).parents[1]
AGES = np.array([0, 1, 8, 26, 26, 57, 90, 116])


@pytest.fixture(scope="module")
def quick_compiles(compiled_once):
    """One device, and what is compiled is compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        for user in (stage, inference):
            patch.setattr(user, "make_mesh", partial(sharding.make_mesh, 1))
        yield


def flags(root, workdir) -> list[str]:
    words = ["--config=finetune:simple_cnn,drawn,tiny", f"--config.data.root={root}"]
    words += ["--config.batch_size=16", "--config.model.image_size=32"]
    return [*words, f"--workdir={workdir}"]


SMALL = ["--steps=2", "--lrs=1e-3,1e-2", "--weight-decays=0", "--overfit-faces=16"]
SMALL += ["--overfit-steps=2"]


def run_main(*argv) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in argv])
    return stop.value.code


def read_csv(path) -> list[dict]:
    with path.open() as file:
        return list(csv.DictReader(file))


# --- theory --------------------------------------------------------------------------------------


def by_hand(name: str, age: int) -> float:
    """The loss of a uniform answer for one age, with sums written out."""
    ln, years = math.log, range(117)
    if name in ("cross_entropy", "sord", "sord_squared"):
        return ln(117)
    if name in ("dldl", "kl_l1"):
        weights = [math.exp(-0.5 * ((y - age) / 2) ** 2) for y in years]
        label = [w / sum(weights) for w in weights]
        kl = sum(p * ln(p * 117) for p in label if p > 0)
        mean = sum(y * p for y, p in zip(years, label, strict=True))
        return kl + (abs(58 - mean) if name == "kl_l1" else 0)
    if name in ("mean_variance", "mean_residue"):
        variance = sum((y - 58) ** 2 for y in years) / 117
        spread = 0.05 * variance if name == "mean_variance" else 0
        return ln(117) + 0.1 * (58 - age) ** 2 + spread
    if name in ("or_cnn", "coral"):
        above = [(116 - k) / 117 for k in range(116)]
        return -sum(ln(p) if age > k else ln(1 - p) for k, p in enumerate(above))
    return {"l1": abs(58 - age), "mse": (58 - age) ** 2, "classes_4": ln(4), "bins_9": ln(9)}[name]


@pytest.mark.parametrize("name", [name for name in AGE_LOSSES if name != "corn"])
def test_theory_is_the_loss_of_a_uniform_answer_summed_by_hand(name):
    found = tune_checks.uniform_loss(name, AGES, sigma=2.0)
    np.testing.assert_allclose(found, np.mean([by_hand(name, a) for a in AGES]), rtol=1e-4)


def test_theory_of_corn_is_per_conditional_task():
    total = terms = 0
    for age in AGES:
        for k in range(min(age, 115) + 1):
            above = (116 - k) / (117 - k)
            total -= math.log(above if age > k else 1 - above)
            terms += 1
    found = tune_checks.uniform_loss("corn", AGES, sigma=2.0)
    np.testing.assert_allclose(found, total / terms, rtol=1e-4)


def test_every_loss_has_its_formula():
    assert tune_checks.FORMULAS.keys() == AGE_LOSSES.keys()


def test_least_loss_is_that_of_the_label_itself():
    assert tune_checks.least_loss("kl_l1", AGES, sigma=2.0) == 0
    label = AGE_LOSSES["sord"].label(AGES, sigma=2.0)
    logits = jnp.log(jnp.maximum(label, 1e-30))
    expected = float(jnp.mean(AGE_LOSSES["sord"].loss(logits, label)))
    assert tune_checks.least_loss("sord", AGES, sigma=2.0) == pytest.approx(expected, rel=1e-4)


def verdict(loss, years, mae):
    config = load_config("finetune:atto,drawn")
    rows = [{"step": 200, "loss": loss, "mae": years}]
    return tune_checks.by_heart_verdict(config, AGES, rows, mae)


def test_by_heart_needs_loss_and_error_near_nothing():
    assert verdict(0.5, 1.0, 1.0)["learned"]
    assert not verdict(12.0, 1.0, 1.0)["learned"]
    assert not verdict(0.5, 9.0, 9.0)["learned"]
    assert "running statistics" in verdict(0.5, 1.0, 30.0)["in_words"]
    diverged = tune_checks.by_heart_verdict(load_config("finetune:atto"), AGES, [], None)
    assert not diverged["learned"] and "diverged" in diverged["in_words"]


def test_faces_are_learned_by_heart_without_teachers():
    config = load_config("finetune:atto")
    config.distill.teachers = "runs/teacher"  # whose answers would leave a loss
    assert tune_checks.without_regularisation(config).distill.teachers == ""


def test_runs_no_better_than_a_constant_answer_are_named_as_such():
    result = {"best": {"mae": 15.1}, "constant_mae": 14.9}
    assert "more --steps" in tune_page.too_short(result)
    assert tune_page.too_short(result | {"constant_mae": 15.2}) == ""


# --- rates that are no constants -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "lars", "sgd"])
def test_traced_rates_give_the_same_updates_and_one_compilation(name):
    params = {"head": {"kernel": jnp.linspace(-1, 1, 6).reshape(2, 3), "bias": jnp.ones(3)}}
    grads = jax.tree.map(jnp.cos, params)
    create = partial(create_optimizer, params, name=name, clip_norm=1.0)
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, 2, 9)
    traced = optimizer_with_traced_rates(
        create, schedule=shape, learning_rate=0.5, weight_decay=0.5
    )
    traces = []

    @jax.jit
    def step(opt_state, params):
        traces.append(1)
        updates, opt_state = traced.update(grads, opt_state, params)
        return opt_state, optax.apply_updates(params, updates)

    for lr, decay in [(0.3, 0.1), (0.01, 0.0)]:
        schedule = optax.warmup_cosine_decay_schedule(0.0, lr, 2, 9)
        plain = create(learning_rate=schedule, weight_decay=decay)
        mine = optimizer_with_traced_rates(
            create, schedule=shape, learning_rate=lr, weight_decay=decay
        )
        states, ours, theirs = (mine.init(params), plain.init(params)), params, params
        for _ in range(4):
            one, ours = step(states[0], ours)
            updates, other = plain.update(grads, states[1], theirs)
            states, theirs = (one, other), optax.apply_updates(theirs, updates)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)
    assert len(traces) == 1


# --- choices -------------------------------------------------------------------------------------


def rows(errors: dict, part="sweep"):
    return [
        {"part": part, "lr": lr, "status": "diverged" if mae is None else "done", "mae": mae}
        for lr, mae in errors.items()
    ]


@pytest.mark.parametrize(
    ("errors", "chosen"),
    [
        ({1e-4: 9, 1e-3: 7, 1e-2: 8, 1e-1: None}, [1e-4, 1e-3, 1e-2]),
        ({1e-4: 6, 1e-3: 7, 1e-2: 8, 1e-1: 9}, [1e-4, 1e-3, 1e-2]),
        ({1e-4: 9, 1e-3: 8, 1e-2: 8.5, 1e-1: 7}, [1e-3, 1e-2, 1e-1]),
        ({1e-4: 9, 1e-3: 8}, [1e-4, 1e-3]),
    ],
)
def test_grid_takes_the_best_rate_and_its_neighbours(errors, chosen):
    assert tune.grid_lrs(rows(errors)) == chosen


def test_all_diverged_is_said_in_one_line():
    with pytest.raises(ValueError, match=r"every run diverged \(learning rates 1, 2\).*--lrs"):
        tune.grid_lrs(rows({1.0: None, 2.0: None}))


def test_loss_that_ends_far_above_an_untrained_model_counts_as_diverged():
    done = {"status": "done", "loss": 30.0, "mae": 20.0}
    assert tune.judged(done, untrained=19.0)["status"] == "diverged"
    assert tune.judged(done, untrained=27.0) == done  # a rate so small that nothing is learned


@pytest.fixture
def fake_objective(monkeypatch):
    """Instead of training: an error that is least at lr 0.01 and weight decay 0.2; nan above 1."""
    seen = []

    def train(setting, *, trackers=(), traced_rates=False):
        assert traced_rates
        config, steps = setting.config, setting.schedule.total_steps
        lr, decay = config.optim.lr, config.optim.weight_decay
        seen.append((lr, decay))
        setting.workdir.mkdir(parents=True, exist_ok=True)
        (setting.workdir / "run.json").write_text('{"wall_seconds": 1.5}')
        if lr > 1:
            broken = {"loss": jnp.array(math.nan), "mae": jnp.array(20.0)}
            loop._report(3, broken, log=None, progress=None, schedule=None)  # raises Diverged
        error = 5 + abs(math.log10(lr / 0.01)) + abs(decay - 0.2)
        log = MetricsLog(setting.workdir, trackers=trackers)
        log.write(step=steps, epoch=1, split="train", loss=error / 10, mae=error)
        log.write(step=steps, epoch=1, split="validation", mae=error, accuracy=0.5)
        return True

    monkeypatch.setattr(finetune, "train", train)
    monkeypatch.setattr(
        tune, "untrained_loss",
        lambda setting: {"loss_name": "kl_l1", "measured": 27.6, "theory": 27.5, "formula": "f",
                         "faces": 16, "tolerance": 0.1, "agrees": True},
    )  # fmt: skip
    return seen


def test_best_of_a_fake_objective_is_recommended(fake_objective, drawn_root, tmp_path, capsys):
    grids = ["--lrs=1e-4,1e-3,1e-2,1e-1,10", "--weight-decays=0,0.2", "--steps=50"]
    argv = ["tune", *flags(drawn_root, tmp_path / "t"), "--config.optim.lr", "0.002", *grids]
    assert run_main(*argv) == 0
    found = json.loads((tmp_path / "t" / "tune.json").read_text())
    assert (found["best"]["lr"], found["best"]["weight_decay"]) == (0.01, 0.2)
    printed = capsys.readouterr().out
    command = printed.strip().splitlines()[-1]
    assert command == found["command"]
    config, workdir = parse_training_flags(shlex.split(command)[2:], default="finetune")
    assert (config.optim.lr, config.optim.weight_decay, config.batch_size) == (0.01, 0.2, 16)
    assert workdir == tmp_path / "t" / "best"
    # One row a run: five of the sweep, and two more weight decays at three learning rates.
    table = read_csv(tmp_path / "t" / "tune.csv")
    pairs = {(float(row["lr"]), float(row["weight_decay"])) for row in table}
    swept = {(lr, 0.05) for lr in (1e-4, 1e-3, 1e-2, 1e-1, 10)}
    assert pairs == swept | {(lr, d) for lr in (1e-3, 1e-2, 1e-1) for d in (0, 0.05, 0.2)}
    assert len(table) == len(pairs) == 11
    diverged = [row for row in table if row["status"] == "diverged"]
    assert [row["lr"] for row in diverged] == ["10.0"]
    assert diverged[0]["why"] == "the loss is not finite at step 3"
    assert "run 12 of 12" in printed and "ETA" in printed
    page = (tmp_path / "t" / "report.html").read_text()
    assert "0.002, was not tried" in page and "No run beats" not in page
    assert "Diverged: 10 (the loss is not finite at step 3)." in page
    assert "--config.optim.lr=0.01 --config.optim.weight_decay=0.2" in page
    for name in ("lr_sweep.png", "heatmap.png"):
        assert (tmp_path / "t" / name).stat().st_size > 5000


def test_a_run_whose_validation_gives_no_number_has_diverged(
    fake_objective, drawn_root, tmp_path, monkeypatch
):
    train = finetune.train

    def broken(setting, *, trackers=(), traced_rates=False):
        if setting.config.optim.lr < 0.1:
            return train(setting, trackers=trackers, traced_rates=traced_rates)
        setting.workdir.mkdir(parents=True)
        (setting.workdir / "run.json").write_text('{"wall_seconds": 1.5}')
        log = MetricsLog(setting.workdir)
        log.write(step=1, epoch=1, split="train", loss=1.0, mae=9.0)
        log.write(step=1, epoch=1, split="validation", mae=math.nan, accuracy=0.0)
        return True

    monkeypatch.setattr(finetune, "train", broken)
    grids = ["--lrs=1e-3,1e-2,0.1", "--weight-decays=0.05", "--steps=5"]
    for _ in range(2):  # from what was kept, too
        assert run_main("tune", *flags(drawn_root, tmp_path / "t"), *grids) == 0
        rows = json.loads((tmp_path / "t" / "tune.json").read_text())["runs"]
        assert [row["status"] for row in rows] == ["done", "done", "diverged"]
    assert rows[-1]["why"] == "the validation error is no number"


def test_finished_runs_are_skipped_and_stopped_ones_go_on(
    fake_objective, drawn_root, tmp_path, monkeypatch, capsys
):
    argv = ["tune", *flags(drawn_root, tmp_path / "t"), *SMALL]
    with monkeypatch.context() as patch:
        working = finetune.train
        patch.setattr(
            finetune,
            "train",
            lambda setting, **options: len(fake_objective) < 2 and working(setting, **options),
        )
        assert run_main(*argv) == 3
    assert len(fake_objective) == 2 and "stopped after 2 of 5 runs" in capsys.readouterr().out
    assert run_main(*argv) == 0
    assert len(fake_objective) == 5  # the one for by heart, two of the sweep, two of the grid
    before = (tmp_path / "t" / "tune.csv").read_text()
    assert run_main(*argv) == 0
    assert len(fake_objective) == 5 and (tmp_path / "t" / "tune.csv").read_text() == before
    # Stopped in another grid, it leaves no page of the one before beside the new table.
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "train", lambda setting, **options: False)
        assert run_main(*argv, "--lrs=1e-3,1e-2,0.1") == 3
    assert not (tmp_path / "t" / "report.html").exists()
    # Another grid adds its runs; another config is not mixed with this one.
    assert run_main(*argv, "--lrs=1e-3,1e-2,0.1") == 0
    assert len(fake_objective) == 7
    assert run_main(*argv, "--config.mixup=0.5") == 1
    assert "mixup 0.0 there, 0.5 here" in capsys.readouterr().err


def test_rates_that_differ_a_little_are_runs_of_their_own(fake_objective, drawn_root, tmp_path):
    grids = ["--lrs=0.001234,0.0012341", "--weight-decays=0.05", "--steps=5"]
    assert run_main("tune", *flags(drawn_root, tmp_path / "t"), *grids) == 0
    table = read_csv(tmp_path / "t" / "tune.csv")
    assert [float(row["lr"]) for row in table] == [0.001234, 0.0012341]


@pytest.fixture(scope="module")
def tuned(quick_compiles, drawn_root, tmp_path_factory):
    """A tuning of really trained runs, as few and as short as can be."""
    workdir = tmp_path_factory.mktemp("tuned")
    few = ["--steps=2", "--lrs=1e-2", "--weight-decays=0.05"]
    few += ["--overfit-faces=16", "--overfit-steps=2"]
    assert run_main("tune", *flags(drawn_root, workdir), *few) == 0
    return workdir


def test_whole_tuning_on_drawn_faces(tuned):
    found = json.loads((tuned / "tune.json").read_text())
    assert found["finished"] and found["untrained"]["agrees"]
    assert not found["overfit"]["learned"]  # not in two steps
    assert [row["part"] for row in found["runs"]] == ["sweep+grid"]
    assert 0 < found["best"]["mae"] < 60
    assert not list(tuned.rglob("checkpoints"))


@pytest.mark.slow
def test_short_run_is_what_finetune_does_with_the_same_numbers(tuned, tmp_path):
    found = json.loads((tuned / "tune.json").read_text())["best"]
    config = inference.read_config(tuned / "runs" / found["run"] / "config.json")
    assert finetune.run(config, tmp_path / "plain")
    plain = MetricsLog(tmp_path / "plain").rows("validation")[-1]["mae"]
    assert found["mae"] == pytest.approx(plain, abs=0.02)


def test_by_heart_uses_few_faces_over_all_ages_and_no_augmentation(quick_compiles, drawn_root):
    config = load_config("finetune:simple_cnn,drawn,tiny")
    config.data.root, config.batch_size = str(drawn_root), 32
    setting = finetune.open_finetuning(config, Path("none"))
    few = tune_checks.by_heart(setting, faces=16, steps=10, warmup=0.1)
    assert len(few.train_faces) == 16 and few.schedule.total_steps == 10
    assert few.validation_faces is few.train_faces
    ages, all_ages = (s.train_faces.labels["age"] for s in (few, setting))
    assert (ages.min(), ages.max()) == (all_ages.min(), all_ages.max())
    assert few.config.mixup == few.config.augment.flip_prob == few.config.model.drop_path == 0
    # 16 faces a step instead of 32, and the step's rate is that of the config.
    assert few.config.optim.lr * few.config.batch_size == config.optim.lr * config.batch_size


# --- search --------------------------------------------------------------------------------------


def test_search_counts_diverged_trials_and_goes_on(
    fake_objective, drawn_root, tmp_path, monkeypatch
):
    pytest.importorskip("optuna")
    monkeypatch.setitem(tune_search.SPACE, "optim.lr", (1e-4, 100.0))
    argv = ["tune", *flags(drawn_root, tmp_path / "s"), "--steps=5"]
    assert run_main(*argv, "--search=5") == 0
    table = read_csv(tmp_path / "s" / "search.csv")
    states = [row["state"] for row in table]
    assert len(table) == 5 == len(fake_objective) and 0 < states.count("diverged") < 5
    done = [row for row in table if row["state"] == "complete"]
    best = min(done, key=lambda row: float(row["mae"]))
    found = json.loads((tmp_path / "s" / "search.json").read_text())
    assert found["best"]["trial"] == int(best["trial"])
    config, _ = parse_training_flags(shlex.split(found["command"])[2:], default="finetune")
    assert config.optim.lr == pytest.approx(float(best["optim.lr"]), rel=0.01)
    assert config.mixup == float(best["mixup"])
    assert run_main(*argv, "--search=5") == 0 and len(fake_objective) == 5
    assert run_main(*argv, "--search=6") == 0 and len(fake_objective) == 6
    lrs = {row["optim.lr"] for row in read_csv(tmp_path / "s" / "search.csv")}
    assert len(lrs) == 6
    argv[-1] = "--steps=10"  # another search, none of whose trials was made by the first
    assert run_main(*argv, "--search=2") == 0 and len(fake_objective) == 8


def test_stopped_trial_is_taken_up_with_its_values(
    fake_objective, drawn_root, tmp_path, monkeypatch
):
    pytest.importorskip("optuna")
    argv = ["tune", *flags(drawn_root, tmp_path / "s"), "--steps=5", "--search=2"]
    tried = []
    with monkeypatch.context() as patch:

        def stop(setting, **_):
            tried.append((setting.config.optim.lr, setting.workdir))
            return False

        patch.setattr(finetune, "train", stop)
        assert run_main(*argv) == 3
    assert run_main(*argv) == 0
    lr, folder = tried[0]
    assert fake_objective[0][0] == pytest.approx(lr) and len(fake_objective) == 2
    table = read_csv(tmp_path / "s" / "search.csv")
    assert [row["state"] for row in table] == ["stopped", "complete", "complete"]
    assert table[1]["folder"] == folder.name


def test_hopeless_trial_is_pruned(fake_objective, drawn_root, tmp_path, monkeypatch):
    pytest.importorskip("optuna")

    def train(setting, *, trackers, **_):
        fake_objective.append(setting.workdir)
        error = 10.0 + (90 if len(fake_objective) == 3 else 0)
        setting.workdir.mkdir(parents=True)
        (setting.workdir / "run.json").write_text('{"wall_seconds": 1.5}')
        log = MetricsLog(setting.workdir, trackers=trackers)
        log.write(step=1, epoch=1, split="train", loss=1, mae=error)
        for step in range(1, 6):
            log.write(step=step, epoch=1, split="validation", mae=error, accuracy=0.5)
        return True

    monkeypatch.setattr(finetune, "train", train)
    monkeypatch.setattr(tune_search, "STARTUP", 2)
    argv = ["tune", *flags(drawn_root, tmp_path / "s"), "--steps=5", "--search=3"]
    assert run_main(*argv) == 0
    table = read_csv(tmp_path / "s" / "search.csv")
    assert [row["state"] for row in table] == ["complete", "complete", "pruned"]
    assert len(MetricsLog(fake_objective[-1]).rows("validation")) == 1


def test_missing_optuna_is_named_with_its_command(tmp_path, drawn_root, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    assert run_main("tune", *flags(drawn_root, tmp_path / "s"), "--search=2") == 1
    assert capsys.readouterr().err.strip().endswith("pip install 'optuna>=4'")


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config.loss.name=kl_l2"], "unknown age loss 'kl_l2'"),
        (["--lrs="], "--lrs is an empty grid"),
        (["--lrs=1e-3,fast"], "--lrs=1e-3,fast: give numbers"),
        (["--lrs=0,1e-3"], "a learning rate must be above 0"),
        (["--weight-decays=,"], "--weight-decays is an empty grid"),
        (["--weight-decays=-1"], "every number must be 0 or more"),
        (["--steps=0"], "--steps=0: give 1 or more"),
        (["--search=0"], "--search=0: give the number of trials"),
        (["--search=3", "--steps=2"], "--steps=2: a trial is evaluated 5 times"),
        (["--search=3", "--lrs=1e-3"], "--lrs is no flag of --search"),
        (["--search=3", "--overfit-steps=9"], "--overfit-steps is no flag of --search"),
        (["--config.optim.lrr=1"], "did you mean --config.optim.lr"),
        (["--config=pretrain:atto"], "tune is for fine-tuning, not for 'pretrain'"),
        (["--config.distributed=auto"], "tune is one process: leave out --config.distributed"),
    ],
)
def test_bad_input_is_one_line(words, message, drawn_root, tmp_path, capsys):
    if "--search" in words[0]:
        pytest.importorskip("optuna")
    given = flags(drawn_root, tmp_path / "t")
    if words[0].startswith("--config="):
        given = given[-1:]
    unknown = message.startswith("did you mean")  # of a flag, as argparse ends for one
    assert run_main("tune", *given, *words) == (2 if unknown else 1)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "t").exists()


def test_tuning_into_a_training_run_is_refused(drawn_root, tmp_path, capsys):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert run_main("tune", *flags(drawn_root, tmp_path / "run")) == 1
    assert "holds a training run" in capsys.readouterr().err


def test_default_plan_lies_around_the_config():
    config = load_config("finetune:micro,cpu")
    none = argparse.Namespace(
        lrs=None, weight_decays=None, steps=100, overfit_faces=64, overfit_steps=200
    )
    plan = tune.make_plan(config, none)
    assert config.optim.lr in plan.lrs and config.optim.weight_decay in plan.weight_decays
    assert (len(plan.lrs), len(plan.weight_decays)) == (7, 4) and plan.weight_decays[0] == 0
    config.optim.weight_decay = 0.0
    assert len(tune.make_plan(config, none).weight_decays) == 4


def test_tuning_without_enough_memory_wants_a_smaller_batch_in_another_folder(
    drawn_root, tmp_path, monkeypatch, capsys
):
    def exhaust_memory(*_, **__):
        return jax.numpy.zeros(1 << 50).block_until_ready()

    monkeypatch.setattr(tune, "run", exhaust_memory)
    assert run_main("tune", *flags(drawn_root, tmp_path / "tune")) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "ran out (RESOURCE_EXHAUSTED" in line and line.endswith(
        # A simple CNN has no --config.model.remat.
        ": lower --config.batch_size (16 now), in a new --workdir"
    )


# --- sweep ---------------------------------------------------------------------------------------


def sweep() -> dict:
    return yaml.safe_load((ROOT / "configs" / "sweep.yaml").read_text())


def test_sweep_has_the_space_of_the_search():
    space = {}
    for key, choice in sweep()["parameters"].items():
        logs = choice.get("distribution") == "log_uniform_values"
        space[key] = (choice["min"], choice["max"]) if logs else tuple(choice["values"])
        assert logs == (len(space[key]) == 2)
    assert space == {f"config.{key}": values for key, values in tune_search.SPACE.items()}


def test_sweep_command_is_one_that_finetune_understands():
    command = sweep()["command"]
    assert "coatnet-jax finetune" in command[2] and command[-1] == "${args}"
    given = [word for word in command if word.startswith("--config")]
    for key, choice in sweep()["parameters"].items():
        given.append(f"--{key}={choice.get('max') or choice['values'][0]}")  # as ${args} does
    config, _ = parse_training_flags([*given, "--workdir=w"], default="finetune")
    assert config.track == "wandb" and config.optim.weight_decay == 0.3
    names = [key.removeprefix("config.") for key in sweep()["parameters"]]
    assert set(names) <= set(flat_keys(config))


def test_sweep_watches_a_metric_that_finetune_logs(tuned):
    split, _, name = sweep()["metric"]["name"].partition("/")
    folder = json.loads((tuned / "tune.json").read_text())["best"]["run"]
    # Trackers are told what is written here, as `split/name`.
    assert all(name in row for row in MetricsLog(tuned / "runs" / folder).rows(split))
    assert MetricsLog(tuned / "runs" / folder).rows(split)

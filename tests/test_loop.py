"""The training loop by itself, with steps that only count: stops, early stopping, checkpoints."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from coatnet_jax import logs, loop
from coatnet_jax.checkpoint import Checkpoints, best_step, load_variables
from coatnet_jax.logs import MetricsLog, update_run_info
from coatnet_jax.pages import write_json
from coatnet_jax.sharding import make_mesh
from coatnet_jax.train_state import create_train_state


class Batches:
    """An endless iterator whose place can be saved."""

    def __init__(self):
        self.place = 0

    def __next__(self):
        self.place += 1
        return {"x": np.full(8, self.place, np.float32)}

    def get_state(self):
        return {"place": self.place}

    def set_state(self, state):
        self.place = state["place"]


def count(state, batch):
    """Adds the batch's number to the parameter."""
    params = {"w": state.params["w"] + batch["x"][0]}
    return state.replace(step=state.step + 1, params=params), {"loss": params["w"]}


def train(workdir, scores, *, train_step=count, **changes):
    """(state, finished) of a run whose evaluations give `scores`, one after the other."""
    schedule = {"total_steps": 20, "steps_per_epoch": 4, "evaluate_every": 2, "log_every": 1}
    schedule = loop.Schedule(**{**schedule, "batch_size": 8, "patience": 3, **changes})
    variables = {"params": {"w": jnp.zeros(())}, "batch_stats": {}}
    checkpoints = Checkpoints(workdir, metric="mae")
    done = len(MetricsLog(workdir).rows("validation"))
    scores = iter(scores[done:])
    try:
        return loop.train(
            create_train_state(jax.random.key(0), variables, optax.sgd(1.0)),
            Batches(),
            name="test",
            train_step=train_step,
            evaluate=lambda state: {"mae": next(scores)},
            mesh=make_mesh(1),
            schedule=schedule,
            checkpoints=checkpoints,
            log=MetricsLog(workdir),
        )
    finally:
        checkpoints.close()


def test_row_that_was_cut_off_is_dropped_and_the_rest_stays(tmp_path):
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3):
        log.write(step=step, epoch=step, split="validation", mae=1.0)
    with log.path.open("a") as file:
        file.write('{"step": 4, "ep')
    assert [row["step"] for row in log.rows("validation")] == [1, 2, 3]
    log.keep_until(2)
    assert [row["step"] for row in map(json.loads, log.path.read_text().splitlines())] == [1, 2]


SCORES = [9.0, 5.0, 6.0, 7.0, 8.0, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_early_stopping_keeps_the_best_and_the_latest(tmp_path):
    state, finished = train(tmp_path, SCORES)
    assert finished and int(state.step) == 10  # 5.0 at step 4, then three that are no better
    assert load_variables(tmp_path, which="best")[1] == 4
    assert load_variables(tmp_path, which="latest")[1] == 10
    best = load_variables(tmp_path, which="4")[0]["params"]["w"]
    assert float(best) == 1 + 2 + 3 + 4
    # The same command again knows from the log that the run is over.
    state, finished = train(tmp_path, SCORES)
    assert finished and int(state.step) == 10


def test_an_evaluation_without_a_number_is_never_the_best(tmp_path):
    state, finished = train(tmp_path, [9.0, 5.0, 7.0, *[float("nan")] * 7])
    assert finished and int(state.step) == 10  # three that are no better
    assert best_step(tmp_path) == 4 and load_variables(tmp_path)[1] == 4


@pytest.mark.parametrize(
    "scores",
    [
        [float("nan"), 5.0, 6.0, 7.0, 8.0, *[9.0] * 5],
        [9.0, 5.0, float("nan"), 7.0, 8.0, *[9.0] * 5],
        [6.0, 5.0, *[float("nan")] * 8],
    ],
    ids=["first", "after the best", "to the end"],
)
def test_an_evaluation_without_a_number_does_not_keep_a_run_from_its_end(scores, tmp_path):
    state, finished = train(tmp_path, scores)
    assert finished and int(state.step) == 10  # 5.0 at step 4, then three that are no better


def test_files_that_a_run_goes_on_from_are_written_whole_or_not(tmp_path, monkeypatch):
    run, log, tuned = (tmp_path / name for name in ("run.json", "metrics.jsonl", "result.json"))
    run.write_text('{"data_fingerprint": "f"}')
    log.write_text('{"step": 1, "loss": 2.0}\n{"step": 9, "loss": 1.0}\n')
    tuned.write_text('{"status": "done"}')
    before = {path: path.read_text() for path in (run, log, tuned)}
    write = Path.write_bytes

    def killed(path, content):
        write(path, content[: len(content) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", killed)
        for step in (
            lambda: update_run_info(tmp_path, finished=True),
            lambda: MetricsLog(tmp_path).keep_until(1),
            lambda: write_json(tuned, {"status": "diverged"}),
        ):
            with pytest.raises(KeyboardInterrupt):
                step()
    assert {path: path.read_text() for path in before} == before
    update_run_info(tmp_path, finished=True)
    MetricsLog(tmp_path).keep_until(1)
    write_json(tuned, {"status": "diverged"})
    assert json.loads(run.read_text())["finished"]
    assert log.read_text() == '{"step": 1, "loss": 2.0}\n'
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(p.name for p in before)


def test_equal_is_no_better(tmp_path):
    state, finished = train(tmp_path, [5.0] * 10)
    assert finished and int(state.step) == 8  # the first, then three that only equal it


@pytest.mark.parametrize(("first", "ended"), [(4, 10), (6, 18), (14, 20)])
def test_patience_counts_from_its_first_step(first, ended, tmp_path):
    # 5.0 at step 4, 1.0 at step 12; each three no better evaluations after `first` would end it.
    state, finished = train(tmp_path, SCORES, patience_from=first)
    assert finished and int(state.step) == ended
    state, finished = train(tmp_path, SCORES, patience_from=first)
    assert finished and int(state.step) == ended


def test_sigterm_saves_and_the_next_call_goes_on(tmp_path):
    def terminated(state, batch):
        if int(batch["x"][0]) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return count(state, batch)

    scores = [10.0 - i for i in range(10)]
    state, finished = train(tmp_path / "a", scores, train_step=terminated)
    assert not finished and int(state.step) == 7
    state, finished = train(tmp_path / "a", scores)
    assert finished and float(state.params["w"]) == sum(range(1, 21))
    train(tmp_path / "b", scores)
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in "ab"]
    assert logs[0] == logs[1]


def test_time_left_is_forecast_without_the_compiler(tmp_path, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(logs, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def timed(state, batch):
        now[0] += 6000 if int(batch["x"][0]) in (1, 8) else 100  # the first one of each call
        return count(state, batch)

    def lines(**changes):
        every = {"evaluate_every": 1, "patience": 0, **changes}
        train(tmp_path, [10.0 - i / 9 for i in range(20)], train_step=timed, **every)
        return [line for line in capsys.readouterr().out.splitlines() if "ETA" in line]

    first, second, *_ = lines(total_steps=7)
    assert "ETA 10:00:00 |" in first and "ETA 8:20 |" in second  # 5 steps of 100 seconds
    _, second, *_ = lines()
    assert "step 9/20" in second and "ETA 18:20 |" in second


def test_loss_that_is_not_finite_stops_before_it_is_saved(tmp_path):
    def diverging(state, batch):
        state, metrics = count(state, batch)
        return state, {"loss": jnp.where(state.step > 4, jnp.nan, metrics["loss"])}

    with pytest.raises(ValueError, match="not finite at step 5"):
        train(tmp_path, SCORES, train_step=diverging)
    assert load_variables(tmp_path, which="latest")[1] == 4


def test_unknown_checkpoint_is_refused_with_the_known_ones(tmp_path):
    train(tmp_path, SCORES)
    with pytest.raises(ValueError, match=r"'12' in .*: choose best, latest or one of \[4, 10\]"):
        load_variables(tmp_path, which="12")

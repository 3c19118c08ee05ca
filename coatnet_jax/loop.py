"""The one training loop: steps, progress, evaluation, checkpoints, exact resume, clean stops."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from coatnet_jax.checkpoint import Checkpoints
from coatnet_jax.distributed import any_process, is_main
from coatnet_jax.logs import MetricsLog, Progress
from coatnet_jax.sharding import shard_batch
from coatnet_jax.train_state import TrainState


class Diverged(ValueError):
    """The loss of a training is no longer a finite number."""


@dataclass(frozen=True)
class Schedule:
    """When things happen, in steps; `patience` counts evaluations (0: never stop early), of those
    after the step `patience_from`."""

    total_steps: int
    steps_per_epoch: float
    evaluate_every: int
    log_every: int
    batch_size: int
    patience: int = 0
    patience_from: int = 0
    max_minutes: float = 0.0


def train(
    state: TrainState,
    iterator: Iterator,
    *,
    name: str,
    train_step: Callable,
    evaluate: Callable[[TrainState], dict[str, float]],
    mesh: Mesh,
    schedule: Schedule,
    checkpoints: Checkpoints,
    log: MetricsLog,
) -> tuple[TrainState, bool]:
    """(state, finished) after training from the newest checkpoint, or from `state`, to the end.

    `train_step(state, batch) -> (state, metrics)` donates the state; `evaluate(state)` returns
    validation metrics, the checkpoints' metric among them. A checkpoint is saved after every
    evaluation and when the run is stopped by max_minutes, SIGINT or SIGTERM: then finished is False
    and the same call goes on from there, bit for bit. Raises Diverged, a ValueError, where the loss
    is not finite; the last checkpoint stays.
    """
    if restored := checkpoints.restore_latest(state):
        state, iterator_state = restored
        iterator.set_state(iterator_state)
        print(f"[{name}] resuming from step {int(state.step)}", flush=True)
    step = int(state.step)
    log.keep_until(step)
    if step >= schedule.total_steps or _out_of_patience(log, checkpoints.metric, schedule):
        return state, True
    progress = Progress(
        name=name,
        start=step,
        total=schedule.total_steps,
        steps_per_epoch=schedule.steps_per_epoch,
        batch_size=schedule.batch_size,
    )
    started = time.monotonic()
    first = step + 1
    pending = None  # metrics of the step before: fetched while the next one runs
    with _StopSignals() as stop:
        while step < schedule.total_steps:
            batch = shard_batch(next(iterator), mesh)
            state, metrics = train_step(state, batch)
            if pending is not None:
                _report(*pending, log=log, progress=progress, schedule=schedule)
            step += 1
            pending = (step, metrics)
            if step == first:  # compiled at last: said at once, for whoever waits
                _report(*pending, log=log, progress=progress, schedule=schedule)
                pending = None
                progress.compiled(step)
            overtime = 0 < schedule.max_minutes * 60 < time.monotonic() - started
            stopping = _agreed(stop.requested or overtime, step, schedule)
            evaluating = step % schedule.evaluate_every == 0 or step == schedule.total_steps
            if not (evaluating or stopping):
                continue
            if pending is not None:
                _report(*pending, log=log, progress=progress, schedule=schedule)
            pending, scores = None, None
            if evaluating:
                scores = evaluate(state)
                log.write(
                    step=step, epoch=step / schedule.steps_per_epoch, split="validation", **scores
                )
                values = " ".join(f"{key} {value:.4g}" for key, value in scores.items())
                print(f"[{name}] validation at step {step}: {values}", flush=True)
            checkpoints.save(state, iterator.get_state(), scores)
            progress.pause(step)
            if _out_of_patience(log, checkpoints.metric, schedule):
                print(f"[{name}] no better for {schedule.patience} evaluations: done", flush=True)
                return state, True
            if stopping and step < schedule.total_steps:
                print(f"[{name}] stopped and saved at step {step}; the same command resumes")
                return state, False
    return state, True


def _report(
    step: int,
    metrics: dict[str, jax.Array],
    *,
    log: MetricsLog,
    progress: Progress,
    schedule: Schedule,
) -> None:
    """Check a step's metrics; print and log them where it is its turn (and the first step's)."""
    values = {key: float(value) for key, value in jax.device_get(metrics).items()}
    if not all(math.isfinite(value) for value in values.values()):
        raise Diverged(
            f"the loss is not finite at step {step} ({values}): lower --config.optim.lr or raise "
            "--config.optim.warmup_epochs; checkpoints of steps before stay"
        )
    if step % schedule.log_every == 0 or step == 1:
        print(progress.line(step, values), flush=True)
        log.write(step=step, epoch=step / schedule.steps_per_epoch, split="train", **values)


def _agreed(stopping: bool, step: int, schedule: Schedule) -> bool:
    """Whether to stop: in one process at once, in several when any of them asks at a log line,
    because to agree they have to wait for each other."""
    if jax.process_count() == 1:
        return stopping
    return step % schedule.log_every == 0 and any_process(stopping)


def _out_of_patience(log: MetricsLog, metric: str, schedule: Schedule) -> bool:
    """Whether the last `patience` evaluations brought nothing better; read from the log, so that
    a resumed run stops where an uninterrupted one does."""
    if not schedule.patience:
        return False
    rows = log.rows("validation") if is_main() else []
    before, last = rows[: -schedule.patience], rows[-schedule.patience :]
    if not before or last[0]["step"] <= schedule.patience_from:
        return any_process(False)
    best, lately = (min(_finite(row[metric]) for row in some) for some in (before, last))
    return any_process(lately >= best)


def _finite(value: float) -> float:
    """The value; infinity for one that is no number, which would hide all others from `min`."""
    return value if math.isfinite(value) else math.inf


class _StopSignals:
    """Turns SIGINT and SIGTERM into a request that the loop sees after the running step."""

    def __enter__(self) -> "_StopSignals":
        self.requested = False
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._request)
        return self

    def _request(self, number: int, _) -> None:
        if self.requested:  # asked twice: stop at once
            raise KeyboardInterrupt
        self.requested = True
        print(f"\nstopping after this step ({signal.Signals(number).name}) …", flush=True)

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

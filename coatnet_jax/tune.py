"""Hyperparameters of fine-tuning in four steps, the last of them a grid of two rates.

    coatnet-jax tune --config=finetune:micro,cpu --workdir=runs/tune

1. The loss of the untrained model against theory (`tune_checks`).
2. A few dozen faces learned by heart, without augmentation and regularisation.
3. A sweep of learning rates on a log grid, in short runs of as many steps each.
4. A grid of the best three learning rates and several weight decays.

Choices are made on the validation split; the test split is never opened. Every short run is a
whole fine-tuning with a schedule of its own (warm-up, cosine to zero), kept in a folder under
`runs`. What is finished is skipped and what was stopped goes on, so the same command may be given
again, with other grids too. `tune_search` looks for the same and more with Optuna.
"""

import argparse
import math
import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from coatnet_jax import finetune
from coatnet_jax.checkpoint import FOLDER
from coatnet_jax.config import join_values, read_json, save_config
from coatnet_jax.logs import MetricsLog, environment
from coatnet_jax.loop import Diverged
from coatnet_jax.metrics import mae
from coatnet_jax.pages import write_csv, write_json
from coatnet_jax.stage import Setting, check_same_config, check_same_data, make_schedule
from coatnet_jax.tune_checks import by_heart, by_heart_verdict, untrained_loss
from coatnet_jax.tune_page import too_short, write_page
from input_pipeline.progress import duration

LR_FACTORS = (1 / 30, 1 / 10, 1 / 3, 1, 3, 10, 30)  # of the config's learning rate
DECAY_FACTORS = (0, 1 / 5, 1, 4)  # of the config's weight decay
USUAL_DECAY = 0.05  # where the config has none
WARMUP = 0.1  # share of a short run's steps
BEST = 3  # learning rates in the grid
FAR_ABOVE = 1.5  # times the untrained model's loss; a rate too small to learn stays near it
RESULT = "result.json"
PAGE = ("report.html", "report.md", "lr_sweep.png", "heatmap.png")  # written when all is done


@dataclass(frozen=True)
class Plan:
    """What is tried; learning rates and weight decays are the config's own keys, unscaled."""

    lrs: tuple[float, ...]
    weight_decays: tuple[float, ...]
    steps: int = 100
    overfit_faces: int = 64
    overfit_steps: int = 300


def make_plan(config: ml_collections.ConfigDict, arguments: argparse.Namespace) -> Plan:
    """The plan that the command line asks for; ValueError in one line for what cannot be done."""
    lr, decay = config.optim.lr, config.optim.weight_decay
    lrs = parse_grid(arguments.lrs, "--lrs") or [_rounded(lr * f) for f in LR_FACTORS]
    if min(lrs) <= 0:
        raise ValueError(f"--lrs={arguments.lrs}: a learning rate must be above 0")
    decays = parse_grid(arguments.weight_decays, "--weight-decays")
    decays = decays or [_rounded((decay or USUAL_DECAY) * f) for f in DECAY_FACTORS]
    for name in ("steps", "overfit_faces", "overfit_steps"):
        if (value := getattr(arguments, name)) < 1:
            raise ValueError(f"--{name.replace('_', '-')}={value}: give 1 or more")
    return Plan(
        lrs=tuple(sorted(set(lrs))),
        # The sweep is run at the config's weight decay, so that column is there already.
        weight_decays=tuple(sorted({*decays, decay})),
        steps=arguments.steps,
        overfit_faces=arguments.overfit_faces,
        overfit_steps=arguments.overfit_steps,
    )


def parse_grid(text: str | None, flag: str) -> list[float]:
    """The numbers of `1e-4,3e-4`, [] for None; ValueError where there is none, or another thing."""
    if text is None:
        return []
    words = [word for word in text.split(",") if word.strip()]
    if not words:
        raise ValueError(f"{flag} is an empty grid: give numbers with commas, as in {flag}=0.1,0.2")
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        raise ValueError(f"{flag}={text}: give numbers with commas, as in {flag}=0.1,0.2") from None
    if not all(math.isfinite(number) and number >= 0 for number in numbers):
        raise ValueError(f"{flag}={text}: every number must be 0 or more, and finite")
    return numbers


def _rounded(value: float) -> float:
    """Two digits: a grid of round numbers is easier to read and to repeat."""
    return float(f"{value:.2g}")


# --- short runs ----------------------------------------------------------------------------------


@dataclass
class Clock:
    """Progress lines with the time left, and the end of `max_minutes` for all runs together."""

    total_runs: int
    total_steps: int
    max_minutes: float = 0.0
    runs: int = 0
    steps: int = 0
    trained: int = 0  # steps of this process, which the forecast rests on
    started: float = field(default_factory=time.monotonic)

    def line(self, what: str) -> str:
        """`[tune] run 3 of 18: … (ETA 12:10)` for the run that comes next."""
        seconds = time.monotonic() - self.started
        pace = seconds / max(1, self.trained)
        eta = f" (ETA {duration(pace * (self.total_steps - self.steps))})" if self.trained else ""
        return f"[tune] run {self.runs + 1} of {self.total_runs}: {what}{eta}"

    def done(self, steps: int, *, trained: bool) -> None:
        self.runs, self.steps = self.runs + 1, self.steps + steps
        self.trained += steps * trained

    def minutes_left(self) -> float:
        """Minutes for the next run, 0 for no end; less than 0 where the time is over."""
        if not self.max_minutes:
            return 0.0
        left = self.max_minutes - (time.monotonic() - self.started) / 60
        return left if left > 0 else -1.0


def short_setting(setting: Setting, *, steps: int, evaluations: int = 1, **changes: Any) -> Setting:
    """The setting of a run of so many steps, with dotted config keys changed."""
    config = setting.config.copy_and_resolve_references()
    config.update_from_flattened_dict(changes)
    config.epochs = steps * config.batch_size / len(setting.train_faces)
    config.optim.warmup_epochs = WARMUP * config.epochs
    config.monitor.every_epochs = config.epochs / evaluations
    config.log_every = max(1, steps // 10)
    schedule = make_schedule(config, faces=len(setting.train_faces))
    return replace(setting, config=config, schedule=schedule)


def short_run(
    setting: Setting, folder: Path, clock: Clock, *, trackers: Sequence[Callable] = ()
) -> dict[str, Any] | None:
    """The result of one run: 'status' ('done' or 'diverged'), 'mae' and 'accuracy' of the
    validation faces, 'loss' (the last training losses' mean), 'seconds'. None: it was stopped.

    A run that has its result in `folder` is not repeated. Its checkpoints are deleted at the end.
    """
    steps = setting.schedule.total_steps
    if (folder / RESULT).is_file():
        check_same_data(folder, setting)
        clock.done(steps, trained=False)
        return read_json(folder / RESULT)
    minutes = clock.minutes_left()
    if minutes < 0:
        return None
    schedule = replace(setting.schedule, max_minutes=minutes)
    setting = replace(setting, workdir=folder, schedule=schedule)
    result: dict[str, Any] = {"status": "done", "mae": None, "accuracy": None, "loss": None}
    try:
        if not finetune.train(setting, trackers=trackers, traced_rates=True):
            return None
        log = MetricsLog(folder)
        losses = [row["loss"] for row in log.rows("train")]
        scores = [row for row in log.rows("validation") if math.isfinite(row["mae"])]
        if not scores:
            raise Diverged("the validation error is no number")
        best = min(scores, key=lambda row: row["mae"])
        result |= {key: best[key] for key in ("mae", "accuracy")}
        result["loss"] = float(np.mean(losses[-3:]))
        result["seconds"] = read_json(folder / "run.json")["wall_seconds"]
    except Diverged as error:
        # Without its metrics and advice, which are in brackets and after them.
        result |= {"status": "diverged", "why": str(error).partition(" (")[0], "seconds": None}
    write_json(folder / RESULT, result)
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
    clock.done(steps, trained=True)
    return result


# --- the four steps ------------------------------------------------------------------------------


def open_tuning(config: ml_collections.ConfigDict, workdir: Path) -> Setting:
    """The setting that all runs share; ValueError where `workdir` is that of something else."""
    if (workdir / FOLDER).is_dir():
        raise ValueError(f"{workdir} holds a training run; give the tuning a --workdir of its own")
    setting = finetune.open_finetuning(config, workdir)
    check_same_config(config, workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    save_config(config, workdir / "config.json")
    return setting


def run(
    config: ml_collections.ConfigDict, workdir: Path, *, plan: Plan, flags: Sequence[str] = ()
) -> bool:
    """Tune into `workdir`, skipping what is finished; whether all four steps were done.

    `flags` are the words of the command line that set the config, for the command to go on with.
    Writes tune.json and tune.csv after every run, and at the end lr_sweep.png, heatmap.png and
    report.html.
    """
    setting = open_tuning(config, workdir)
    for name in PAGE:  # of an earlier plan; a finished one is drawn again
        (workdir / name).unlink(missing_ok=True)
    ages = {"train": setting.train_faces.labels["age"]}
    ages["validation"] = setting.validation_faces.labels["age"]
    result: dict[str, Any] = {
        "finished": False,
        "flags": list(flags),
        "plan": asdict(plan),
        "config": {
            "lr": config.optim.lr,
            "weight_decay": config.optim.weight_decay,
            "batch_size": config.batch_size,
        },
        "data": {"name": config.data.name, "faces": {k: len(v) for k, v in ages.items()}},
        "fingerprint": setting.train_faces.fingerprint,
        "constant_mae": mae(
            ages["validation"], np.full(len(ages["validation"]), np.median(ages["train"]))
        ),
        "environment": environment(),
        "runs": [],
    }
    grid_runs = min(BEST, len(plan.lrs)) * (len(plan.weight_decays) - 1)
    short_runs = len(plan.lrs) + grid_runs
    clock = Clock(
        total_runs=1 + short_runs,
        total_steps=plan.overfit_steps + short_runs * plan.steps,
        max_minutes=config.max_minutes,
    )
    result["untrained"] = _untrained(setting)
    if not _overfit(setting, plan, clock, result):
        return _stopped(clock)

    def try_rates(lr: float, decay: float, part: str) -> bool:
        # More digits than are typed: rounded, two of them could share a folder and a result.
        name = f"lr{lr:.12g}_wd{decay:.12g}_{plan.steps}steps"
        if same := [row for row in result["runs"] if row["run"] == name]:
            same[0]["part"] += f"+{part}"
            return True
        print(clock.line(f"lr {lr:g}, weight decay {decay:g}, {plan.steps} steps"), flush=True)
        rates = {"optim.lr": lr, "optim.weight_decay": decay}
        found = short_run(
            short_setting(setting, steps=plan.steps, **rates), workdir / "runs" / name, clock
        )
        if found is None:
            return False
        found = judged(found, untrained=result["untrained"]["measured"])
        row = {"run": name, "part": part, "lr": lr, "weight_decay": decay, "steps": plan.steps}
        result["runs"].append(row | {key: found.get(key) for key in COLUMNS})
        _write(workdir, result)
        return True

    for lr in plan.lrs:
        if not try_rates(lr, config.optim.weight_decay, "sweep"):
            return _stopped(clock)
    for lr in grid_lrs(result["runs"]):
        for decay in plan.weight_decays:
            if not try_rates(lr, decay, "grid"):
                return _stopped(clock)
    result |= {"finished": True, "best": best_run(result["runs"])}
    result["command"] = recommended(result, workdir)
    _write(workdir, result)
    page = write_page(workdir, result)
    if warning := too_short(result):
        print(f"[tune] {warning}", flush=True)
    print(f"[tune] done: open {page}\n{result['command']}", flush=True)
    return True


COLUMNS = ("status", "mae", "accuracy", "loss", "seconds", "why")


def _untrained(setting: Setting) -> dict[str, Any]:
    found = untrained_loss(setting)
    same = "as it should be" if found["agrees"] else "they do not agree: look at labels and loss"
    print(
        f"[tune] untrained, {found['loss_name']}: loss {found['measured']:.4g}, "
        f"in theory {found['theory']:.4g}; {same}",
        flush=True,
    )
    return found


def _overfit(setting: Setting, plan: Plan, clock: Clock, result: dict[str, Any]) -> bool:
    few = by_heart(setting, faces=plan.overfit_faces, steps=plan.overfit_steps, warmup=WARMUP)
    print(clock.line(f"{len(few.train_faces)} faces by heart"), flush=True)
    folder = setting.workdir / "runs" / f"overfit_{len(few.train_faces)}_{plan.overfit_steps}steps"
    found = short_run(few, folder, clock)
    if found is None:
        return False
    rows = [] if found["status"] == "diverged" else MetricsLog(folder).rows("train")
    ages = few.train_faces.labels["age"]
    result["overfit"] = by_heart_verdict(few.config, ages, rows, found["mae"])
    print(f"[tune] by heart? {result['overfit']['in_words']}", flush=True)
    _write(setting.workdir, result)
    return True


def _stopped(clock: Clock) -> bool:
    print(
        f"[tune] stopped after {clock.runs} of {clock.total_runs} runs; the same command goes on",
        flush=True,
    )
    return False


def judged(found: Mapping[str, Any], *, untrained: float) -> dict[str, Any]:
    """The result of a run, as 'diverged' too where its loss ended far above the untrained one."""
    if found["status"] == "done" and found["loss"] > FAR_ABOVE * untrained:
        why = f"the loss ended at {found['loss']:.3g}, an untrained model's is {untrained:.3g}"
        return {**found, "status": "diverged", "why": why}
    return dict(found)


def best_run(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The run with the least validation error that did not diverge; ValueError where all did."""
    good = [row for row in rows if row["status"] == "done"]
    if not good:
        tried = ", ".join(f"{row['lr']:g}" for row in rows)
        raise ValueError(
            f"every run diverged (learning rates {tried}): give smaller ones with --lrs"
        )
    return min(good, key=lambda row: row["mae"])


def grid_lrs(rows: Sequence[Mapping[str, Any]], count: int = BEST) -> list[float]:
    """The best learning rate of the sweep and its neighbours, `count` in all where there are."""
    sweep = sorted((row for row in rows if "sweep" in row["part"]), key=lambda row: row["lr"])
    at = [row["lr"] for row in sweep].index(best_run(sweep)["lr"])
    start = max(0, min(at - count // 2, len(sweep) - count))
    return [row["lr"] for row in sweep[start : start + count]]


def recommended(result: Mapping[str, Any], workdir: Path) -> str:
    """The command that fine-tunes with what was found."""
    best = result["best"]
    found = {"optim.lr": best["lr"], "optim.weight_decay": best["weight_decay"]}
    return finetune_command(result["flags"], found, workdir / "best")


def finetune_command(flags: Sequence[str], found: Mapping[str, Any], workdir: Path) -> str:
    """`coatnet-jax finetune` with the flags that were given and the values that were found."""
    keys = tuple(f"--config.{key}" for key in (*found, "max_minutes"))
    kept = [flag for flag in flags if flag.partition("=")[0] not in keys]
    values = [
        f"--config.{key}={value:g}" if isinstance(value, float) else f"--config.{key}={value}"
        for key, value in found.items()
    ]
    return shlex.join(["coatnet-jax", "finetune", *kept, *values, f"--workdir={workdir}"])


def config_flags(argv: Sequence[str]) -> tuple[str, ...]:
    """The words of a command line that set the config, as `--flag=value` each."""
    words = join_values(list(argv))
    return tuple(word for word in words if word.partition("=")[0].startswith("--config"))


def _write(workdir: Path, result: Mapping[str, Any]) -> None:
    write_json(workdir / "tune.json", result)
    if result["runs"]:
        write_csv(workdir / "tune.csv", result["runs"])

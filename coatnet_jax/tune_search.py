"""A search of fine-tuning's hyperparameters with Optuna: TPE, pruned by the median.

    coatnet-jax tune --search=30 --config=finetune:micro,cpu --workdir=runs/search

Every trial is a short fine-tuning; its validation error is told to Optuna a few times on the way,
and a trial that lies behind the median of the others at that time ends there. Trials are kept in
`optuna.sqlite3`, so the same command goes on, and with a larger number it adds to them. The space
is that of `configs/sweep.yaml`, which is for Weights & Biases.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections

from coatnet_jax.checkpoint import FOLDER
from coatnet_jax.logs import MetricsLog, environment
from coatnet_jax.pages import write_csv, write_json
from coatnet_jax.stage import Setting
from coatnet_jax.tune import Clock, finetune_command, open_tuning, short_run, short_setting
from coatnet_jax.tune_plots import search_history

DATABASE = "optuna.sqlite3"
EVALUATIONS = 5  # of a trial: as often it may be pruned
STARTUP = 5  # trials before any is pruned

# A pair is a range on a log scale. The others are a few values each: what changes the compiled step
# is compiled once for each value.
SPACE: dict[str, tuple[float, ...]] = {
    "optim.lr": (1e-5, 1e-2),
    "optim.weight_decay": (1e-3, 0.3),
    "optim.layer_decay": (0.65, 0.75, 0.85, 1.0),
    "model.drop_path": (0.0, 0.1, 0.2, 0.3),
    "mixup": (0.0, 0.1, 0.2, 0.4),
    "augment.erase_prob": (0.0, 0.25, 0.5),
    "loss.sigma": (1.0, 2.0, 3.0),
}
USES_SIGMA = ("kl_l1", "dldl")


def run(
    config: ml_collections.ConfigDict,
    workdir: Path,
    *,
    trials: int,
    steps: int = 100,
    flags: tuple[str, ...] = (),
) -> bool:
    """Search until `trials` trials are finished; whether it came so far.

    Finished are complete, pruned and diverged ones; those that were stopped are taken up again.
    Writes search.csv, search.json and search.png, and prints the command of the best trial. Raises
    ValueError where `trials` is less than 1, Optuna is missing or no trial was completed.
    """
    if trials < 1:
        raise ValueError(f"--search={trials}: give the number of trials, 1 or more")
    if steps < EVALUATIONS:
        raise ValueError(f"--steps={steps}: a trial is evaluated {EVALUATIONS} times, give as many")
    optuna = import_optuna()
    setting = open_tuning(config, workdir)
    study = open_study(optuna, workdir, seed=config.seed, name=f"{steps}steps")
    take_up_stopped(optuna, study)
    before = len(finished(optuna, study))
    left = max(0, trials - before)
    clock = Clock(left, left * steps, max_minutes=config.max_minutes)
    if before:
        print(f"[search] {before} trials were finished before", flush=True)
    for _ in range(left):
        if not one_trial(optuna, study, setting, workdir, steps, clock):
            print("[search] stopped; the same command goes on", flush=True)
            return False
        write_csv(workdir / "search.csv", rows(study))
    report(optuna, study, config, workdir, steps=steps, flags=flags)
    return True


def import_optuna():
    """The package; ValueError with the command that installs it where it is missing."""
    try:
        import optuna
    except ImportError:
        raise ValueError("--search needs Optuna: pip install 'optuna>=4'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def open_study(optuna, workdir: Path, *, seed: int, name: str):
    """The study of that name in the workdir's database, made where there is none."""
    storage = f"sqlite:///{(workdir / DATABASE).resolve()}"
    study = optuna.create_study(
        study_name=name,
        storage=storage,
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP),
    )
    # With the seed alone, a search that goes on would draw the same trials again.
    study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials))
    return study


def finished(optuna, study) -> list:
    """Trials that count: complete, pruned, or diverged (failed with a reason)."""
    states = optuna.trial.TrialState
    return [
        trial
        for trial in study.trials
        if trial.state in (states.COMPLETE, states.PRUNED)
        or (trial.state == states.FAIL and "why" in trial.user_attrs)
    ]


def take_up_stopped(optuna, study) -> None:
    """Queue the trials that were running when the process ended, with folders and values."""
    states = optuna.trial.TrialState
    for trial in study.get_trials(states=(states.RUNNING,)):
        study.tell(trial.number, state=states.FAIL)
        if trial.params:
            folder = trial.user_attrs.get("folder", folder_name(trial.number))
            study.enqueue_trial(trial.params, user_attrs={"folder": folder})


def folder_name(number: int) -> str:
    return f"trial{number:03}"


def suggest(trial, config: ml_collections.ConfigDict) -> dict[str, float]:
    """Values for the keys of the space that this config uses."""
    values = {}
    for key, choices in SPACE.items():
        if key == "loss.sigma" and config.loss.name not in USES_SIGMA:
            continue
        if len(choices) == 2:
            values[key] = trial.suggest_float(key, *choices, log=True)
        else:
            values[key] = trial.suggest_categorical(key, choices)
    return values


def one_trial(optuna, study, setting: Setting, workdir: Path, steps: int, clock: Clock) -> bool:
    """Run one trial and tell the study how it ended; False where it was stopped."""
    states = optuna.trial.TrialState
    trial = study.ask()
    values = suggest(trial, setting.config)
    folder = trial.user_attrs.get("folder") or folder_name(trial.number)
    trial.set_user_attr("folder", folder)
    shown = ", ".join(f"{key.split('.')[-1]} {value:.3g}" for key, value in values.items())
    print(clock.line(shown).replace("[tune] run", "[search] trial"), flush=True)

    def watch(step: int, split: str, metrics: Mapping[str, float]) -> None:
        if split == "validation":
            trial.report(metrics["mae"], step)
            if trial.should_prune() and step < steps:
                raise optuna.TrialPruned

    # Trials of another length are another study, whose numbers begin anew.
    folder = workdir / "trials" / f"{steps}steps" / folder
    for row in MetricsLog(folder).rows("validation"):  # of a trial that was stopped
        trial.report(row["mae"], row["step"])
    setting = short_setting(setting, steps=steps, evaluations=EVALUATIONS, **values)
    try:
        found = short_run(setting, folder, clock, trackers=[watch])
    except optuna.TrialPruned:
        study.tell(trial, state=states.PRUNED)
        shutil.rmtree(folder / FOLDER, ignore_errors=True)
        print("[search] pruned: behind the median of the others", flush=True)
        clock.done(steps, trained=True)
        return True
    if found is None:
        return False  # it stays running in the database, which `take_up_stopped` looks for
    if found["status"] == "diverged":
        trial.set_user_attr("why", found["why"])
        study.tell(trial, state=states.FAIL)
        print(f"[search] diverged: {found['why']}", flush=True)
    else:
        study.tell(trial, found["mae"])
    return True


def rows(study) -> list[dict[str, Any]]:
    """Every trial as a row: number, state, validation MAE (the last one of a pruned trial's), …"""
    found = []
    for trial in study.trials:
        last = trial.intermediate_values.get(trial.last_step)
        why = trial.user_attrs.get("why", "")
        state = trial.state.name.lower()
        if state == "fail":
            state = "diverged" if why else "stopped"
        seconds = trial.duration.total_seconds() if trial.duration else None
        row = {"trial": trial.number, "state": state}
        row["mae"] = last if trial.value is None else trial.value
        row |= {key: trial.params.get(key) for key in SPACE}
        found.append(
            row | {"seconds": seconds, "folder": trial.user_attrs.get("folder"), "why": why}
        )
    return found


def report(
    optuna,
    study,
    config: ml_collections.ConfigDict,
    workdir: Path,
    *,
    steps: int,
    flags: tuple[str, ...],
) -> None:
    """Write the search's files and print the command of the best trial."""
    table = rows(study)
    write_csv(workdir / "search.csv", table)
    complete = [row for row in table if row["state"] == "complete"]
    if not complete:
        raise ValueError(
            f"no trial of {len(table)} was completed (see {workdir / 'search.csv'}): give more "
            "trials with --search, or look at the learning rates of SPACE"
        )
    best = min(complete, key=lambda row: row["mae"])
    values = {key: float(f"{best[key]:.3g}") for key in SPACE if best[key] is not None}
    command = finetune_command(flags, values, workdir / "best")
    counts = {
        state: sum(row["state"] == state for row in table)
        for state in dict.fromkeys(row["state"] for row in table)
    }
    write_json(
        workdir / "search.json",
        {
            "best": best,
            "command": command,
            "trials": counts,
            "steps": steps,
            "environment": environment(),
        },
    )
    search_history(workdir / "search.png", table, keys=tuple(values))
    ended = ", ".join(f"{count} {state}" for state, count in counts.items())
    print(
        f"[search] {ended}; best validation MAE {best['mae']:.2f} years (trial {best['trial']})\n"
        f"{command}",
        flush=True,
    )

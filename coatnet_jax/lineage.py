"""Where a run's weights come from: the stages that they went through before."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_collections

from coatnet_jax.config import read_config, read_json


def stages_before(run_dir: str | Path) -> list[dict[str, Any]]:
    """The stages before a run's own, the first one first: stage, image_size, data, splits,
    fingerprint, epochs, and method of a pre-training; of timm's weights the name.

    They are those that its run.json tells, as that of a released model does, or else those of
    `stages_behind`. Raises ValueError where the folder of one is gone.
    """
    run_dir = Path(run_dir)
    if told := read_json(run_dir / "run.json", optional=True).get("before"):
        return told
    return stages_behind(read_config(run_dir / "config.json"))


def stages_behind(config: ml_collections.ConfigDict) -> list[dict[str, Any]]:
    """The stages that a run of this config starts from, and then those of its teachers, which say
    under `teacher` whose model that is. Raises ValueError as `stages_before` does."""
    before = stages_until(config.get("init_from", ""))
    for folder in teacher_folders(config):
        stages = stages_until(str(folder))
        name = read_config(folder / "config.json").model.name
        before += [{**stage, "teacher": stage.get("teacher", name)} for stage in stages]
    return before


def teacher_folders(config: ml_collections.ConfigDict) -> tuple[Path, ...]:
    """The runs whose answers a run of this config learns from; most have none."""
    named = config.get("distill", {}).get("teachers", "").split(",")
    return tuple(Path(os.path.expanduser(name.strip())) for name in named if name.strip())


def folders_behind(config: ml_collections.ConfigDict) -> Iterator[Path]:
    """The runs that a run of this config starts from and learns from, and those behind them, as far
    as their folders are still there."""
    start = [Path(config.init_from)] if config.get("init_from", "") else []
    for folder in (*start, *teacher_folders(config)):
        if (folder / "config.json").is_file():
            yield folder
            yield from folders_behind(read_config(folder / "config.json"))


def stages_until(run_dir: str) -> list[dict[str, Any]]:
    """The stages up to this run, its own the last one; none where '' stands for random weights.

    Raises ValueError as `stages_before` does.
    """
    if not run_dir:
        return []
    run_dir = Path(run_dir)
    path = run_dir / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{path} is missing, which says where the weights come from: put the folder of the run "
            "back, or correct its name in the config.json of the run after it"
        )
    return [*stages_before(run_dir), own_stage(run_dir)]


def own_stage(run_dir: Path) -> dict[str, Any]:
    """What a run itself is among the stages: as in `stages_before`."""
    config = read_config(run_dir / "config.json")
    run = read_json(run_dir / "run.json", optional=True)
    stage = {"stage": config.stage, "image_size": config.model.image_size}
    if config.stage == "timm":
        stage["name"] = config.timm.name
    else:
        stage |= {"data": config.data.name, "splits": config.data.splits, "epochs": config.epochs}
        stage |= {"fingerprint": run.get("data_fingerprint", "")}
        stage |= {"method": config.method} if "method" in config else {}
    return stage | ({"averaged": run["averaged"]} if "averaged" in run else {})

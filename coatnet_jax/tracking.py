"""Metrics to TensorBoard or Weights & Biases too, for those who ask for it with `config.track`."""

import importlib
import uuid
from collections.abc import Callable
from pathlib import Path

import ml_collections

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
Tracker = Callable[..., None]


def open_trackers(config: ml_collections.ConfigDict, workdir: Path) -> list[Tracker]:
    """A function `(step, split, metrics)` for each name in `config.track`, separated by commas.

    TensorBoard files go to `workdir`/tensorboard. Raises ValueError for another name, where the
    package is not installed, and where Weights & Biases refuses the run.
    """
    names = [name for name in config.get("track", "").split(",") if name]
    return [_tracker(name, config, workdir) for name in names]


def _tracker(name: str, config: ml_collections.ConfigDict, workdir: Path) -> Tracker:
    if name not in PACKAGES:
        raise ValueError(f"unknown config.track {name!r}: choose from {', '.join(PACKAGES)}")
    try:
        package = importlib.import_module(PACKAGES[name])
    except ImportError:
        raise ValueError(
            f"config.track={name} needs a package: pip install {PACKAGES[name]}"
        ) from None
    if name == "tensorboard":
        writer = package.SummaryWriter(str(workdir / "tensorboard"))

        def track(step: int, split: str, metrics: dict[str, float]) -> None:
            for key, value in metrics.items():
                writer.add_scalar(f"{split}/{key}", value, step)
            writer.flush()

    else:
        # A resumed run goes on in the same curves; one of the same name elsewhere has its own.
        told = workdir / "wandb_id"
        if not told.is_file():
            workdir.mkdir(parents=True, exist_ok=True)
            told.write_text(uuid.uuid4().hex[:12])
        package.finish()  # of the short run before, where `tune` makes many in one process
        try:
            run = package.init(
                project="coatnet-jax",
                name=workdir.name,
                id=told.read_text(),
                resume="allow",
                dir=str(workdir),
                config=config.to_dict(),
            )
        except package.Error as error:
            raise ValueError(
                f"config.track=wandb: {error} Log in with `wandb login`, set WANDB_MODE=offline in "
                "the environment, or leave it out"
            ) from None

        def track(step: int, split: str, metrics: dict[str, float]) -> None:
            run.log({f"{split}/{key}": value for key, value in metrics.items()}, step=step)

    return track

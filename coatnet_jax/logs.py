"""What a run writes beside its checkpoints, and its progress lines."""

import importlib.metadata
import json
import math
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import jax
import ml_collections

from coatnet_jax.config import read_json, save_config
from coatnet_jax.distributed import is_main
from coatnet_jax.lineage import stages_behind
from input_pipeline.files import write_whole
from input_pipeline.progress import duration

PACKAGES = ("coatnet-jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def write_run_info(
    workdir: Path,
    config: ml_collections.ConfigDict,
    *,
    data_fingerprint: str,
    parameters: int,
    label_digest: str = "",
    validation_faces: int | None = None,
) -> None:
    """config.json (resolved) and run.json: versions, revision, data, device, command, start, and
    the stages before."""
    workdir.mkdir(parents=True, exist_ok=True)
    save_config(config, workdir / "config.json")
    info = {
        "stage": config.stage,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "parameters": parameters,
        "data_fingerprint": data_fingerprint,
        "label_digest": label_digest,
        **({} if validation_faces is None else {"validation_faces": validation_faces}),
        **environment(),
    }
    # Kept here, so that it is still known where the folders of those are moved or deleted.
    with suppress(ValueError):  # one is gone already
        info["before"] = stages_behind(config)
    write_whole(workdir / "run.json", json.dumps(info, indent=2) + "\n")


def environment() -> dict:
    """What a result depends on besides config and data: command, revision, versions, machine."""
    return {
        "command": shlex.join(sys.argv),  # to be given again, whatever stands in its paths
        "git_revision": _git_revision(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "processes": jax.process_count(),
        "devices": [f"{d.platform} {d.device_kind}" for d in jax.devices()],
        "machine": f"{platform.machine()} {platform.processor()}".strip(),
    }


def update_run_info(workdir: Path, **values) -> None:
    """Add or replace entries of run.json."""
    path = workdir / "run.json"
    info = read_json(path) | values
    write_whole(path, json.dumps(info, indent=2) + "\n")


class MetricsLog:
    """metrics.jsonl: one JSON object a line with step, epoch, split and the metrics.

    Of several processes only the main one writes it. `trackers` are functions
    `(step, split, metrics)` that get the same.
    """

    def __init__(self, workdir: Path, *, trackers: Sequence[Callable] = ()):
        self.path = workdir / "metrics.jsonl"
        self.trackers = trackers

    def write(self, *, step: int, epoch: float, split: str, **metrics: float) -> None:
        if not is_main():
            return
        row = {"step": step, "epoch": round(epoch, 4), "split": split}
        row |= {key: float(f"{value:.6g}") for key, value in metrics.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        for track in self.trackers:
            track(step, split, metrics)

    def rows(self, split: str) -> list[dict]:
        """All rows of one split, oldest first."""
        if not self.path.is_file():
            return []
        rows = map(_parsed, self.path.read_text().splitlines())
        return [row for row in rows if row.get("split") == split]

    def keep_until(self, step: int) -> None:
        """Drop rows after `step`, so that a resumed run's log equals that of one never stopped,
        and what a lost machine left of a row."""
        if is_main() and self.path.is_file():
            lines = self.path.read_text().splitlines(keepends=True)
            kept = (line for line in lines if _parsed(line).get("step", math.inf) <= step)
            write_whole(self.path, "".join(kept))


def _parsed(line: str) -> dict:
    """A row of the log; {} for one that was cut off."""
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


class Progress:
    """Progress lines: step, epoch, images/s since the last line, time left, metrics."""

    def __init__(
        self, *, name: str, start: int, total: int, steps_per_epoch: float, batch_size: int
    ):
        self.name, self.total, self.batch_size = name, total, batch_size
        self.steps_per_epoch = steps_per_epoch
        self.step, self.time = start, time.perf_counter()
        self.rate: float | None = None

    def line(self, step: int, metrics: dict[str, float]) -> str:
        """The line for `step`, which is later than the step of the last line."""
        now = time.perf_counter()
        rate = (step - self.step) / max(now - self.time, 1e-9)
        # A moving average: one slow stretch (an evaluation, another process) is not the forecast.
        self.rate = rate if self.rate is None else 0.7 * self.rate + 0.3 * rate
        self.step, self.time = step, now
        metrics = {"loss": metrics["loss"], **metrics}  # first, wherever jit put it
        values = " ".join(f"{key} {value:.4g}" for key, value in metrics.items())
        return (
            f"[{self.name}] step {step}/{self.total} epoch {step / self.steps_per_epoch:.2f} "
            f"{rate * self.batch_size:.0f} images/s "
            f"ETA {duration((self.total - step) / self.rate)} | {values}"
        )

    def compiled(self, step: int) -> None:
        """Forget the rate up to `step`, the first one: most of its time was the compiler's."""
        self.rate = None
        self.pause(step)

    def pause(self, step: int) -> None:
        """Measure the next rate from now on: an evaluation or a save at `step` is no part of it."""
        self.step, self.time = step, time.perf_counter()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _git_revision() -> str:
    """Revision of the checkout this package runs from, '+' where it has changes; '' elsewhere."""
    here = Path(__file__).resolve().parent.parent

    def git(*args: str) -> str:
        done = subprocess.run(
            ["git", "-C", here, *args], capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    if not (here / ".git").exists():
        return ""
    return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain") else "")

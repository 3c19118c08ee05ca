"""The curves of a training over its steps, from its metrics.jsonl."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from coatnet_jax.palette import BLUE, GREEN, ORANGE, PINK
from coatnet_jax.plots import STYLE, save_figure

# What is worth a panel, in this order; anything else follows by name.
PANEL_TITLES = {
    "loss": "loss",
    "mae": "MAE in years",
    "accuracy": "accuracy of the 4 classes",
    "contrastive_top1": "other view found in the batch",
    "knn_mae": "kNN MAE in years",
    "probe_mae": "probe MAE in years",
    "embedding_std": "spread of the embedding",
    "rank_me": "RankMe",
    "alignment": "alignment: views apart",
    "uniformity": "uniformity: below 0 where spread",
    "cs5": "within 5 years",
    "lr": "learning rate",
    "learning_rate": "learning rate",
}
NOT_CURVES = {"step", "epoch", "split", "time", "seconds", "images", "weight"}


def read_metrics(path: str | Path) -> list[dict]:
    """Rows of a metrics.jsonl; lines that are not JSON (a run cut while writing) are left out."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


def training_curves(
    path: str | Path,
    metrics: str | Path | Sequence[Mapping],
    *,
    title: str = "",
    most_panels: int = 6,
) -> Path:
    """Curves over the steps of every number in a metrics.jsonl (or its rows), by split.

    A resumed run writes some steps twice: the later line counts. Raises ValueError when no line
    holds a number.
    """
    rows = read_metrics(metrics) if isinstance(metrics, str | Path) else list(metrics)
    curves = _curves(rows)
    if not curves:
        raise ValueError(
            f"no numbers to draw in {metrics if isinstance(metrics, str | Path) else 'rows'}"
        )
    names = [n for n in PANEL_TITLES if n in curves]
    names += sorted(n for n in curves if n not in PANEL_TITLES)
    names = names[:most_panels]
    columns = min(len(names), 3)
    with matplotlib.rc_context(STYLE):
        figure = Figure(
            figsize=(max(4.6 * columns, 6), 3.3 * math.ceil(len(names) / columns)),
            layout="constrained",
        )
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        for place, name in enumerate(names, 1):
            ax = figure.add_subplot(math.ceil(len(names) / columns), columns, place)
            for split, (steps, values) in curves[name].items():
                _curve(ax, split, steps, values, smooth=name not in ("lr", "learning_rate"))
            ax.set_title(PANEL_TITLES.get(name, name.replace("_", " ")))
            ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            ax.set_xlabel("step")
            ax.grid(True, linewidth=0.7)
            ax.tick_params(length=0)
            ax.legend(fontsize=9.5)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold")
        return save_figure(figure, path)


def _curves(rows) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """{metric: {split: (steps, values)}}, each step once, in order."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if name not in NOT_CURVES and not name.endswith("per_second") and number:
                by_split = found.setdefault(name, {})
                by_split.setdefault(str(row.get("split", "train")), {})[row["step"]] = value
    return {
        name: {
            split: (np.array(sorted(points)), np.array([points[s] for s in sorted(points)], float))
            for split, points in by_split.items()
        }
        for name, by_split in found.items()
    }


def _curve(ax, split, steps, values, *, smooth) -> None:
    colour = {"train": BLUE, "validation": ORANGE, "test": GREEN}.get(split, PINK)
    if len(steps) < 60 or not smooth:
        marker = "o" if len(steps) < 25 else None
        ax.plot(
            steps, values, color=colour, linewidth=1.8, marker=marker, markersize=4, label=split
        )
        return
    width = max(len(steps) // 30, 3)
    kernel = np.ones(width) / width
    padded = np.pad(values, (width // 2, width - 1 - width // 2), "edge")
    ax.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
    ax.plot(
        steps,
        np.convolve(padded, kernel, "valid"),
        color=colour,
        linewidth=1.9,
        label=f"{split}, mean of {width}",
    )

"""The curves of a training over its steps, from its metrics.jsonl."""

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from coatnet_jax.config import read_json
from coatnet_jax.palette import BLUE, GREEN, MUTED, PINK, RED
from coatnet_jax.plots import STYLE, save_figure

Curves = dict[
    str, tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]
]  # {split: (steps, values)}

# What is worth a panel, in this order, with its title and its axis; anything else follows by name.
PANELS = {
    "loss": ("Loss", "loss"),
    "mae": ("Error of the age", "MAE, years"),
    "accuracy": ("Four age classes", "accuracy"),
    "contrastive_top1": ("Other view found in the batch", "accuracy"),
    "knn_mae": ("Age by nearest neighbours", "kNN MAE, years"),
    "probe_mae": ("Age by a linear probe", "probe MAE, years"),
    "embedding_std": ("Spread of the features", "spread, 0 to 1"),
    "rank_me": ("Dimensions in use", "RankMe"),
    "alignment": ("How far apart two views are", "alignment"),
    "uniformity": ("Uniformity: lower is more spread", "uniformity"),
    "grad_norm": ("Size of the gradient", "gradient norm"),
}
NOT_CURVES = {"step", "epoch", "split", "time", "seconds", "images", "weight"}
STAGES = {"pretrain": "Pre-training", "finetune": "Fine-tuning"}

START = 0.1  # share of the steps (untrained, warm-up) that has no say in the limits of an axis
FENCE = 3.0  # a training value further out than so many interquartile ranges is a spike
MANY = 20  # training values from which on one of them can be a spike: quartiles of fewer say little
SLACK = 1.5  # where all fits into so many times the chosen range, all is shown
LOG_FROM = 10.0  # largest over smallest later value from which on these are logarithmic:
LOGARITHMIC = ("loss", "grad_norm")
# Lines and marks tell the splits apart in grey print too.
LOOKS = {
    "train": {"color": BLUE, "linestyle": "-", "marker": ""},
    "validation": {"color": RED, "linestyle": (0, (5, 1.5)), "marker": "D"},
    "test": {"color": GREEN, "linestyle": (0, (1, 1)), "marker": "s"},
}
OTHER_LOOK = {"color": PINK, "linestyle": (0, (4, 1, 1, 1)), "marker": "^"}
NAMES = {"train": "training"}


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


def run_title(run_dir: str | Path) -> str:
    """'Fine-tuning of coatnet_0 at 128 px (run v)' for the folder v; 'Run v' where no config.json
    tells more."""
    folder = Path(run_dir).resolve().name
    config = read_json(Path(run_dir) / "config.json", optional=True)
    model = config.get("model", {})
    if not {"name", "image_size"} <= set(model):
        return f"Run {folder}"
    stage = STAGES.get(config.get("stage"), "Training")
    return f"{stage} of {model['name']} at {model['image_size']} px (run {folder})"


def training_curves(
    path: str | Path,
    metrics: str | Path | Sequence[Mapping],
    *,
    title: str = "",
    most_panels: int = 6,
) -> Path:
    """Curves over the steps of every number in a metrics.jsonl (or its rows), by split.

    Axes are chosen for the course after the first tenth of the steps, and a panel says what lies
    outside; numbers that were measured only once are a line of text. A resumed run writes some
    steps twice: the later line counts. Raises ValueError when no line holds a number.
    """
    rows = read_metrics(metrics) if isinstance(metrics, str | Path) else list(metrics)
    curves = _curves(rows)
    if not curves:
        raise ValueError(
            f"no numbers to draw in {metrics if isinstance(metrics, str | Path) else 'rows'}"
        )
    names = [n for n in PANELS if n in curves]
    names += sorted(n for n in curves if n not in PANELS)
    courses = [n for n in names if any(len(steps) > 1 for steps, _ in curves[n].values())]
    once = [n for n in names if n not in courses] if courses else []
    names = (courses or names)[:most_panels]
    last = max(int(steps[-1]) for by_split in curves.values() for steps, _ in by_split.values())
    # Two in a line can be read on a page of text; an odd one out gets the first line for itself.
    columns = min(len(names), 2)
    odd = len(names) % columns
    lines = math.ceil(len(names) / columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2 if columns > 1 else 6.4, 2.75 * lines + 0.9))
        figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.04, hspace=0.07)
        grid = figure.add_gridspec(lines, columns)
        widths = dict.fromkeys((split for name in names for split in curves[name]), 0)
        for place, name in enumerate(names):
            line, column = divmod(place + odd * (place > 0), columns)
            ax = figure.add_subplot(grid[line, :] if odd and not place else grid[line, column])
            for split, width in _panel(ax, name, curves[name], last).items():
                widths[split] = max(widths[split], width)
            if line == lines - 1:
                ax.set_xlabel("step")
        figure.legend(
            handles=[_handle(split, width) for split, width in widths.items()],
            loc="outside upper left",
            ncols=len(widths),
            fontsize=11,
            borderaxespad=0.2,
            title=title or None,
            title_fontproperties={"size": 14, "weight": "bold"},
            alignment="left",
        )
        if once:
            told = _told_once({name: curves[name] for name in once})
            figure.supxlabel(told, x=0.01, ha="left", fontsize=11, linespacing=1.5)
        return save_figure(figure, path)


def readable_limits(curves: Curves, start: float) -> tuple[float, float]:
    """(low, high) of an axis on which the values from step `start` on are told apart.

    All validation values from there are inside, of the training's all but single spikes, if it has
    20 values or more; where little is gained by that, or nothing comes after `start`, all values
    are inside.
    """
    everything = np.concatenate([values for _, values in curves.values()])
    shown = _later(curves, start)
    if np.ptp(everything) <= SLACK * np.ptp(shown):
        shown = everything
    low, high = float(shown.min()), float(shown.max())
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _later(curves: Curves, start: float) -> Float[np.ndarray, " n"]:
    """Values from step `start` on, without the training's spikes; all where there are none."""
    later = [
        _without_spikes(values[steps >= start])
        if split == "train" and len(values) >= MANY
        else values[steps >= start]
        for split, (steps, values) in curves.items()
    ]
    return np.concatenate(later if any(map(len, later)) else [v for _, v in curves.values()])


def _without_spikes(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " m"]:
    if not len(values):
        return values
    low, high = np.quantile(values, [0.25, 0.75])
    reach = FENCE * (high - low)
    return values[(values >= low - reach) & (values <= high + reach)]


def outside(curves: Curves, low: float, high: float) -> tuple[str, str]:
    """('3 values below, down to 0.1', '1 value above, up to 29.4'): what the limits leave out, ''
    where nothing."""
    values = np.concatenate([values for _, values in curves.values()])
    below, above = values[values < low], values[values > high]
    return (
        f"{_counted(below)} below, down to {below.min():.3g}" if len(below) else "",
        f"{_counted(above)} above, up to {above.max():.3g}" if len(above) else "",
    )


def _counted(values) -> str:
    return f"{len(values)} value{'s' * (len(values) > 1)}"


def _panel(ax, name: str, curves: Curves, last: int) -> dict[str, int]:
    """One measure: its curves, an axis for their later course, and what lies outside of it.

    Gives back how many values of each split make a point of its line.
    """
    title, unit = PANELS.get(name, (name.replace("_", " ").capitalize(), name.replace("_", " ")))
    low, high = _limits(ax, name, curves, START * last)
    widths = {split: _curve(ax, split, *curve) for split, curve in curves.items()}
    ax.set(xlim=(-0.02 * last, 1.02 * last + 0.1), ylim=(low, high), ylabel=unit)
    ax.set_title(title)
    # On the right, for it is the first steps that leave the panel.
    for note, y in zip(outside(curves, low, high), (0.03, 0.97), strict=True):
        ax.text(
            0.99,
            y,
            note,
            transform=ax.transAxes,
            fontsize=10,
            color=MUTED,
            ha="right",
            va="top" if y > 0.5 else "bottom",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
            zorder=4,
        )
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    ax.grid(True, linewidth=0.7)
    ax.tick_params(length=0)
    return widths


def _limits(ax, name: str, curves: Curves, start: float) -> tuple[float, float]:
    """Limits of y, after making its axis logarithmic where that is the habit and worth it."""
    positive = all((values > 0).all() for _, values in curves.values())
    if name not in LOGARITHMIC or not positive:
        return readable_limits(curves, start)
    logs = {split: (steps, np.log(values)) for split, (steps, values) in curves.items()}
    if np.ptp(_later(logs, start)) < math.log(LOG_FROM):
        return readable_limits(curves, start)
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    low, high = np.exp(readable_limits(logs, math.inf))  # the first steps take little room here
    return float(low), float(high)


def _told_once(curves: Mapping[str, Curves]) -> str:
    """'Validation at step 2,046: kNN MAE 10.89 years, RankMe 59.45' of measures with one value."""
    found: dict[tuple[str, int], list[str]] = {}
    for name, by_split in curves.items():
        measure, _, unit = PANELS.get(name, ("", name.replace("_", " ")))[1].partition(", ")
        years = " years" * (unit == "years")
        for split, ([step], [value]) in by_split.items():
            found.setdefault((split, int(step)), []).append(f"{measure} {value:.4g}{years}")
    lines = [
        f"{NAMES.get(split, split).capitalize()} at step {step:,}: {', '.join(values)}"
        for (split, step), values in found.items()
    ]
    return "\n".join(textwrap.fill(line, 100) for line in lines)


def _curves(rows) -> dict[str, Curves]:
    """{metric: {split: (steps, values)}}, each step once, in order, finite numbers alone."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if name in NOT_CURVES or name.endswith("per_second") or not number:
                continue
            if math.isfinite(value):
                by_split = found.setdefault(name, {})
                by_split.setdefault(str(row.get("split", "train")), {})[row["step"]] = value
    return {
        name: {
            split: (np.array(sorted(points)), np.array([points[s] for s in sorted(points)], float))
            for split, points in by_split.items()
        }
        for name, by_split in found.items()
    }


def _curve(ax, split: str, steps, values) -> int:
    """Draw one curve, many training values as their moving mean over pale ones; gives back of how
    many it is, 1 where it is the values themselves."""
    look = LOOKS.get(split, OTHER_LOOK)
    marks = {"markersize": 6, "markevery": max(1, len(steps) // 20), "markeredgecolor": "white"}
    if split != "train" or len(steps) < 60:
        marker = look["marker"] or ("o" if len(steps) < 3 else "")
        ax.plot(steps, values, **{**look, "marker": marker}, linewidth=2, zorder=3, **marks)
        return 1
    width = max(len(steps) // 30, 3)
    kernel = np.ones(width) / width
    padded = np.pad(values, (width // 2, width - 1 - width // 2), "edge")
    ax.plot(steps, values, color=look["color"], linewidth=0.9, alpha=0.35)
    ax.plot(steps, np.convolve(padded, kernel, "valid"), **look, linewidth=2)
    return width


def _handle(split: str, width: int) -> Line2D:
    look = LOOKS.get(split, OTHER_LOOK)
    label = NAMES.get(split, split) + (f", mean of {width} (pale: each value)" if width > 1 else "")
    return Line2D([], [], **look, linewidth=2, markersize=6, markeredgecolor="white", label=label)

"""Figures of an evaluation: cumulative score, calibration, groups, largest errors, several runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from coatnet_jax.ages import CLASS_NAMES, age_class
from coatnet_jax.bootstrap import drawn_units
from coatnet_jax.groups import MINIMUM
from coatnet_jax.palette import BLUE, GREY, INK, MUTED, ORANGE, RED, SKY
from coatnet_jax.pictures import captioned, contact_sheet
from coatnet_jax.plots import STYLE, save_figure
from input_pipeline.pipeline import Faces, decode_image

WORST = 12  # faces on the sheet of the largest errors


def draw_all(out: Path, result: Mapping[str, Any]) -> None:
    """The figures that follow from what metrics.json holds; those of groups that nothing is known
    of are removed, which an earlier evaluation of other labels may have drawn."""
    for name in ("groups.png", "groups_age.png"):
        (out / name).unlink(missing_ok=True)
    cumulative_scores(out / "cs.png", result["cs"], constant=result["baseline"]["cs"])
    calibration(out / "calibration.png", result["calibration"])
    rows = [row for row in result.get("groups", []) if row["support"]]
    people = [row for row in rows if row["by"] in ("gender", "race", "gender × race")]
    if people:
        group_dots(out / "groups.png", [(row["group"], [row]) for row in people], result)
    ages = age_lines(rows)
    if ages:
        group_dots(out / "groups_age.png", ages, result, legend=("all", "male", "female"))


def cumulative_scores(
    path: Path, scores: Sequence[float], *, constant: Sequence[float] | None = None
) -> Path:
    """CS@1 to CS@10 as a curve, and beneath it that of always answering the median age."""
    years = np.arange(1, len(scores) + 1)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.4, 4.2))
        ax = figure.add_subplot()
        dots = {"linewidth": 2.2, "marker": "o"}
        if constant is not None:
            label = "always the median age"
            ax.plot(years, 100 * np.array(constant), color=GREY, label=label, **dots)
        ax.plot(years, 100 * np.array(scores), color=BLUE, label="model", **dots)
        for x, score in zip(years, scores, strict=True):
            ax.annotate(
                f"{100 * score:.0f}",
                (x, 100 * score),
                (0, 8),
                textcoords="offset points",
                ha="center",
                fontsize=10,
            )
        ax.set(
            xticks=years,
            xlim=(0.6, years[-1] + 0.4),
            ylim=(0, 108),
            yticks=range(0, 101, 20),
            xlabel="error of at most … years",
            ylabel="% of the faces",
        )
        ax.grid(axis="y", linewidth=0.7)
        ax.tick_params(length=0)
        ax.legend(loc="lower right")
        ax.set_title("Cumulative score", pad=10)
        return save_figure(figure, path)


def calibration(path: Path, found: Mapping[str, Any]) -> Path:
    """Reliability of the class probabilities, and the histogram of the age's PIT."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.15)
        left, right = figure.subplots(1, 2)
        _reliability(left, [row for row in found["reliability"] if row["support"]])
        left.set_title(f"Classes: ECE {100 * found['ece']:.1f} %", pad=10)
        shares = 100 * np.array(found["pit"])
        bins = len(shares)
        right.bar(np.arange(bins) + 0.5, shares, width=0.9, color=BLUE)
        right.axhline(100 / bins, color=RED, linewidth=1.4, linestyle=(0, (5, 3)))
        right.text(bins + 0.1, 100 / bins, " ideal", color=RED, va="center", fontsize=10)
        right.set(
            xlim=(-0.1, bins + 0.1),
            xticks=range(0, bins + 1, 2),
            xticklabels=[f"{i / bins:.1f}" for i in range(0, bins + 1, 2)],
            xlabel="where the true age falls in the predicted distribution",
            ylabel="% of the faces",
        )
        right.set_title(f"Ages: quantiles off by {100 * found['quantile_error']:.1f} %", pad=10)
        right.grid(axis="y", linewidth=0.7)
        for ax in (left, right):
            ax.tick_params(length=0)
        return save_figure(figure, path)


def _reliability(ax, rows: Sequence[Mapping[str, Any]]) -> None:
    """Accuracy over confidence; the area of a dot grows with the faces in it."""
    support = np.array([row["support"] for row in rows])
    x = [100 * row["confidence"] for row in rows]
    y = [100 * row["accuracy"] for row in rows]
    ax.plot([0, 100], [0, 100], color=RED, linewidth=1.4, linestyle=(0, (5, 3)))
    ax.text(3, 8, "ideal", color=RED, fontsize=10, rotation=40)
    ax.plot(x, y, color=SKY, linewidth=1.2, zorder=2)
    ax.scatter(x, y, s=20 + 380 * support / support.max(), color=BLUE, alpha=0.85, zorder=3)
    ax.set(
        xlim=(0, 102),
        ylim=(0, 104),
        xlabel="stated probability of the class answered, %",
        ylabel="answers that are right, %",
    )
    ax.grid(True, linewidth=0.7)


# --- groups --------------------------------------------------------------------------------------

SERIES_COLOURS = (INK, BLUE, ORANGE)
COLUMNS = (
    ("mae", "mean absolute error, years", 1),
    ("bias", "bias, years", 1),
    ("accuracy", "4 classes right, %", 100),
    ("covered", "inside the 90 % interval, %", 100),
)


def age_lines(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """A line for each band: the row of all its faces, then those of its genders, where known."""
    crossed = {row["group"]: row for row in rows if row["by"] == "age × gender"}
    lines = []
    for row in rows:
        if row["by"] == "age":
            genders = [crossed.get(f"{row['group']}, {name}") for name in ("male", "female")]
            lines.append((row["group"], [row, *genders]))
    return lines


def group_dots(
    path: Path,
    lines: Sequence[tuple[str, Sequence[Mapping[str, Any] | None]]],
    result: Mapping[str, Any],
    *,
    legend: Sequence[str] = (),
) -> Path:
    """Dots with 95 % intervals, a line for each group and a panel for each measure.

    The number over all faces is drawn as a line down; dots of too few faces are hollow.
    """
    overall = {
        "mae": result["mae"],
        "bias": result["bias"],
        "accuracy": result["accuracy"],
        "covered": result["conformal"]["covered"],
    }
    several = any(row is not None for _, found in lines for row in found[1:])
    with matplotlib.rc_context(STYLE):
        height = (0.52 if several else 0.34) * len(lines) + 1.3
        figure = Figure(figsize=(12.5, height), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08)
        panels = figure.subplots(1, len(COLUMNS), sharey=True)
        for ax, (key, title, scale) in zip(panels, COLUMNS, strict=True):
            for y, (_, found) in enumerate(lines):
                for k, row in enumerate(found):
                    if row is not None:
                        _dot(ax, row, key, scale, y + (0.26 * (k - 1) if several else 0), k)
            ax.axvline(scale * overall[key], color=RED, linewidth=1.2, linestyle=(0, (5, 3)))
            for y in _breaks(lines):
                ax.axhline(y, color="#C9CED6", linewidth=0.8)
            ax.set_xlabel(title)
            ax.grid(axis="x", linewidth=0.7)
            ax.tick_params(length=0)
        labels = [f"{name}  ({found[0]['support']:,})" for name, found in lines]
        panels[0].set_yticks(range(len(lines)), labels, fontsize=10, color=INK)
        panels[0].set_ylim(len(lines) - 0.4, -0.6)
        handles = _legend_handles(lines, legend if several else (), drawn_units(result))
        figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), fontsize=10)
        return save_figure(figure, path)


def _dot(ax, row, key: str, scale: float, y: float, k: int) -> None:
    colour = SERIES_COLOURS[k]
    if row[f"{key}_interval"]:
        ax.plot(
            scale * np.array(row[f"{key}_interval"]),
            [y, y],
            color=colour,
            linewidth=1.6,
            alpha=0.4 if row["few"] else 0.9,
        )
    face = "white" if row["few"] else colour
    ax.plot(scale * row[key], y, "o", markersize=6, color=colour, markerfacecolor=face)


def _breaks(lines) -> list[float]:
    """Where one kind of group ends and the next begins."""
    kinds = [found[0]["by"] for _, found in lines]
    return [i - 0.5 for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1]]


def _legend_handles(lines, names: Sequence[str], drawn: str) -> list[Line2D]:
    dot = {"marker": "o", "linestyle": ""}
    handles = [
        Line2D([], [], color=colour, label=name, **dot)
        for name, colour in zip(names, SERIES_COLOURS, strict=False)
    ]
    if any(row["few"] for _, found in lines for row in found if row is not None):
        label = f"fewer than {MINIMUM} {drawn}"
        handles.append(Line2D([], [], color=MUTED, markerfacecolor="white", label=label, **dot))
    return [*handles, Line2D([], [], color=RED, linestyle=(0, (5, 3)), label="over all faces")]


# --- faces ---------------------------------------------------------------------------------------


def worst_errors(
    path: Path,
    faces: Faces,
    rows: Int[np.ndarray, " n"],
    age: Int[np.ndarray, " n"],
    predicted: Float[np.ndarray, " n"],
    low: Float[np.ndarray, " n"],
    high: Float[np.ndarray, " n"],
) -> Path:
    """The faces with the largest errors, each with both ages; prediction i is of `faces` row i."""
    order = np.argsort(-np.abs(predicted - age), kind="stable")[:WORST]
    images = faces.read_images([int(row) for row in rows[order]])
    tiles = []
    for i, data in zip(order, images, strict=True):
        lines = (
            f"labelled {age[i]}, answered {predicted[i]:.0f}",
            f"{CLASS_NAMES[age_class(age[i])]} → {CLASS_NAMES[age_class(predicted[i])]}, "
            f"90 %: {low[i]:.0f}–{high[i]:.0f}",
        )
        tiles.append(captioned(decode_image(data, 256), lines))
    return contact_sheet(path, tiles, columns=4)


# --- several runs --------------------------------------------------------------------------------


def runs_side_by_side(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """MAE and accuracy of each run, and their paired differences to the first one.

    Rows hold `run`, `mae`, `mae_interval`, `accuracy`, `accuracy_interval`, and but for the first
    `mae_difference` and `accuracy_difference` as `paired_difference` gives them.
    """
    panels = (
        ("mae", "mean absolute error, years", 1, False),
        ("mae", "difference to the first, years\n(left is better)", 1, True),
        ("accuracy", "4 classes right, %", 100, False),
        ("accuracy", "difference to the first, points\n(right is better)", 100, True),
    )
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12.5, 0.5 * len(rows) + 1.5), layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True)
        for ax, (key, title, scale, difference) in zip(axes, panels, strict=True):
            for y, row in enumerate(rows):
                value, interval = row[key], row[f"{key}_interval"]
                if difference:
                    if f"{key}_difference" not in row:
                        continue
                    found = row[f"{key}_difference"]
                    value, interval = found["difference"], found["interval"]
                ax.plot(scale * np.array(interval), [y, y], color=BLUE, linewidth=2)
                ax.plot(scale * value, y, "o", color=BLUE, markersize=7)
            if difference:
                ax.axvline(0, color=RED, linewidth=1.2, linestyle=(0, (5, 3)))
            ax.set_xlabel(title)
            ax.grid(axis="x", linewidth=0.7)
            ax.tick_params(length=0)
        axes[0].set_yticks(range(len(rows)), [row["run"] for row in rows], fontsize=10, color=INK)
        axes[0].set_ylim(len(rows) - 0.5, -0.5)
        return save_figure(figure, path)

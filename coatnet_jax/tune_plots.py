"""Pictures of a tuning: error over the learning rate, and over learning rate and weight decay."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from coatnet_jax.palette import BLUE, INK, MUTED, RED
from coatnet_jax.plots import STYLE, save_figure

Row = Mapping[str, Any]
STATES = {"complete": True, "pruned": False}  # of a search's trials: drawn filled or not


def lr_sweep(path: str | Path, rows: Sequence[Row], *, constant: float, configured: float) -> Path:
    """Validation error over the learning rate; diverged runs as crosses on the upper edge.

    `constant` is the error of a constant answer, `configured` the config's learning rate.
    """
    rows = sorted(rows, key=lambda row: row["lr"])
    good = [row for row in rows if row["status"] == "done"]
    bad = [row for row in rows if row["status"] != "done"]
    low, high = _limits([row["mae"] for row in good], constant)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.4, 4.4))
        ax = figure.add_subplot()
        ax.set_xscale("log")
        ax.axhline(constant, color=MUTED, linewidth=1.2, linestyle=(0, (5, 4)))
        ax.annotate(
            f"constant answer {constant:.2f}",
            (1, constant),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 4),
            textcoords="offset points",
            ha="right",
            color=MUTED,
            fontsize=10,
        )
        ax.plot([r["lr"] for r in good], [r["mae"] for r in good], "-o", color=BLUE, linewidth=2)
        for row in good:
            _label(ax, row, best=row is min(good, key=lambda r: r["mae"]))
        for row in bad:
            ax.plot(row["lr"], high, "x", color=RED, markersize=9, clip_on=False)
            ax.annotate(
                "diverged",
                (row["lr"], high),
                xytext=(0, -16),
                textcoords="offset points",
                ha="center",
                color=RED,
                fontsize=9.5,
            )
        ax.set_xticks([r["lr"] for r in rows], [f"{r['lr']:g}" for r in rows])
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.minorticks_off()
        for tick, row in zip(ax.get_xticklabels(), rows, strict=True):
            if row["lr"] == configured:
                tick.set(fontweight="bold", color=INK)
        ax.set(
            ylim=(low, high),
            xlabel="learning rate (bold: the config's own)",
            ylabel="validation MAE, years",
        )
        ax.grid(axis="y", linewidth=0.7)
        ax.set_title("Error over the learning rate", pad=12)
        return save_figure(figure, path)


def _limits(values: Sequence[float], constant: float) -> tuple[float, float]:
    low, high = min(*values, constant, constant), max(*values, constant, constant)
    margin = 0.18 * (high - low or 1)
    return low - margin, high + margin


def _label(ax, row: Row, *, best: bool) -> None:
    ax.annotate(
        f"{row['mae']:.2f}",
        (row["lr"], row["mae"]),
        xytext=(0, -17),
        textcoords="offset points",
        ha="center",
        fontsize=10,
        fontweight="bold" if best else "normal",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8},
    )
    if best:
        ax.plot(row["lr"], row["mae"], "o", color=BLUE, markersize=13, fillstyle="none")


def heatmap(path: str | Path, rows: Sequence[Row]) -> Path:
    """Validation error of every pair of learning rate and weight decay; the least one framed."""
    lrs = sorted({row["lr"] for row in rows})
    decays = sorted({row["weight_decay"] for row in rows}, reverse=True)
    values = np.full((len(decays), len(lrs)), np.nan)
    for row in rows:
        if row["status"] == "done":
            values[decays.index(row["weight_decay"]), lrs.index(row["lr"])] = row["mae"]
    known = values[np.isfinite(values)]
    middle = (known.min() + known.max()) / 2
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.35 * len(lrs) + 2.6, 0.8 * len(decays) + 1.9))
        ax = figure.add_subplot()
        image = ax.imshow(values, cmap="viridis_r", aspect="auto")
        for i, j in np.ndindex(values.shape):
            if np.isnan(values[i, j]):
                ax.text(j, i, "diverged", ha="center", va="center", color=RED, fontsize=10)
                continue
            best = values[i, j] == known.min()
            ax.text(
                j,
                i,
                f"{values[i, j]:.2f}",
                ha="center",
                va="center",
                fontsize=12,
                color="white" if values[i, j] > middle else INK,
                fontweight="bold" if best else "normal",
            )
            if best:
                frame = matplotlib.patches.Rectangle(
                    (j - 0.47, i - 0.47), 0.94, 0.94, fill=False, edgecolor=RED, linewidth=2.5
                )
                ax.add_patch(frame)
        ax.set_xticks(range(len(lrs)), [f"{lr:g}" for lr in lrs])
        ax.set_yticks(range(len(decays)), [f"{decay:g}" for decay in decays])
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        bar = figure.colorbar(image, ax=ax, pad=0.03)
        bar.set_label("validation MAE, years")
        bar.outline.set_visible(False)
        ax.set(xlabel="learning rate", ylabel="weight decay")
        ax.set_title("Error of each pair", pad=10)
        return save_figure(figure, path)


def search_history(path: str | Path, rows: Sequence[Row], *, keys: Sequence[str]) -> Path:
    """Trials of a search: the error over their number, and over each of the `keys`.

    Pruned trials are hollow, at their last error; diverged ones have none and are not drawn. The
    best one is framed in every panel.
    """
    shown = [row for row in rows if row["mae"] is not None and row["state"] in STATES]
    best = min((r for r in shown if r["state"] == "complete"), key=lambda row: row["mae"])
    panels = ("trial", *keys)
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.3 * columns, 3.1 * lines), layout="constrained")
        axes = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel()
        for ax, key in zip(axes, panels, strict=False):
            for state, fill in STATES.items():
                some = [row for row in shown if row["state"] == state]
                ax.scatter(
                    [row[key] for row in some],
                    [row["mae"] for row in some],
                    s=34,
                    facecolors=BLUE if fill else "none",
                    edgecolors=BLUE,
                    alpha=0.8,
                    label=state,
                )
            ax.scatter(
                best[key], best["mae"], s=130, facecolors="none", edgecolors=RED, label="best"
            )
            if key in ("optim.lr", "optim.weight_decay"):
                ax.set_xscale("log")
            elif key == "trial":
                ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            else:
                ax.set_xticks(sorted({row[key] for row in shown}))
            ax.set_xlabel(key)
            ax.grid(axis="y", linewidth=0.7)
        for ax in axes[len(panels) :]:
            ax.set_visible(False)
        figure.axes[0].legend(fontsize=9, loc="upper right")
        figure.supylabel("validation MAE, years", fontsize=11)
        return save_figure(figure, path)

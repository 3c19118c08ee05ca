"""Figures: one function each, drawn without a display and without global plotting state.

Every function writes one PNG and returns its path. Continuous scales are viridis and a single-hue
blue, which keep their order in greyscale; the other colours are in `palette`.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import Float, Int
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import Normal, Stroke

from coatnet_jax.ages import CLASS_NAMES
from coatnet_jax.palette import (
    BLUE,
    CLASS_COLOURS,
    GENDER_COLOURS,
    GENDER_NAMES,
    GREY,
    GRID,
    INK,
    MUTED,
    PANEL,
    RACE_COLOURS,
    RACE_NAMES,
    RED,
)

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": "#9AA2AD",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": GRID,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.dpi": 130,
}

# The palest blue still differs from white, so a cell that holds one face is seen.
BLUES = LinearSegmentedColormap.from_list("blues", ["#E6F0F8", "#7DB4DA", BLUE, "#043D66"])


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write the figure with a narrow margin; gives back its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", pad_inches=0.15)
    return path


# --- embedding -----------------------------------------------------------------------------------


def tsne_grid(
    path: str | Path,
    rows: Sequence[tuple[str, str, Float[np.ndarray, "n 2"]]],
    *,
    age: Int[np.ndarray, " n"],
    age_class: Int[np.ndarray, " n"],
    gender: Int[np.ndarray, " n"],
    race: Int[np.ndarray, " n"],
    title: str = "",
) -> Path:
    """Point clouds: a row for each `(name, note, xy)`, columns for age, class, gender and race.

    Labels below zero are unknown and drawn in grey below the others; gender or race has no column
    where it is unknown of every face. The order of drawing is
    shuffled with a fixed seed, so that no group hides another by its number.
    """
    groups = (
        ("age class", age_class, CLASS_NAMES, CLASS_COLOURS),
        ("gender", gender, GENDER_NAMES, GENDER_COLOURS),
        ("race", race, RACE_NAMES, RACE_COLOURS),
    )
    groups = [group for group in groups if group[0] == "age class" or np.any(group[1] >= 0)]
    columns = len(groups) + 1
    n = len(age)
    order = np.random.default_rng(0).permutation(n)
    size = float(np.clip(9000 / max(n, 1), 5, 40))
    scale = ScalarMappable(Normalize(0, max(80, int(np.max(age, initial=0)))), "viridis")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.875 * columns, 3.7 * len(rows) + 1.1))
        grid = figure.add_gridspec(
            len(rows) + 1, columns, height_ratios=[1] * len(rows) + [0.17], wspace=0.06, hspace=0.06
        )
        for r, (name, note, xy) in enumerate(rows):
            for c in range(columns):
                ax = figure.add_subplot(grid[r, c])
                _bare(ax)
                if r == 0:
                    ax.set_title(("age in years", *(group[0] for group in groups))[c], pad=8)
                if c == 0:
                    ax.text(
                        -0.11,
                        0.5,
                        name,
                        transform=ax.transAxes,
                        rotation=90,
                        fontsize=12,
                        fontweight="bold",
                        ha="center",
                        va="center",
                    )
                    ax.text(
                        -0.045,
                        0.5,
                        note,
                        transform=ax.transAxes,
                        rotation=90,
                        fontsize=10,
                        color=MUTED,
                        ha="center",
                        va="center",
                    )
                    colours, known = scale.to_rgba(age), age >= 0
                else:
                    colours, known = _group_colours(groups[c - 1][1], groups[c - 1][3])
                points = np.concatenate([order[~known[order]], order[known[order]]])
                ax.scatter(
                    xy[points, 0],
                    xy[points, 1],
                    s=size,
                    c=colours[points],
                    alpha=0.85,
                    linewidths=0,
                )
        _age_bar(figure, figure.add_subplot(grid[-1, 0]), scale)
        for c, (_, values, names, colours) in enumerate(groups, 1):
            ax = figure.add_subplot(grid[-1, c])
            ax.axis("off")
            _group_legend(ax, values, names, colours)
        if title:
            figure.suptitle(title, x=0.125, y=0.965, ha="left", fontsize=14, fontweight="bold")
        return save_figure(figure, path)


def _bare(ax) -> None:
    """t-SNE axes have no unit: leave the panel, take the numbers away."""
    ax.set(xticks=[], yticks=[], facecolor=PANEL)
    ax.margins(0.04)
    for spine in ax.spines.values():
        spine.set_visible(False)


def _group_colours(values, colours) -> tuple[np.ndarray, np.ndarray]:
    known = (values >= 0) & (values < len(colours))
    table = np.array([matplotlib.colors.to_rgba(c) for c in (*colours, GREY)])
    return table[np.where(known, values, len(colours))], known


def _group_legend(ax, values, names, colours) -> None:
    entries = list(zip(names, colours, strict=True))
    if np.any((values < 0) | (values >= len(names))):
        entries.append(("unknown", GREY))
    handles = [
        Line2D([], [], marker="o", linestyle="", markersize=6.5, color=colour, label=name)
        for name, colour in entries
    ]
    ax.legend(
        handles=handles,
        loc="upper center",
        ncols=len(handles) if len(handles) < 5 else 3,
        fontsize=9.5,
        handletextpad=0,
        columnspacing=0.9,
        borderaxespad=0.3,
    )


def _age_bar(figure, ax, scale) -> None:
    ax.axis("off")
    bar = figure.colorbar(
        scale, cax=ax.inset_axes([0.06, 0.55, 0.88, 0.26]), orientation="horizontal"
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=10)


# --- evaluation ----------------------------------------------------------------------------------


def confusion(
    path: str | Path,
    matrix: Int[np.ndarray, "k k"],
    names: Sequence[str] = CLASS_NAMES,
    *,
    title: str = "Confusion of the age classes",
) -> Path:
    """Confusion matrix, rows the true class: shares of the row in colour, counts below them.

    A row without faces shows '–'.
    """
    matrix = np.asarray(matrix)
    support = matrix.sum(axis=1)
    shares = np.divide(
        matrix, support[:, None], out=np.zeros(matrix.shape), where=support[:, None] > 0
    )
    k = len(names)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.35 * k + 1.6, 1.2 * k + 1.4))
        ax = figure.add_subplot()
        ax.imshow(shares, cmap=BLUES, vmin=0, vmax=1, aspect="auto")
        for i, j in np.ndindex(k, k):
            colour = "white" if shares[i, j] > 0.45 else INK
            if not support[i]:
                ax.text(j, i, "–", ha="center", va="center", color=MUTED, fontsize=14)
                continue
            ax.text(
                j,
                i - 0.09,
                f"{100 * shares[i, j]:.0f} %",
                ha="center",
                va="center",
                color=colour,
                fontsize=14,
                fontweight="bold" if i == j else "normal",
            )
            ax.text(
                j,
                i + 0.2,
                f"{matrix[i, j]:,}",
                ha="center",
                va="center",
                color=colour,
                fontsize=9.5,
            )
        ax.set_xticks(range(k), names, fontsize=11, color=INK)
        ax.set_yticks(
            range(k),
            [f"{a}\nn = {n:,}" for a, n in zip(names, support, strict=True)],
            fontsize=11,
            color=INK,
        )
        ax.set_xticks(np.arange(k + 1) - 0.5, minor=True)
        ax.set_yticks(np.arange(k + 1) - 0.5, minor=True)
        ax.grid(which="minor", color="white", linewidth=2.5)
        ax.tick_params(which="both", length=0)
        ax.spines[:].set_visible(False)
        ax.set(xlabel="predicted class", ylabel="true class")
        ax.set_title(title, pad=10)
        return save_figure(figure, path)


def predicted_against_true(
    path: str | Path,
    age: Float[np.ndarray, " n"],
    predicted: Float[np.ndarray, " n"],
    *,
    title: str = "Predicted against true age",
    window: int = 2,
) -> Path:
    """Density of predicted over true age with the diagonal and the running median.

    The running median and the 10 % and 90 % quantiles take the faces within `window` years of each
    true age, where at least five are found; they are lines, so that the cells stay what they are.
    Few faces are drawn as points.
    """
    age, predicted = np.asarray(age, float), np.asarray(predicted, float)
    limit = 10 * math.ceil(max(90, age.max(initial=0), predicted.max(initial=0)) / 10)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.4, 6.2))
        ax = figure.add_subplot()
        if len(age) >= 400:
            edges = np.arange(-1, limit + 2, 2)
            *_, mesh = ax.hist2d(
                age, predicted, bins=(edges, edges), cmap=BLUES, norm=LogNorm(1), cmin=1
            )
            bar = figure.colorbar(mesh, ax=ax, shrink=0.75, pad=0.02, aspect=28)
            bar.set_label("faces in a cell of 2 × 2 years")
            bar.outline.set_visible(False)
            bar.ax.minorticks_off()
            top = float(mesh.norm.vmax)
            ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000) if t <= top]
            bar.set_ticks(ticks, labels=[f"{t:,}" for t in ticks])
        else:
            ax.scatter(age, predicted, s=22, color=BLUE, alpha=0.55, linewidths=0)
        diagonal = {"color": INK, "linewidth": 1, "linestyle": (0, (5, 4)), "zorder": 3}
        ax.plot([0, limit], [0, limit], **diagonal, label="no error")
        years, low, middle, high = _running_quantiles(age, predicted, window)
        if len(years):
            for values, width, words in (
                (middle, 2.4, "running median"),
                (low, 1.2, "10 % and 90 % of the faces below"),
                (high, 1.2, None),
            ):
                # White around a line keeps it apart from cells as dark as it is.
                halo = [Stroke(linewidth=width + 1, foreground="white"), Normal()]
                ax.plot(years, values, color=RED, linewidth=width, path_effects=halo, label=words)
        ax.set(
            xlim=(-1, limit),
            ylim=(-1, limit),
            aspect="equal",
            xlabel="true age in years",
            ylabel="predicted age in years",
        )
        ax.grid(True, linewidth=0.7)
        ax.legend(loc="upper left", fontsize=10)
        ax.set_title(title, pad=10)
        return save_figure(figure, path)


def _running_quantiles(age, predicted, window):
    """Years with at least five faces within `window`, and the 10, 50, 90 % quantiles there.

    Where years are missing in between, a row of NaN breaks the line instead of bridging the gap.
    """
    rows = []
    for year in np.unique(age):
        near = predicted[np.abs(age - year) <= window]
        if len(near) < 5:
            continue
        if rows and year - rows[-1][0] > 2 * window:
            rows.append((year - window, np.nan, np.nan, np.nan))
        rows.append((year, *np.quantile(near, [0.1, 0.5, 0.9])))
    return np.array(rows, float).reshape(-1, 4).T


def error_by_band(
    path: str | Path,
    bands: Sequence[Mapping],
    *,
    overall: float | None = None,
    title: str = "Error by age",
) -> Path:
    """Bars of the mean absolute error in each age band (`band`, `support`, `mae`), with counts.

    Bands without faces are left out; `overall` is drawn as a line across.
    """
    bands = [band for band in bands if band["support"]]
    values = [band["mae"] for band in bands]
    few = [band["support"] < 20 for band in bands]
    top = max([*values, overall or 0, 1])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(0.78 * len(bands) + 1.2, 5), 3.8))
        ax = figure.add_subplot()
        ax.bar(
            range(len(bands)),
            values,
            width=0.72,
            color=["#A9CDE6" if pale else BLUE for pale in few],
        )
        for x, band in enumerate(bands):
            ax.text(
                x,
                band["mae"] + 0.02 * top,
                f"{band['mae']:.1f}",
                ha="center",
                va="bottom",
                fontsize=10,
                fontweight="bold",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            )
        if overall is not None:
            ax.axhline(overall, color=RED, linewidth=1.4, linestyle=(0, (5, 3)))
            ax.text(
                1.01,
                overall,
                f"all {overall:.1f}",
                color=RED,
                va="center",
                fontsize=10,
                transform=ax.get_yaxis_transform(),
            )
        ax.set_xticks(
            range(len(bands)), [f"{b['band']}\n{b['support']:,}" for b in bands], fontsize=9.5
        )
        ax.tick_params(length=0)
        pale = "; pale: fewer than 20" if any(few) else ""
        ax.set(
            ylim=(0, 1.16 * top),
            xlabel=f"true age in years, number of faces below{pale}",
            ylabel="mean absolute error, years",
        )
        ax.grid(axis="y", linewidth=0.7)
        ax.set_title(title, pad=10)
        return save_figure(figure, path)

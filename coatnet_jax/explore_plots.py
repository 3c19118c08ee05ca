"""Figures of a prepared set: ages, groups, splits, sizes, sharpness, and sheets of its pictures.

Every function writes one PNG and returns its path. Unknown groups (-1) are drawn in grey.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw

from coatnet_jax.ages import CLASS_NAMES, age_class
from coatnet_jax.palette import (
    BLUE,
    CLASS_COLOURS,
    GENDER_COLOURS,
    GENDER_NAMES,
    GREEN,
    GREY,
    INK,
    MUTED,
    ORANGE,
    PINK,
    RACE_COLOURS,
    RACE_NAMES,
    SKY,
)
from coatnet_jax.pictures import label_font, save_image, shortened
from coatnet_jax.plots import BLUES, STYLE, save_figure

SPLIT_COLOURS = {"train": BLUE, "validation": ORANGE, "test": GREEN}
OTHER_COLOURS = (PINK, SKY, GREY)
TILE = 148  # px of a picture on a sheet
SAMPLE = 92  # px of one on the sheet of samples
GAP = 10


def ages(path: str | Path, age: Int[np.ndarray, " n"]) -> Path:
    """Pictures of each year of age, in the colour of the age class."""
    years = np.arange(max(int(age.max()), 90) + 1)
    counts = np.bincount(age, minlength=len(years))
    classes = age_class(years)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 3.6))
        ax = figure.add_subplot()
        colours = [CLASS_COLOURS[c] for c in classes]
        ax.bar(years, counts, width=0.9, color=colours)
        median = float(np.median(age))
        ax.axvline(median, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        handles = [
            Patch(color=colour, label=f"{name}: {np.sum(age_class(age) == c):,}")
            for c, (name, colour) in enumerate(zip(CLASS_NAMES, CLASS_COLOURS, strict=True))
        ]
        legend = ax.legend(handles=handles, loc="upper right", fontsize=10, title="age class")
        legend.get_title().set_fontsize(10)
        ax.set(xlabel="age in years", ylabel="pictures", xlim=(-1, years[-1] + 1))
        ax.set_title(f"Age in whole years; the median, {median:g}, is dashed")
        _count_axis(ax)
        return save_figure(figure, path)


def groups(path: str | Path, gender: Int[np.ndarray, " n"], race: Int[np.ndarray, " n"]) -> Path:
    """Pictures of each gender and race as bars with counts and shares."""
    sides = ((gender, GENDER_NAMES, GENDER_COLOURS), (race, RACE_NAMES, RACE_COLOURS))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 2.9), layout="constrained")
        axes = figure.subplots(1, 2, width_ratios=(3, 5))
        titles = ("Gender", "Race")
        for ax, (values, names, colours), title in zip(axes, sides, titles, strict=True):
            shown = _with_unknown(values, names, colours)
            counts = [int(np.sum(values == key)) for key, _, _ in shown]
            ax.bar(range(len(shown)), counts, width=0.66, color=[colour for *_, colour in shown])
            for x, n in enumerate(counts):
                ax.annotate(
                    f"{n:,}\n{100 * n / len(values):.1f} %",
                    (x, n),
                    (0, 3),
                    textcoords="offset points",
                    ha="center",
                    fontsize=9.5,
                )
            ax.set_xticks(range(len(shown)), [name for _, name, _ in shown], color=INK)
            ax.set(ylim=(0, 1.28 * max(*counts, 1)), title=title)
            ax.tick_params(length=0)
            _count_axis(ax)
        axes[0].set_ylabel("pictures")
        return save_figure(figure, path)


def cross_table(
    path: str | Path,
    age: Int[np.ndarray, " n"],
    gender: Int[np.ndarray, " n"],
    race: Int[np.ndarray, " n"],
) -> Path:
    """Counts of age class by gender (rows) and race (columns); darker is more."""
    genders = _with_unknown(gender, GENDER_NAMES, GENDER_COLOURS)
    races = _with_unknown(race, RACE_NAMES, RACE_COLOURS)
    classes = age_class(age)
    rows = [(c, key) for c in range(len(CLASS_NAMES)) for key, *_ in genders]
    counts = np.array(
        [[np.sum((classes == c) & (gender == g) & (race == r)) for r, *_ in races] for c, g in rows]
    )
    # Groups differ by a factor of hundreds: the root keeps the small ones apart.
    depth = np.sqrt(counts / max(counts.max(), 1))
    names = {key: name for key, name, _ in genders}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.6 + 1.1 * len(races), 1.1 + 0.42 * len(rows)))
        ax = figure.add_subplot()
        colours = BLUES(depth)
        colours[counts == 0] = matplotlib.colors.to_rgba("#F4F5F7")
        ax.imshow(colours, aspect="auto")
        for i, j in np.ndindex(*counts.shape):
            colour = "white" if depth[i, j] > 0.5 else INK
            ax.text(j, i, f"{counts[i, j]:,}", ha="center", va="center", color=colour, fontsize=11)
        ax.xaxis.tick_top()
        ax.set_xticks(range(len(races)), [name for _, name, _ in races], color=INK, fontsize=11)
        labels = [f"{CLASS_NAMES[c]}, {names[g]}" for c, g in rows]
        ax.set_yticks(range(len(rows)), labels, color=INK, fontsize=11)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        for edge in np.arange(len(rows)) - 0.5:
            ax.axhline(edge, color="white", linewidth=4 if (edge + 0.5) % len(genders) == 0 else 1)
        for edge in np.arange(len(races)) - 0.5:
            ax.axvline(edge, color="white", linewidth=1)
        return save_figure(figure, path)


def age_by_group(
    path: str | Path,
    age: Int[np.ndarray, " n"],
    gender: Int[np.ndarray, " n"],
    race: Int[np.ndarray, " n"],
) -> Path:
    """Ages of each gender and race: the violin is the density, the box the quartiles.

    Groups of fewer than ten pictures, or of one age, are drawn as points.
    """
    sides = ((gender, GENDER_NAMES, GENDER_COLOURS), (race, RACE_NAMES, RACE_COLOURS))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 4.2), layout="constrained")
        axes = figure.subplots(1, 2, width_ratios=(3, 5), sharey=True)
        titles = ("Gender", "Race")
        for ax, (values, names, colours), title in zip(axes, sides, titles, strict=True):
            shown = _with_unknown(values, names, colours)
            for x, (key, _, colour) in enumerate(shown):
                _violin(ax, x, age[values == key], colour)
            labels = [f"{name}\nn = {np.sum(values == key):,}" for key, name, _ in shown]
            ax.set_xticks(range(len(shown)), labels, color=INK)
            ax.set(xlim=(-0.6, len(shown) - 0.4), title=title)
            ax.tick_params(length=0)
            ax.grid(axis="y", linewidth=0.7)
        axes[0].set_ylabel("age in years")
        return save_figure(figure, path)


def _violin(ax, x: int, age: np.ndarray, colour: str) -> None:
    if len(age) < 10 or age.min() == age.max():
        ax.scatter(np.full(len(age), x), age, s=26, color=colour, linewidths=0, alpha=0.8)
        return
    violin = ax.violinplot(age, [x], widths=0.85, showextrema=False)
    for body in violin["bodies"]:
        body.set(facecolor=colour, edgecolor="none", alpha=0.45)
    line = {"color": INK, "linewidth": 1.1}
    ax.boxplot(
        age,
        positions=[x],
        widths=0.16,
        showfliers=False,
        patch_artist=True,
        boxprops={"facecolor": "white", "edgecolor": INK, "linewidth": 1.1},
        medianprops={"color": INK, "linewidth": 2},
        whiskerprops=line,
        capprops=line,
    )


def split_ages(path: str | Path, tables: Mapping[str, Mapping[str, np.ndarray]]) -> Path:
    """Age distribution of each split, a panel for each split file: {file: {split: ages [n]}}."""
    columns = min(len(tables), 2)
    lines = math.ceil(len(tables) / columns)
    edges = np.arange(0, 121, 5)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 3.1 * lines), layout="constrained")
        axes = np.ravel(figure.subplots(lines, columns, squeeze=False))
        last = max(int(a.max()) for table in tables.values() for a in table.values())
        for ax, (name, table) in zip(axes, tables.items(), strict=False):
            spare = iter(OTHER_COLOURS * len(table))
            for split, values in table.items():
                share = np.histogram(values, edges)[0] / len(values)
                colour = SPLIT_COLOURS.get(split) or next(spare)
                style = {"label": f"{split}: {len(values):,}", "color": colour}
                if split == "train":  # equal splits hide one another as lines
                    ax.stairs(100 * share, edges, fill=True, alpha=0.25, linewidth=0, **style)
                else:
                    dash = "-" if split == "validation" else (0, (3, 2))
                    ax.stairs(100 * share, edges, linewidth=1.8, linestyle=dash, **style)
            ax.set(title=name, xlabel="age in years", ylabel="% of the split")
            ax.set_xlim(0, 5 * (last // 5 + 1))
            ax.legend(fontsize=10)
            ax.grid(axis="y", linewidth=0.7)
        for ax in axes[len(tables) :]:
            ax.axis("off")
        return save_figure(figure, path)


def sizes(path: str | Path, width: Int[np.ndarray, " n"], height: Int[np.ndarray, " n"]) -> Path:
    """Pictures by their shorter side in pixels."""
    side = np.minimum(width, height)
    low, high = int(side.min()), int(side.max())
    edges = np.linspace(low - 0.5, high + 0.5, min(high - low + 2, 41))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 2.8))
        ax = figure.add_subplot()
        ax.hist(side, edges, color=BLUE)
        ax.set(xlabel="shorter side in pixels", ylabel="pictures", title="Size of the pictures")
        _count_axis(ax)
        return save_figure(figure, path)


def sharpness(path: str | Path, values: Float[np.ndarray, " n"], limit: float) -> Path:
    """Pictures by their sharpness, on a logarithmic scale; `limit` is drawn as a line."""
    positive = np.maximum(values, 0.1)
    low, high = positive.min(), max(positive.max(), positive.min() * 1.1)
    edges = np.geomspace(low, high, 61 if len(values) > 500 else 21)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 2.8))
        ax = figure.add_subplot()
        ax.hist(positive, edges, color=BLUE)
        ax.axvline(limit, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:,.0f}")
        ax.xaxis.set_minor_formatter("")
        ax.set(xlabel="variance of the Laplacian, logarithmic: sharp pictures to the right")
        ax.set(ylabel="pictures", title="Sharpness; a hundredth lies left of the dashed line")
        _count_axis(ax)
        return save_figure(figure, path)


def _count_axis(ax) -> None:
    ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    ax.yaxis.set_major_formatter("{x:,.0f}")
    ax.grid(axis="y", linewidth=0.7)


def _with_unknown(values, names, colours) -> list[tuple[int, str, str]]:
    """(label, name, colour) of every group, and of 'unknown' where a label is -1.

    Where no label is known there is only the last one.
    """
    known = list(zip(range(len(names)), names, colours, strict=True))
    if np.all(values < 0):
        known = []
    return known + [(-1, "unknown", GREY)] * bool(np.any(values < 0))


# --- sheets of pictures --------------------------------------------------------------------------


def sample_sheet(
    path: str | Path, rows: Sequence[tuple[str, Sequence[UInt8[np.ndarray, "s s 3"]]]]
) -> Path:
    """Rows of pictures, squares of SAMPLE px, each row with its name at the left."""
    margin, side = 118, SAMPLE
    most = max(8, *(len(tiles) for _, tiles in rows))
    width = margin + most * (side + GAP)
    sheet = Image.new("RGB", (width, GAP + len(rows) * (side + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for line, (name, tiles) in enumerate(rows):
        y = GAP + line * (side + GAP)
        first, _, second = name.partition("\n")
        draw.text((GAP, y + side / 2 - 11), first, font=label_font(17, True), fill=INK, anchor="lm")
        draw.text((GAP, y + side / 2 + 12), second, font=label_font(14), fill=MUTED, anchor="lm")
        for place, tile in enumerate(tiles):
            sheet.paste(Image.fromarray(tile), (margin + place * (side + GAP), y))
    return save_image(path, np.asarray(sheet))


def captioned_sheet(
    path: str | Path, tiles: Sequence[tuple[UInt8[np.ndarray, "s s 3"], Sequence[str]]]
) -> Path:
    """Pictures, squares of TILE px, six in a line, each with its lines of text below."""
    columns, step = 6, 21
    width = GAP + columns * (TILE + GAP)
    lines = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    heights = [TILE + step * max(len(text) for _, text in line) + 16 for line in lines]
    sheet = Image.new("RGB", (width, GAP + sum(heights)), "white")
    draw, font = ImageDraw.Draw(sheet), label_font(15)
    y = GAP
    for line, height in zip(lines, heights, strict=True):
        for place, (tile, texts) in enumerate(line):
            x = GAP + place * (TILE + GAP)
            sheet.paste(Image.fromarray(tile), (x, y))
            for k, text in enumerate(texts):
                place_y = y + TILE + 4 + (k + 0.5) * step
                text = shortened(text, font, TILE)
                draw.text((x, place_y), text, font=font, fill=INK, anchor="lm")
        y += height
    return save_image(path, np.asarray(sheet))


def square(tile: UInt8[np.ndarray, "h w 3"], side: int) -> UInt8[np.ndarray, "s s 3"]:
    """The picture's centre square; small ones are enlarged by whole pixels, to be seen as such."""
    h, w, _ = tile.shape
    short = min(h, w)
    top, left = (h - short) // 2, (w - short) // 2
    how = Image.Resampling.NEAREST if 2 * short <= side else Image.Resampling.LANCZOS
    centre = Image.fromarray(tile[top : top + short, left : left + short])
    return np.asarray(centre.resize((side, side), how))

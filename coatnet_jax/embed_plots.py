"""Pictures of a latent space besides the grid of point clouds: ages, perplexities, near faces."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import Float, Int
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from coatnet_jax.metrics import nearest_rows
from coatnet_jax.palette import MUTED, PANEL
from coatnet_jax.plots import STYLE, save_figure
from input_pipeline.images import decode_image
from input_pipeline.pipeline import Faces

QUERIES, NEAREST, TILE = 8, 3, 160  # lines, faces for each kind of features, pixels
OLDEST = 80  # years; few are older, and the colours are better spent on the others


def by_age(
    path: str | Path,
    clouds: Sequence[tuple[str, str, Float[np.ndarray, "n 2"]]],
    *,
    age: Int[np.ndarray, " n"],
    title: str = "",
) -> Path:
    """The same faces in each of `clouds`, `(name, note, points)`, side by side, coloured by age."""
    scale = ScalarMappable(Normalize(0, OLDEST), "viridis")
    order = np.random.default_rng(0).permutation(len(age))
    size = float(np.clip(22000 / max(len(age), 1), 9, 50))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.3 * len(clouds) + 0.9, 4.9), layout="constrained")
        axes = figure.subplots(1, len(clouds), squeeze=False)
        for ax, (name, note, xy) in zip(axes[0], clouds, strict=True):
            _cloud(ax, xy[order], scale.to_rgba(age[order]), size)
            ax.set_title(name, fontsize=13)
            ax.set_xlabel(note, fontsize=12)
        older = "max" if np.max(age, initial=0) > OLDEST else "neither"
        bar = figure.colorbar(scale, ax=axes, aspect=30, pad=0.02, extend=older)
        bar.set_label("age in years", fontsize=12)
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0, labelsize=11)
        if title:
            figure.suptitle(title, x=0.005, ha="left", fontsize=14, fontweight="bold")
        return save_figure(figure, path)


def perplexities(
    path: str | Path,
    layouts: Mapping[str, Sequence[Float[np.ndarray, "n 2"]]],
    values: Sequence[float],
    *,
    age: Int[np.ndarray, " n"],
) -> Path:
    """The same faces at each perplexity (columns), coloured by age; a row for each of `layouts`."""
    scale = ScalarMappable(Normalize(0, max(80, int(np.max(age, initial=0)))), "viridis")
    order = np.random.default_rng(0).permutation(len(age))
    size = float(np.clip(7000 / max(len(age), 1), 4, 30))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.6 * len(values) + 0.9, 3.5 * len(layouts)), layout="constrained")
        axes = figure.subplots(len(layouts), len(values), squeeze=False)
        for ax, value in zip(axes[0], values, strict=True):
            ax.set_title(f"perplexity {value:g}")
        for row, (name, points) in zip(axes, layouts.items(), strict=True):
            for ax, xy in zip(row, points, strict=True):
                _cloud(ax, xy[order], scale.to_rgba(age[order]), size)
            row[0].set_ylabel(name, fontweight="bold", fontsize=12)
        bar = figure.colorbar(scale, ax=axes, shrink=0.6, aspect=30, pad=0.02)
        bar.set_label("age in years", color=MUTED)
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0)
        return save_figure(figure, path)


def _cloud(
    ax, xy: Float[np.ndarray, "n 2"], colours: Float[np.ndarray, "n 4"], size: float
) -> None:
    """Points on a plain panel: the axes of such a layout have no meaning."""
    ax.scatter(*xy.T, s=size, c=colours, linewidths=0)
    ax.set(xticks=[], yticks=[], facecolor=PANEL)
    ax.spines[:].set_visible(False)


def neighbours(
    path: str | Path,
    faces: Faces,
    reference: Faces,
    features: Mapping[str, Float[np.ndarray, "n d"]],
    banks: Mapping[str, Float[np.ndarray, "m d"]],
) -> Path:
    """A line for each of some faces from young to old: itself, then its nearest of `reference`.

    `features` are of `faces` and `banks` of `reference`, by name; each name adds three faces to the
    line, with their cosines.
    """
    order = np.argsort(faces.labels["age"], kind="stable")
    # Evenly between the youngest and the oldest, without both ends.
    places = (np.arange(QUERIES) + 0.5) / QUERIES * len(order)
    rows = order[np.unique(places.astype(int))]
    k = min(NEAREST, len(reference))
    found = {name: nearest_rows(banks[name], z[rows], k) for name, z in features.items()}
    columns = 1 + k * len(features)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.5 * columns, 1.75 * len(rows) + 0.3), layout="constrained")
        axes = figure.subplots(len(rows), columns, squeeze=False)
        for i, row in enumerate(rows):
            _face(axes[i, 0], faces, int(row))
            for j, (near, cosine) in enumerate(found.values()):
                for c in range(k):
                    _face(axes[i, 1 + k * j + c], reference, near[i, c], f" ({cosine[i, c]:.2f})")
        for j, name in enumerate(["asked", *found]):
            axes[0, 1 + k * (j - 1) if j else 0].set_title(f"{name}\n", pad=10)
        return save_figure(figure, path)


def _face(ax, faces: Faces, row: int, note: str = "") -> None:
    ax.imshow(decode_image(faces.read_images([int(row)])[0], TILE))
    ax.text(0, -0.02, f"{faces.labels['age'][row]}{note}", transform=ax.transAxes, va="top")
    ax.axis("off")

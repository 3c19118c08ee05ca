"""RandAugment (Cubuk et al. 2019, arXiv 1909.13719) on the device: N of 14 for each image.

A `lax.switch` over the operations becomes, under `vmap`, all of them for every image. So they are
folded into three families, and an image goes through each family with the parameters of what it
drew, those of the identity where it drew something else:

  tables   autocontrast, equalize, posterize, solarize   one 256-entry table a channel
  blends   brightness, color, contrast, sharpness        x -> base + factor (x - base)
  warps    rotate, shear, translate                      one affine map, one bilinear look-up

Tables and blends cost one pass for each of the N draws. The warps of an image are multiplied into
one map that is applied at the end, so that pixels are interpolated once and the statistics behind
equalize, autocontrast and contrast are never those of an empty corner; apart from that order they
commute with whatever is done to single pixels.

Pixels are 0-255, and the tables look at them rounded to whole levels, as Pillow's, whose ImageOps
and ImageEnhance say what each operation does. Ranges are AutoAugment's (arXiv 1805.09501, Table 6),
but that faces are moved by at most 0.3 of a side, where half a face would stay with its 0.45.
Shears and rotations keep the middle of the picture where it is. Invert is left out: no photo of a
face is its own negative.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

OPERATIONS = (
    *("identity", "autocontrast", "equalize", "posterize", "solarize"),
    *("brightness", "color", "contrast", "sharpness"),
    *("rotate", "shear_x", "shear_y", "translate_x", "translate_y"),
)
STRONGEST = 10  # magnitude at which an operation reaches the end of its range
FILL = (124.0, 116.0, 104.0)  # ImageNet's mean colour
_NUMBER = {name: number for number, name in enumerate(OPERATIONS)}
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_LEVELS = np.arange(256, dtype=np.float32)


def check_rand_augment(ops: int, magnitude: float) -> None:
    """ValueError in one line for a number of operations or a magnitude that there cannot be."""
    if ops < 0 or not 0 <= magnitude <= STRONGEST:
        raise ValueError(
            f"rand_augment_ops is {ops} and must be 0 (off) or more, rand_augment_magnitude is "
            f"{magnitude} and must lie within 0 and {STRONGEST}"
        )


def rand_augment(
    rng: PRNGKeyArray,
    pixels: Float[Array, "b h w 3"],
    *,
    ops: int,
    magnitude: float,
    fill: tuple[float, ...] = FILL,
) -> Float[Array, "b h w 3"]:
    """Every image after `ops` operations that it draws for itself, with replacement.

    Args:
      pixels: RGB 0-255; the result lies within 0-255 too.
      magnitude: 0-10, of all operations; the direction (brighter or darker, left or right) is
        drawn.
      fill: colour of places that a warp leaves empty.

    Raises ValueError for a negative `ops` or a magnitude outside 0-10.
    """
    check_rand_augment(ops, magnitude)
    key_drawn, key_sign = jax.random.split(rng)
    drawn = jax.random.randint(key_drawn, (len(pixels), ops), 0, len(OPERATIONS))
    signs = jax.random.rademacher(key_sign, (len(pixels), ops), jnp.float32)
    return apply_operations(pixels, drawn, signs, magnitude=magnitude, fill=fill)


def apply_operations(
    pixels: Float[Array, "b h w 3"],
    drawn: Int[Array, "b n"],
    signs: Float[Array, "b n"],
    *,
    magnitude: float,
    fill: tuple[float, ...] = FILL,
) -> Float[Array, "b h w 3"]:
    """The images after the operations of these numbers in `OPERATIONS`, in directions 1 or -1."""
    level = magnitude / STRONGEST

    def one_image(image, drawn, signs):
        source = jnp.eye(3)  # where a place of the result is looked up, from the middle
        for number, sign in zip(drawn, signs, strict=True):
            image = _look_up(image, _tables(image, number, level=level))
            image = _blend(image, number, sign * level)
            last = _warp_matrix(number, sign * level, image.shape[0], image.shape[1])
            source = jnp.matmul(source, last, precision="highest")
        warped = _warp(image, source, fill=fill)
        return jnp.where((drawn >= _NUMBER["rotate"]).any(), warped, image)

    return jax.vmap(one_image)(pixels, drawn, signs)


def _tables(image, number, *, level) -> Float[Array, "3 256"]:
    """What every level of every channel becomes by the operation `number`."""
    counts = _histogram(image)
    step = 2.0 ** np.round(4 * level)  # 8 bits are kept at level 0, 4 at level 1
    solarized = np.where(_LEVELS < 256 * (1 - level), _LEVELS, 255 - _LEVELS)
    tables = {
        "autocontrast": _stretched(counts),
        "equalize": _equalized(counts),
        "posterize": step * np.floor(_LEVELS / step),
        "solarize": solarized,
    }
    chosen = jnp.broadcast_to(_LEVELS, (3, 256))
    for name, table in tables.items():
        chosen = jnp.where(number == _NUMBER[name], table, chosen)
    return chosen


def _histogram(image) -> Float[Array, "3 256"]:
    """How many pixels of each channel have each level. Counts are whole numbers, so the order in
    which a device adds them changes nothing."""
    levels = jnp.round(image).astype(jnp.int32).reshape(-1, 3)
    return jnp.zeros((3, 256)).at[jnp.arange(3), levels].add(1)


def _stretched(counts) -> Float[Array, "3 256"]:
    """Autocontrast: the darkest level there is becomes 0 and the brightest 255."""
    there = counts > 0
    low = jnp.min(jnp.where(there, _LEVELS, 255), axis=1, keepdims=True)
    high = jnp.max(jnp.where(there, _LEVELS, 0), axis=1, keepdims=True)
    stretched = jnp.clip((_LEVELS - low) * 255 / jnp.maximum(high - low, 1), 0, 255)
    return jnp.where(high > low, stretched, _LEVELS)


def _equalized(counts) -> Float[Array, "3 256"]:
    """Equalize: levels spread so that their cumulative histogram is straight, rounded as Pillow's.

    Every `step` pixels are worth one level; the brightest level's own pixels are not counted.
    """
    brightest = jnp.max(jnp.where(counts > 0, _LEVELS, 0), axis=1, keepdims=True)
    without = jnp.sum(jnp.where(brightest == _LEVELS, 0, counts), axis=1, keepdims=True)
    step = jnp.floor(without / 255)
    below = jnp.cumsum(counts, axis=1) - counts
    spread = jnp.floor((jnp.floor(step / 2) + below) / jnp.maximum(step, 1))
    return jnp.where(step > 0, jnp.clip(spread, 0, 255), _LEVELS)


def _look_up(image, tables) -> Float[Array, "h w 3"]:
    """Each channel through its table; levels between two whole ones are rounded."""
    levels = jnp.round(image).astype(jnp.int32)
    return jnp.stack([jnp.take(tables[c], levels[..., c]) for c in range(3)], axis=-1)


def _blend(image, number, change) -> Float[Array, "h w 3"]:
    """The image drawn away from a base, or towards it, by up to 0.9 of their difference."""
    grey = jnp.sum(image * _LUMA, axis=-1, keepdims=True)
    bases = {
        "brightness": jnp.zeros(()),
        "color": grey,
        "contrast": jnp.mean(grey),
        "sharpness": _smoothed(image),
    }
    factor, base = 1.0, jnp.zeros_like(image)
    for name, other in bases.items():
        here = number == _NUMBER[name]
        factor = jnp.where(here, 1 + 0.9 * change, factor)
        base = jnp.where(here, other, base)
    return jnp.clip(base + factor * (image - base), 0, 255)


def _smoothed(image) -> Float[Array, "h w 3"]:
    """Pillow's SMOOTH: each pixel five times and its eight neighbours once; the rim stays."""
    rows = image[:-2] + image[1:-1] + image[2:]
    box = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
    return image.at[1:-1, 1:-1].set((box + 4 * image[1:-1, 1:-1]) / 13)


def _warp_matrix(number, change, height, width) -> Float[Array, "3 3"]:
    """From a place (x, y, 1) of the result, counted from the middle, to that of the source."""
    angle = jnp.deg2rad(30.0) * change
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    zero, one, shift = jnp.zeros(()), jnp.ones(()), 0.3 * change
    entries = {
        "rotate": (cos, -sin, zero, sin, cos, zero),
        "shear_x": (one, shift, zero, zero, one, zero),
        "shear_y": (one, zero, zero, shift, one, zero),
        "translate_x": (one, zero, shift * width, zero, one, zero),
        "translate_y": (one, zero, zero, zero, one, shift * height),
    }
    matrix = jnp.eye(3)
    for name, rows in entries.items():
        other = jnp.stack([*rows, zero, zero, one]).reshape(3, 3)
        matrix = jnp.where(number == _NUMBER[name], other, matrix)
    return matrix


def _warp(image, source, *, fill) -> Float[Array, "h w 3"]:
    """Bilinear look-up of every place of the result; `fill` where it lies outside the image."""
    h, w, _ = image.shape
    middle = jnp.array([w / 2, h / 2, 0])
    x, y = jnp.meshgrid(jnp.arange(w) + 0.5, jnp.arange(h) + 0.5)
    places = jnp.stack([x, y, jnp.ones_like(x)]) - middle[:, None, None]
    found = jnp.einsum("ij,jhw->ihw", source, places, precision="highest")
    x, y, _ = found + middle[:, None, None]
    inside = (x >= 0) & (x < w) & (y >= 0) & (y < h)
    left, top = jnp.floor(x - 0.5), jnp.floor(y - 0.5)
    right, bottom = x - 0.5 - left, y - 0.5 - top  # shares of the right and lower neighbours
    columns, rows = left.astype(jnp.int32), top.astype(jnp.int32)
    total = jnp.zeros_like(image)
    for below, share_y in ((0, 1 - bottom), (1, bottom)):
        for beside, share_x in ((0, 1 - right), (1, right)):
            row, column = jnp.clip(rows + below, 0, h - 1), jnp.clip(columns + beside, 0, w - 1)
            total += (share_y * share_x)[..., None] * image[row, column]
    return jnp.where(inside[..., None], total, jnp.asarray(fill, image.dtype))

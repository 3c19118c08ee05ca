"""Random views of face images, made on the device inside the jitted step.

Cropping, resizing, flipping, blurring and sharpening are linear and act on rows and columns apart:
they fold into one [size, H] and one [size, W] matrix an image. Brightness, contrast, saturation,
hue and greying are affine in the three channels: they fold into one 3x3 matrix and an offset. A
view is then two matrix products, one affine map, and one clip to 0-255 at the very end.

Folding is exact but for that single clip (torchvision clips after every step): a linear map of
space and one of the channels commute, and as contrast, saturation and hue all keep the luma, the
four colour steps commute with each other too, so no random order has to be drawn. Hue turns the
colour plane of YIQ, which is linear; for skin a turn there is up to 1.4 times that turn in HSV.

Images come in as uint8 0-255 RGB and leave as float32, normalised with a mean and a standard
deviation for each channel: ImageNet's, unless the weights saw others. Each image draws from its own
key, split from `rng`, so the result does not depend on how the batch is laid out over devices.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from coatnet_jax.rand_augment import rand_augment

IMAGE_MEAN = (0.485, 0.456, 0.406)  # of ImageNet's values 0-1
IMAGE_STD = (0.229, 0.224, 0.225)
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as in torchvision and PIL
_TO_YIQ = np.array([_LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]], np.float32)
# Rows 2 and 3 sum to 0 and row 1 to 1, so the inverse gives grey from (Y, 0, 0) exactly.
_FROM_YIQ = np.linalg.inv(_TO_YIQ.astype(np.float64)).astype(np.float32)
# Or a GPU rounds to 10 bits and a TPU to 8, pixels and colours too; it costs nothing here.
_HIGHEST = jax.lax.Precision.HIGHEST
_product = partial(jnp.matmul, precision=_HIGHEST)


def simclr_view(
    rng: PRNGKeyArray,
    images: UInt8[Array, "b h w 3"],
    *,
    size: int,
    crop: tuple[float, float] = (0.3, 1.0),
    ratio: tuple[float, float] = (0.85, 1.18),
    flip_prob: float = 0.5,
    jitter_prob: float = 0.8,
    jitter: float = 0.5,
    grey_prob: float = 0.2,
    blur_prob: float = 0.2,
    blur_sigma: tuple[float, float] = (0.1, 1.0),
    mean: tuple[float, ...] = IMAGE_MEAN,
    std: tuple[float, ...] = IMAGE_STD,
) -> Float[Array, "b size size 3"]:
    """One contrastive view of each image (SimCLR, arXiv 2002.05709, appendix A).

    Args:
      size: height and width of the views, in pixels.
      crop: least and greatest share of the image's area.
      ratio: least and greatest width / height of the crop, before it is held to the image.
      jitter: SimCLR's colour strength s: brightness, contrast and saturation change by up to
        0.8 s, hue by up to 0.2 s of a turn.
      blur_sigma: least and greatest standard deviation of the blur, in pixels of the view.
      mean: taken from each channel of values 0-1, which `std` then divides.

    The defaults crop and blur less than SimCLR does: fine texture is what tells age.
    """

    def draw(key):
        keys = jax.random.split(key, 4)
        rows, columns = _crop_matrices(
            keys[0], images.shape[1:3], size, crop=crop, ratio=ratio, flip_prob=flip_prob
        )
        blur = _blur_matrix(keys[1], size, prob=blur_prob, sigma=blur_sigma)
        matrix, contrast = _jitter(keys[2], prob=jitter_prob, strength=jitter)
        grey = jax.random.uniform(keys[3]) < grey_prob
        matrix = jnp.where(grey, jnp.ones((3, 1)) * _product(_LUMA, matrix), matrix)
        return _product(blur, rows), _product(blur, columns), matrix, contrast

    drawn = jax.vmap(draw)(jax.random.split(rng, images.shape[0]))
    return _render(images, *drawn, mean=mean, std=std)


def supervised_view(
    rng: PRNGKeyArray,
    images: UInt8[Array, "b h w 3"],
    *,
    size: int,
    crop: tuple[float, float] = (0.7, 1.0),
    ratio: tuple[float, float] = (0.9, 1.11),
    flip_prob: float = 0.5,
    jitter_prob: float = 0.8,
    jitter: float = 0.3,
    blur_prob: float = 0.0,
    blur_sigma: tuple[float, float] = (0.1, 1.5),
    sharpen_prob: float = 0.0,
    sharpen: float = 1.0,
    erase_prob: float = 0.25,
    rand_augment_ops: int = 0,
    rand_augment_magnitude: float = 9.0,
    mean: tuple[float, ...] = IMAGE_MEAN,
    std: tuple[float, ...] = IMAGE_STD,
) -> Float[Array, "b size size 3"]:
    """One mild view of each image for training on labels; arguments as in `simclr_view`.

    With `sharpen_prob` up to `sharpen` times what a blur of 1 px takes from a view's rows, and then
    from its columns, is added to them, after the blur where a view is drawn for both. With
    `rand_augment_ops` each view goes through so many operations of RandAugment (see
    `rand_augment`), after the colour jitter and before a random box becomes the mean colour with
    `erase_prob` (random erasing, arXiv 1708.04896).
    """

    def draw(key):
        keys = jax.random.split(key, 5)
        rows, columns = _crop_matrices(
            keys[0], images.shape[1:3], size, crop=crop, ratio=ratio, flip_prob=flip_prob
        )
        matrix, contrast = _jitter(keys[1], prob=jitter_prob, strength=jitter)
        kept_rows, kept_columns = _erase_masks(keys[2], size, prob=erase_prob)
        if blur_prob:
            blur = _blur_matrix(keys[3], size, prob=blur_prob, sigma=blur_sigma)
            rows, columns = _product(blur, rows), _product(blur, columns)
        if sharpen_prob:
            edges = _sharpen_matrix(keys[4], size, prob=sharpen_prob, strength=sharpen)
            rows, columns = _product(edges, rows), _product(edges, columns)
        return rows, columns, matrix, contrast, kept_rows, kept_columns

    drawn = jax.vmap(draw)(jax.random.split(rng, images.shape[0]))
    kept_rows, kept_columns = drawn[4:]
    kept = kept_rows[:, :, None] | kept_columns[:, None, :]
    pixels = _pixels(images, *drawn[:4])
    if rand_augment_ops:
        pixels = rand_augment(
            jax.random.fold_in(rng, len(images)),  # the images have those of 0 to b - 1
            pixels,
            ops=rand_augment_ops,
            magnitude=rand_augment_magnitude,
            fill=tuple(255 * value for value in mean),
        )
    return jnp.where(kept[..., None], normalize(pixels, mean=mean, std=std), 0.0)


def eval_view(
    images: UInt8[Array, "b h w 3"],
    *,
    size: int,
    side: float = 1.0,
    mean: tuple[float, ...] = IMAGE_MEAN,
    std: tuple[float, ...] = IMAGE_STD,
) -> Float[Array, "b size size 3"]:
    """The image at `size` (antialiased bilinear resize) and normalised; nothing random.

    Of each side the middle share `side` is kept: the whole image unless given.
    """
    _, height, width, _ = images.shape
    if (height, width, side) == (size, size, 1):
        return normalize(images, mean=mean, std=std)
    rows, columns = (
        _resize_matrix((1 - side) / 2 * length, side * length, length, size)
        for length in (height, width)
    )
    pixels = jax.vmap(_resample, (0, None, None))(images, rows, columns).swapaxes(2, 3)
    return normalize(pixels, mean=mean, std=std)


def normalize(
    images: Array, *, mean: tuple[float, ...] = IMAGE_MEAN, std: tuple[float, ...] = IMAGE_STD
) -> Float[Array, "*b h w 3"]:
    """RGB 0-255 as float32 with the mean and standard deviation of values 0-1 taken out."""
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return (images.astype(jnp.float32) - 255 * mean) * (1 / (255 * std))


def denormalize(
    images: Float[Array, "*b h w 3"],
    *,
    mean: tuple[float, ...] = IMAGE_MEAN,
    std: tuple[float, ...] = IMAGE_STD,
) -> UInt8[Array, "*b h w 3"]:
    """Normalised images back as uint8 0-255, for looking at."""
    pixels = 255 * (images * jnp.asarray(std, jnp.float32) + jnp.asarray(mean, jnp.float32))
    return jnp.clip(jnp.round(pixels), 0, 255).astype(jnp.uint8)


def mixup(
    rng: PRNGKeyArray, images: Float[Array, "b h w 3"], targets: Any, *, alpha: float
) -> tuple[Float[Array, "b h w 3"], Any]:
    """Each example blended with the one at the mirrored place in the batch (arXiv 1710.09412).

    One share from Beta(alpha, alpha) for every example, the same for its image and its targets.

    Args:
      images: normalised images.
      targets: label distributions [b, k], or a tree of such arrays.
      alpha: 0 gives everything back as it was.
    """
    if alpha == 0:
        return images, targets
    share = jax.random.beta(rng, alpha, alpha, (images.shape[0],), jnp.float32)

    def blend(x):
        own = share.reshape((-1,) + (1,) * (x.ndim - 1)).astype(x.dtype)
        return own * x + (1 - own) * x[::-1]

    return blend(images), jax.tree.map(blend, targets)


def _crop_matrices(key, shape, size, *, crop, ratio, flip_prob):
    """The [size, H] and [size, W] matrices of a random-resized crop, maybe mirrored.

    A side longer than the image is cut to it (torchvision draws again instead).
    """
    height, width = shape
    area, log_ratio, top, left, flip = jax.random.uniform(key, (5,))
    area = height * width * (crop[0] + area * (crop[1] - crop[0]))
    low, high = jnp.log(jnp.array(ratio))
    aspect = jnp.exp(low + log_ratio * (high - low))
    crop_height = jnp.minimum(jnp.sqrt(area / aspect), height)
    crop_width = jnp.minimum(jnp.sqrt(area * aspect), width)
    rows = _resize_matrix(top * (height - crop_height), crop_height, height, size)
    columns = _resize_matrix(
        left * (width - crop_width), crop_width, width, size, flip=flip < flip_prob
    )
    return rows, columns


def _resize_matrix(start, extent, length, size, *, flip=False) -> Float[Array, "size length"]:
    """Weights that resample [start, start + extent) of `length` pixels to `size` pixels.

    A triangle as wide as one pixel of the coarser grid (antialiased bilinear); pixels whose centre
    lies outside the interval are not read, as if the image had been cut out first.
    """
    scale = extent / size
    place = jnp.arange(size, dtype=jnp.float32)
    place = jnp.where(flip, size - 1 - place, place)
    centre = start + (place + 0.5) * scale
    pixel = jnp.arange(length, dtype=jnp.float32) + 0.5
    weights = jnp.maximum(0, 1 - jnp.abs(centre[:, None] - pixel) / jnp.maximum(scale, 1))
    weights = jnp.where((pixel >= start) & (pixel <= start + extent), weights, 0)
    return weights / jnp.sum(weights, axis=1, keepdims=True)


def _blur_matrix(key, size, *, prob, sigma) -> Float[Array, "size size"]:
    """A Gaussian blur along one side, or (with 1 - prob) the identity.

    Rows are renormalised where the kernel leaves the image.
    """
    apply, draw = jax.random.uniform(key, (2,))
    blur = _gaussian_matrix(size, sigma[0] + draw * (sigma[1] - sigma[0]))
    return jnp.where(apply < prob, blur, jnp.eye(size))


def _sharpen_matrix(key, size, *, prob, strength) -> Float[Array, "size size"]:
    """An unsharp mask along one side, or (with 1 - prob) the identity: I + s (I - blur of 1 px)."""
    apply, draw = jax.random.uniform(key, (2,))
    share = jnp.where(apply < prob, strength * draw, 0.0)
    return (1 + share) * jnp.eye(size) - share * _gaussian_matrix(size, 1.0)


def _gaussian_matrix(size, sigma) -> Float[Array, "size size"]:
    """A Gaussian of this standard deviation around each place of one side, each row of sum 1."""
    place = jnp.arange(size, dtype=jnp.float32)
    weights = jnp.exp(-0.5 * ((place[:, None] - place) / sigma) ** 2)
    return weights / jnp.sum(weights, axis=1, keepdims=True)


def _jitter(key, *, prob, strength):
    """The 3x3 matrix of brightness, saturation and hue, and the contrast factor."""
    draws = jax.random.uniform(key, (5,))
    change = jnp.where(draws[0] < prob, strength, 0.0)
    low, high = jnp.maximum(0, 1 - 0.8 * change), 1 + 0.8 * change
    brightness, contrast, saturation = low + draws[1:4] * (high - low)
    return _colour_matrix(brightness, saturation, 0.2 * change * (2 * draws[4] - 1)), contrast


def _colour_matrix(brightness, saturation, turn) -> Float[Array, "3 3"]:
    """RGB to RGB: the I and Q axes turned by `turn` of a circle and scaled by `saturation`."""
    cos, sin = jnp.cos(2 * jnp.pi * turn), jnp.sin(2 * jnp.pi * turn)
    plane = saturation * jnp.array([[0, 0, 0], [0, cos, sin], [0, -sin, cos]])
    return brightness * _product(_product(_FROM_YIQ, plane.at[0, 0].set(1.0)), _TO_YIQ)


def _erase_masks(key, size, *, prob):
    """Two [size] masks, True outside a random box of 2-33 % of the area and ratio 0.3-3.3."""
    apply, area, log_ratio, top, left = jax.random.uniform(key, (5,))
    area = 0.02 + area * (1 / 3 - 0.02)
    half = jnp.exp((2 * log_ratio - 1) * 0.5 * np.log(3.3))  # square root of the ratio
    sides = jnp.where(apply < prob, size * jnp.sqrt(area), 0.0) * jnp.array([half, 1 / half])
    sides = jnp.minimum(sides, size)
    starts = jnp.array([top, left]) * (size - sides)
    place = jnp.arange(size) + 0.5
    return tuple((place < a) | (place >= a + s) for a, s in zip(starts, sides, strict=True))


def _resample(image, rows, columns) -> Float[Array, "size 3 size"]:
    """rows @ image @ columns.T for one image [H, W, 3], with the channels kept in the middle."""
    # Channels before columns: then both products are plain large matrix products.
    image = image.swapaxes(1, 2).astype(jnp.float32)
    return jnp.einsum("ph,hcw,qw->pcq", rows, image, columns, precision=_HIGHEST)


def _render(
    images, rows, columns, matrix, contrast, *, mean=IMAGE_MEAN, std=IMAGE_STD
) -> Float[Array, "b size size 3"]:
    """The views with these matrices, normalised."""
    return normalize(_pixels(images, rows, columns, matrix, contrast), mean=mean, std=std)


def _pixels(images, rows, columns, matrix, contrast) -> Float[Array, "b size size 3"]:
    """Resample, apply the colour matrix and the contrast about the mean grey, clip to 0-255."""
    pixels = jax.vmap(_resample)(images, rows, columns)
    mean_grey = jnp.mean(pixels, axis=(1, 3))
    mean_grey = jnp.einsum("c,bcd,bd->b", _LUMA, matrix, mean_grey, precision=_HIGHEST)
    matrix = contrast[:, None, None] * matrix
    offset = ((1 - contrast) * mean_grey)[:, None, None]
    red, green, blue = (pixels[:, :, channel] for channel in range(3))
    weights = matrix[:, :, :, None, None]
    channels = [
        weights[:, c, 0] * red + weights[:, c, 1] * green + weights[:, c, 2] * blue + offset
        for c in range(3)
    ]
    return jnp.clip(jnp.stack(channels, axis=-1), 0, 255)

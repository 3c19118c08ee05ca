"""RandAugment's operations against Pillow's, alone and one after the other; what is drawn."""

from functools import partial

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from coatnet_jax import augment
from coatnet_jax.rand_augment import (
    FILL,
    OPERATIONS,
    apply_operations,
    check_rand_augment,
    rand_augment,
)

SIZE = 32
LEVEL = 0.7
WARPS = {"rotate", "shear_x", "shear_y", "translate_x", "translate_y"}
FILL_COLOUR = tuple(int(value) for value in FILL)


@pytest.fixture(scope="module")
def faces():
    """Four images [4, 32, 32, 3], smooth but for some noise, one of them with few levels."""
    rng = np.random.default_rng(0)
    smooth = [cv2.resize(rng.uniform(40, 200, (6, 6, 3)), (SIZE, SIZE)) for _ in range(4)]
    noisy = np.clip(np.stack(smooth) + rng.normal(0, 6, (4, SIZE, SIZE, 3)), 0, 255)
    noisy[3] = 30 * (noisy[3] // 30)
    return noisy.astype(np.uint8)


@pytest.fixture(scope="module")
def ours(faces):
    """`ours(names, sign)`: the images after these operations; compiled once for each length."""
    run = jax.jit(partial(apply_operations, magnitude=10 * LEVEL))

    def apply(names, sign=1.0, faces=faces):
        drawn = np.tile([OPERATIONS.index(name) for name in names], (len(faces), 1))
        signs = np.full(drawn.shape, sign, np.float32)
        return np.asarray(run(jnp.asarray(faces, jnp.float32), jnp.asarray(drawn), signs))

    return apply


def affine(image, matrix):
    """Pillow's affine map with a matrix [2, 2] and shift [2] about the middle of the picture."""
    matrix, shift = np.array(matrix[0], float), np.array(matrix[1], float)
    middle = np.full(2, SIZE / 2)
    shift = middle + shift - matrix @ middle
    data = (*matrix[0], shift[0], *matrix[1], shift[1])
    form = {"resample": Image.Resampling.BILINEAR, "fillcolor": FILL_COLOUR}
    return image.transform(image.size, Image.Transform.AFFINE, data, **form)


def pillows(name, image, sign):
    """What Pillow makes of the image, with the paper's range at `LEVEL`."""
    change, eye = sign * LEVEL, ((1, 0), (0, 1))
    bilinear = Image.Resampling.BILINEAR
    operations = {
        "identity": lambda: image,
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
        "posterize": lambda: ImageOps.posterize(image, 8 - 3),  # 4 * 0.7, rounded
        "solarize": lambda: ImageOps.solarize(image, 256 * (1 - LEVEL)),
        "brightness": lambda: ImageEnhance.Brightness(image).enhance(1 + 0.9 * change),
        "color": lambda: ImageEnhance.Color(image).enhance(1 + 0.9 * change),
        "contrast": lambda: ImageEnhance.Contrast(image).enhance(1 + 0.9 * change),
        "sharpness": lambda: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * change),
        "rotate": lambda: image.rotate(30 * change, bilinear, fillcolor=FILL_COLOUR),
        "shear_x": lambda: affine(image, (((1, 0.3 * change), (0, 1)), (0, 0))),
        "shear_y": lambda: affine(image, (((1, 0), (0.3 * change, 1)), (0, 0))),
        "translate_x": lambda: affine(image, (eye, (0.3 * change * SIZE, 0))),
        "translate_y": lambda: affine(image, (eye, (0, 0.3 * change * SIZE))),
    }
    return operations[name]()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_is_pillows(faces, ours, name, sign):
    found = ours([name], sign)
    for image, result in zip(faces, found, strict=True):
        expected = np.asarray(pillows(name, Image.fromarray(image), sign), float)
        off = np.abs(result - expected)
        # Pillow cuts grey and result to whole levels; a place on the very rim may be inside for
        # one alone.
        most = 0 if name in ("identity", "equalize", "posterize", "solarize") else 1.5
        assert np.quantile(off, 0.99 if name in WARPS else 1) <= most, name
        assert name == "identity" or np.abs(result - image).mean() > 1  # it does something


def test_two_operations_are_pillows_one_after_the_other_with_warps_last(faces, ours):
    for names in (("solarize", "color"), ("equalize", "shear_x"), ("contrast", "color")):
        for image, result in zip(faces, ours(names), strict=True):
            expected = Image.fromarray(image)
            for name in names:
                expected = pillows(name, expected, 1.0)
            off = np.abs(result - np.asarray(expected, float))
            # One level that Pillow has cut off may be worth a step of what comes next.
            assert np.quantile(off, 0.9) <= 2.5, names
    np.testing.assert_array_equal(ours(("rotate", "equalize")), ours(("equalize", "rotate")))


def test_two_warps_are_one_map(faces, ours):
    moved = ours(("translate_x", "translate_y"))
    places = np.arange(SIZE) + 0.3 * LEVEL * SIZE  # beyond the rim nothing is looked at
    seen = np.arange(SIZE) < SIZE - np.ceil(0.3 * LEVEL * SIZE)
    grid = np.meshgrid(places.astype(np.float32), places.astype(np.float32))
    for image, result in zip(faces, moved, strict=True):
        expected = cv2.remap(image.astype(np.float32), *grid, cv2.INTER_LINEAR)
        off = np.abs(result - expected)[seen][:, seen]
        assert off.max() < 3  # OpenCV rounds places to a 32nd of a pixel
        np.testing.assert_allclose(result[-1, -1], FILL)
    back = ours(("rotate", "identity"), 1.0)
    assert not np.allclose(back, ours(("rotate", "rotate"), 1.0))


def test_images_of_one_level_stay_finite(faces, ours):
    flat = np.full_like(faces, 80)
    for name in OPERATIONS:
        result = ours([name], faces=flat)
        assert np.isfinite(result).all()
        assert name not in ("identity", "autocontrast", "equalize") or (result == 80).all()


def test_every_image_draws_its_own_operations_and_all_come_up(faces):
    many = jnp.asarray(np.repeat(faces[:1], 280, axis=0), jnp.float32)
    draw = jax.jit(partial(rand_augment, ops=1, magnitude=7))
    one, same, other = (np.asarray(draw(jax.random.key(seed), many)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    # Four operations and the identity have one form, the nine others two (directions).
    kinds, counts = np.unique(one.reshape(280, -1), axis=0, return_counts=True)
    assert len(kinds) == 5 + 2 * 9
    assert counts.max() < 40  # of 20 expected for those of one form
    assert one.min() >= 0 and one.max() <= 255


def test_view_is_the_plain_one_after_the_operations_of_its_magnitude(faces):
    key, strength = jax.random.key(3), dict(rand_augment_ops=1, rand_augment_magnitude=4.0)
    view = partial(augment.supervised_view, size=24, jitter_prob=0.0, erase_prob=0.0)
    pixels = augment.denormalize(jax.jit(view)(key, faces)).astype(jnp.float32)
    fill = tuple(255 * value for value in augment.IMAGE_MEAN)
    free = jax.random.split(key, len(faces) + 1)[-1]  # the others are the images' own
    drawn = jax.jit(partial(rand_augment, ops=1, magnitude=4.0, fill=fill))(free, pixels)
    assert np.abs(drawn - pixels).max((1, 2, 3)).min() > 1  # none drew the identity
    found = jax.jit(partial(view, **strength))(key, faces)
    assert np.abs(augment.normalize(drawn) - found).max() < 0.02


@pytest.mark.parametrize(("ops", "magnitude"), [(-1, 9), (2, 11), (2, -0.5)])
def test_what_cannot_be_is_refused_in_one_line(ops, magnitude):
    with pytest.raises(
        ValueError, match="rand_augment_ops is .* rand_augment_magnitude is"
    ) as error:
        check_rand_augment(ops, magnitude)
    assert "\n" not in str(error.value)

"""Views against jax.image, OpenCV, torchvision's formulas in NumPy, colorsys, and ramps that tell
which part of an image a view shows."""

import colorsys
from functools import partial

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter1d

from coatnet_jax import augment

LUMA = np.array([0.299, 0.587, 0.114])
AS_IT_IS = dict(crop=(1.0, 1.0), ratio=(1.0, 1.0), flip_prob=0.0, jitter_prob=0.0)
PLAIN = dict(**AS_IT_IS, jitter=0.5, grey_prob=0.0, blur_prob=0.0, blur_sigma=(0.1, 1.0))

# The options are traced, so that one compilation serves all tests of a shape.
simclr_view = jax.jit(augment.simclr_view, static_argnames="size")
supervised_view = jax.jit(augment.supervised_view, static_argnames="size")


@pytest.fixture(scope="module")
def faces():
    """Eight smooth random images [8, 32, 32, 3] of middling colours."""
    noise = np.random.default_rng(0).uniform(60, 190, size=(8, 8, 8, 3)).astype(np.float32)
    return np.stack([cv2.resize(n, (32, 32)) for n in noise]).astype(np.uint8)


def _pixels(view):
    return 255 * (np.asarray(view, np.float64) * augment.IMAGE_STD + augment.IMAGE_MEAN)


def _simclr(faces, size=32, seed=0, **options):
    return simclr_view(jax.random.key(seed), faces, size=size, **(PLAIN | options))


def test_views_with_nothing_drawn_are_the_normalised_images(faces):
    expected = (faces / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    supervised = supervised_view(jax.random.key(0), faces, size=32, **AS_IT_IS, erase_prob=0.0)
    for view in (_simclr(faces), supervised, augment.eval_view(faces, size=32)):
        assert view.dtype == jnp.float32
        np.testing.assert_allclose(view, expected, atol=1e-5)
    np.testing.assert_array_equal(augment.denormalize(_simclr(faces)), faces)


def test_views_take_another_mean_and_standard_deviation(faces):
    other = {"mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.3)}
    expected = (faces / 255 - other["mean"]) / other["std"]
    supervised = supervised_view(
        jax.random.key(0), faces, size=32, **AS_IT_IS, erase_prob=0.0, **other
    )
    for view in (_simclr(faces, **other), supervised, augment.eval_view(faces, size=32, **other)):
        np.testing.assert_allclose(view, expected, atol=2e-5)
    np.testing.assert_array_equal(augment.denormalize(supervised, **other), faces)


def test_full_strength_views_are_finite_and_in_range(faces):
    for seed in range(3):
        view = simclr_view(jax.random.key(seed), faces[:, :, :24], size=20, jitter=1.0)
        assert view.shape == (8, 20, 20, 3)
        assert -0.01 <= _pixels(view).min() and _pixels(view).max() <= 255.01


def test_same_key_same_view_and_every_image_draws_its_own(faces):
    same = np.repeat(faces[:1], 8, axis=0)
    one, two, other = (simclr_view(jax.random.key(k), same, size=20) for k in (0, 0, 1))
    np.testing.assert_array_equal(one, two)
    assert not np.allclose(one, other)
    assert all(not np.allclose(one[0], view) for view in one[1:])


@pytest.mark.parametrize("size", [12, 40])  # shrinking and growing
def test_crop_is_jax_image_resize_of_the_cut_out_part(faces, size):
    top, left, height, width = 3, 5, 21, 27
    rows = augment._resize_matrix(top, height, 32, size)
    columns = augment._resize_matrix(left, width, 32, size)
    ours = np.swapaxes(augment._resample(faces[0], rows, columns), 1, 2)
    cut = jnp.asarray(faces[0, top : top + height, left : left + width], jnp.float32)
    theirs = jax.image.resize(cut, (size, size, 3), "linear", antialias=True)
    np.testing.assert_allclose(ours, theirs, atol=1e-2)


def test_crop_is_close_to_cv2(faces):
    rows, columns = (augment._resize_matrix(start, 24, 32, 12) for start in (2, 6))
    ours = np.swapaxes(augment._resample(faces[0], rows, columns), 1, 2)
    area = cv2.resize(faces[0, 2:26, 6:30], (12, 12), interpolation=cv2.INTER_AREA)
    assert np.abs(ours - area).mean() < 2  # of 255; a triangle is a little softer than a box


def _ramps(count, height, width):
    """Images whose red tells the column and green the row, and the view's box read from them."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0], image[..., 1] = 3 * np.arange(width), 3 * np.arange(height)[:, None]
    return np.repeat(image[None], count, axis=0)


@pytest.mark.parametrize("shape", [(64, 64), (40, 80)])
def test_crops_keep_to_their_area_ratio_and_flip_probability(shape):
    view = _simclr(_ramps(512, *shape), size=16, crop=(0.3, 0.7), ratio=(0.8, 1.25), flip_prob=0.5)
    # Three times the pixels that one step in the view covers.
    step = (_pixels(view)[:, 12, 12] - _pixels(view)[:, 3, 3]) / 9
    width, height = np.abs(step[:, 0]) * 16 / 3, step[:, 1] * 16 / 3
    area, ratio = width * height / (shape[0] * shape[1]), width / height
    assert 0.28 < area.min() and area.max() < 0.72 and np.ptp(area) > 0.3
    free = (height < shape[0] - 1) & (width < shape[1] - 1)  # not cut to the image
    assert 0.78 < ratio[free].min() and ratio[free].max() < 1.28 and np.ptp(ratio) > 0.3
    assert 0.4 < np.mean(step[:, 0] < 0) < 0.6
    middle = _pixels(view)[:, 7:9, 7:9].mean((1, 2)) / 3
    for axis, length, side in ((0, shape[1], width), (1, shape[0], height)):
        start, end = middle[:, axis] - side / 2, middle[:, axis] + side / 2
        assert start.min() > -1.5 and end.max() < length + 0.5
        assert np.ptp(start) > 0.15 * length


def test_flip_is_the_mirrored_view(faces):
    plain = _simclr(faces, size=24, crop=(0.5, 0.8))
    flipped = _simclr(faces, size=24, crop=(0.5, 0.8), flip_prob=1.0)
    np.testing.assert_allclose(flipped, plain[:, :, ::-1], atol=1e-4)


def test_grey_is_the_luma_in_all_three_channels(faces):
    grey = _pixels(_simclr(faces, grey_prob=1.0))
    np.testing.assert_allclose(grey, np.repeat((faces @ LUMA)[..., None], 3, -1), atol=1e-2)


def test_blur_matches_cv2_away_from_the_edge(faces):
    blurred = _pixels(_simclr(faces, blur_prob=1.0, blur_sigma=(1.3, 1.3)))
    expected = cv2.GaussianBlur(faces[3].astype(np.float64), (15, 15), 1.3)
    np.testing.assert_allclose(blurred[3, 7:-7, 7:-7], expected[7:-7, 7:-7], atol=0.01)


def test_blur_keeps_a_flat_image_flat_up_to_the_edge():
    flat = np.full((8, 32, 32, 3), 90, np.uint8)
    blurred = _pixels(_simclr(flat, blur_prob=1.0, blur_sigma=(0.1, 3.0)))
    np.testing.assert_allclose(blurred, 90, atol=1e-2)


def _supervised(faces, **options):
    options = {"erase_prob": 0.0, **AS_IT_IS, **options}
    return _pixels(augment.supervised_view(jax.random.key(0), faces, size=32, **options))


def test_supervised_views_blur_and_sharpen_apart_and_each_by_its_own_chance(faces):
    image, inside = faces[3].astype(np.float64), (3, slice(7, -7), slice(7, -7))
    blurred = _supervised(faces, blur_prob=1.0, blur_sigma=(1.3, 1.3))
    expected = cv2.GaussianBlur(image, (15, 15), 1.3)[7:-7, 7:-7]
    np.testing.assert_allclose(blurred[inside], expected, atol=0.01)

    # The mask's share is drawn: the one that fits has to fit every pixel.
    sharper = _supervised(faces, sharpen_prob=1.0, sharpen=0.6)
    one_px = gaussian_filter1d(np.eye(32), 1.0, axis=1, mode="constant", truncate=9)
    one_px /= one_px.sum(1, keepdims=True)

    def mask(share):
        edges = (1 + share) * np.eye(32) - share * one_px
        return np.clip(np.einsum("ph,hwc,qw->pqc", edges, image, edges), 0, 255)

    off = [np.abs(mask(share) - sharper[3]).max() for share in np.linspace(0, 0.6, 601)]
    assert min(off) < 0.1 and np.argmin(off) > 10
    assert np.linalg.norm(np.diff(sharper[3], axis=0)) > np.linalg.norm(np.diff(image, axis=0))

    some = _supervised(faces, blur_prob=0.5, blur_sigma=(1.0, 1.0), sharpen_prob=0.5)
    steps = [np.diff(x, axis=1).std((1, 2, 3)) for x in (some, _supervised(faces))]
    change = steps[0] / steps[1]
    assert (change < 0.95).any() and (change > 1.05).any() and (abs(change - 1) < 1e-3).any()


def test_drawing_more_leaves_what_was_drawn_before(faces):
    """Crops, colours and boxes of a training are those of one without blur and sharpening."""
    options = {"size": 32, "erase_prob": 0.5}
    plain = augment.supervised_view(jax.random.key(4), faces, **options)
    hardly = augment.supervised_view(
        jax.random.key(4),
        faces,
        **options,
        blur_prob=1.0,
        blur_sigma=(1e-3, 1e-3),
        sharpen_prob=1.0,
        sharpen=1e-6,
    )
    np.testing.assert_allclose(hardly, plain, atol=1e-4)


def _render(image, *, brightness=1.0, contrast=1.0, saturation=1.0, turn=0.0):
    eye = jnp.eye(image.shape[0])[None]
    matrix = augment._colour_matrix(brightness, saturation, turn)[None]
    return _pixels(augment._render(image[None], eye, eye, matrix, jnp.array([contrast])))[0]


def test_colour_steps_match_torchvisions_formulas(faces):
    image = faces[1].astype(np.float64)
    grey = (image @ LUMA)[..., None]
    for factor in (0.7, 1.2):
        results = {
            "brightness": factor * image,
            "contrast": factor * image + (1 - factor) * grey.mean(),
            "saturation": factor * image + (1 - factor) * grey,
        }
        for name, expected in results.items():
            np.testing.assert_allclose(
                _render(faces[1], **{name: factor}),
                np.clip(expected, 0, 255),
                atol=0.01,
                err_msg=name,
            )


def test_colour_steps_in_a_row_match_their_composition(faces):
    image = 1.1 * faces[1].astype(np.float64)
    grey_mean = (image @ LUMA).mean()
    image = 0.8 * image + 0.2 * grey_mean
    image = 0.6 * image + 0.4 * (image @ LUMA)[..., None]
    rendered = _render(faces[1], brightness=1.1, contrast=0.8, saturation=0.6)
    np.testing.assert_allclose(rendered, image, atol=0.01)


@pytest.mark.parametrize("turn", [-0.1, 0.05, 0.1])
def test_hue_turns_as_in_colorsys_and_keeps_the_luma(turn):
    skins = np.array([[[224, 172, 140], [141, 85, 60], [198, 134, 100], [90, 60, 50]]], np.uint8)
    square = np.repeat(skins, 4, axis=0)
    turned = _render(square, turn=turn)
    np.testing.assert_allclose(turned @ LUMA, square @ LUMA, atol=0.05)
    hue = np.array([colorsys.rgb_to_hsv(*pixel / 255)[0] for pixel in skins[0]])
    new = np.array([colorsys.rgb_to_hsv(*pixel / 255)[0] for pixel in turned[0]])
    moved = (new - hue + 0.5) % 1 - 0.5
    np.testing.assert_allclose(moved, turn, atol=0.045)  # YIQ is not HSV, only close


def test_jitter_is_drawn_with_its_probability_and_strength():
    keys = jax.random.split(jax.random.key(0), 2000)
    matrix, contrast = jax.vmap(partial(augment._jitter, prob=0.8, strength=0.5))(keys)
    untouched = np.isclose(contrast, 1) & np.isclose(matrix, np.eye(3), atol=1e-5).all((1, 2))
    assert 0.17 < untouched.mean() < 0.23
    brightness = np.asarray(matrix).sum(2)[:, 0]  # a grey pixel only gets brighter or darker
    for factor in (contrast, brightness):
        assert 0.6 - 1e-4 <= factor.min() < 0.62 and 1.38 < factor.max() <= 1.4 + 1e-4
    saturation = np.sqrt(np.maximum(np.linalg.det(matrix) / brightness**3, 0))
    assert 0.6 - 1e-3 <= saturation.min() < 0.62 and 1.38 < saturation.max() <= 1.4 + 1e-3
    plane = augment._TO_YIQ @ np.asarray(matrix) @ np.linalg.inv(augment._TO_YIQ)
    turn = np.arctan2(plane[:, 1, 2], plane[:, 1, 1]) / (2 * np.pi)
    assert -0.1 - 1e-4 <= turn.min() < -0.09 and 0.09 < turn.max() <= 0.1 + 1e-4


def test_erasing_cuts_one_box_of_the_mean_colour():
    white = np.full((512, 8, 8, 3), 255, np.uint8)
    view = np.asarray(
        supervised_view(jax.random.key(0), white, size=32, **AS_IT_IS, erase_prob=0.25)
    )
    erased = (view == 0).all(-1)
    share = erased.mean((1, 2))
    assert 0.18 < np.mean(share > 0) < 0.32
    assert share.max() < 0.37 and share[share > 0].min() > 0.005
    for mask in erased[share > 0]:
        rows, columns = mask.any(1), mask.any(0)
        np.testing.assert_array_equal(mask, np.outer(rows, columns))  # one full rectangle
        assert np.ptp(np.flatnonzero(rows)) + 1 == rows.sum()
    reached = erased[(share > 0) & (share < 0.15)]  # small boxes come near all four edges
    for axis in (1, 2):
        ends = [np.flatnonzero(mask.any(2 - axis))[[0, -1]] for mask in reached]
        assert np.min(ends) <= 1 and np.max(ends) >= 30
    always = supervised_view(jax.random.key(0), white, size=32, **AS_IT_IS, erase_prob=1.0)
    assert (np.asarray(always) == 0).all(-1).any((1, 2)).all()


def test_eval_view_is_the_antialiased_resize(faces):
    wide = faces[:, 4:28]
    expected = jax.image.resize(wide.astype(np.float32), (8, 24, 24, 3), "linear", antialias=True)
    np.testing.assert_allclose(_pixels(augment.eval_view(wide, size=24)), expected, atol=1e-2)


def test_eval_view_of_a_centre_is_that_of_the_picture_cut_out(faces):
    for side, margin in ((0.5, 8), (0.75, 4), (1.0, 0)):
        cut = faces[:, margin : 32 - margin, margin : 32 - margin]
        for size in (16, 24):
            centre = augment.eval_view(faces, size=size, side=side)
            np.testing.assert_allclose(centre, augment.eval_view(cut, size=size), atol=1e-4)


def test_mixup_blends_images_and_targets_with_the_same_share(faces):
    images = augment.normalize(faces)
    targets = {"age": jnp.eye(8), "gender": jnp.tile(jnp.eye(2), (4, 1))}
    mixed, new = augment.mixup(jax.random.key(0), images, targets, alpha=0.4)
    share = np.diag(new["age"])
    assert ((share >= 0) & (share <= 1)).all() and np.ptp(share) > 0.1
    np.testing.assert_allclose(new["age"].sum(-1), 1, rtol=1e-6)
    own = share[:, None, None, None]
    np.testing.assert_allclose(mixed, own * images + (1 - own) * images[::-1], atol=1e-5)
    two = share[:, None]
    expected = two * targets["gender"] + (1 - two) * targets["gender"][::-1]
    np.testing.assert_allclose(new["gender"], expected, atol=1e-6)


def test_mixup_with_alpha_zero_changes_nothing(faces):
    images, targets = augment.mixup(jax.random.key(0), faces, np.eye(8), alpha=0)
    assert images is faces
    np.testing.assert_array_equal(targets, np.eye(8))

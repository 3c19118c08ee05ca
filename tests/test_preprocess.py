"""What is done to pictures at build time, and that the set says so."""

import csv
import json
import pickle

import cv2
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from coatnet_jax.main import main
from input_pipeline.face_crops import UTKFACE, Face
from input_pipeline.images import decode_rgb, encode_jpeg
from input_pipeline.prepare import prepare
from input_pipeline.preprocess import Preprocess, denoise, parse_steps, unsharp


def find_by_colour(image):
    """A detector for tests: as many faces as the red of the first pixel says, in tens."""
    h, w, _ = image.shape
    face = Face(np.array([0.0, 0, w, h]), 1.0, UTKFACE.landmarks * [w, h])
    return [face] * round(image[0, 0, 0] / 10)


def noisy(seed=0, size=64):
    rng = np.random.default_rng(seed)
    image = np.full((size, size, 3), 60.0)
    image[:, size // 2 :] = 180
    return np.clip(image + rng.normal(0, 5, image.shape), 0, 255).astype(np.uint8)


def test_denoising_lowers_noise_and_keeps_edges():
    before, after = noisy(), denoise(noisy())
    assert after[:, :30].std() < 0.7 * before[:, :30].std()
    assert after[:, 34:].mean() - after[:, :30].mean() == pytest.approx(120, abs=1.5)
    assert np.diff(after[..., 0].astype(int), axis=1)[:, 31].mean() > 110


def test_unsharp_makes_edges_steeper_and_leaves_flat_parts():
    soft = cv2.GaussianBlur(noisy(), (0, 0), 2)
    laplacian = [cv2.Laplacian(x, cv2.CV_32F).var() for x in (soft, unsharp(soft))]
    assert laplacian[1] > 1.3 * laplacian[0]
    flat = np.full((20, 20, 3), 77, np.uint8)
    np.testing.assert_array_equal(unsharp(flat), flat)


# Where one of the next two fails on purpose, VERSION must be raised: sets get other pixels.
def test_unsharp_adds_half_of_what_a_gaussian_of_one_pixel_takes_away():
    image = noisy()
    expected = 1.5 * image - 0.5 * gaussian_filter(image.astype(float), (1, 1, 0))
    assert np.abs(unsharp(image) - expected)[4:-4, 4:-4].max() <= 1  # the blur is rounded too


def test_denoising_is_the_plain_bilateral_filter():
    image = noisy().astype(float)
    total, weights = 0.0, 0.0
    for y in range(-2, 3):
        for x in range(-2, 3):
            if y * y + x * x <= 4:  # a disc of 2 px
                other = np.roll(image, (y, x), (0, 1))
                unlike = np.abs(other - image).sum(-1, keepdims=True)  # of the three colours
                weight = np.exp(-(y * y + x * x) / (2 * 2**2) - unlike**2 / (2 * 15**2))
                total, weights = total + weight * other, weights + weight
    off = np.abs(denoise(noisy()) - total / weights)[2:-2, 2:-2]
    assert off.max() <= 1


def test_steps_are_done_in_their_order():
    image, data = noisy(), cv2.imencode(".png", noisy()[..., ::-1])[1].tobytes()
    expected = encode_jpeg(unsharp(denoise(image)), 95, full_colour=True)
    assert Preprocess(("denoise", "unsharp"))(data) == expected
    assert Preprocess(("unsharp", "denoise"))(data) != expected
    again = pickle.loads(pickle.dumps(Preprocess(("denoise", "unsharp"), find_by_colour)))
    assert again.id == Preprocess(("denoise", "unsharp"), find_by_colour).id


def test_written_pictures_are_close_to_what_was_made():
    image = cv2.GaussianBlur(noisy(), (0, 0), 2)
    back = decode_rgb(Preprocess()(cv2.imencode(".png", image[..., ::-1])[1].tobytes()))
    assert np.abs(back.astype(int) - image).mean() < 0.7


def test_each_way_of_preparing_has_its_own_name():
    ways = [
        Preprocess(("unsharp",)),
        Preprocess(("denoise",)),
        Preprocess(("denoise", "unsharp")),
        Preprocess(("unsharp", "denoise")),
        Preprocess((), find_by_colour),
        Preprocess((), find_by_colour, crop=224),
        Preprocess(("unsharp",), find_by_colour),
    ]
    assert len({way.id for way in ways}) == len(ways)


@pytest.mark.parametrize(
    ("text", "message"),
    [("unsharb", "did you mean unsharp"), ("blur9", "known are"), ("unsharp,unsharp", "twice")],
)
def test_wrong_steps_are_told_in_one_line(text, message):
    with pytest.raises(ValueError, match=message):
        parse_steps(text)
    assert parse_steps(" denoise, unsharp ,") == ("denoise", "unsharp")


def write_photos(folder, reds):
    folder.mkdir()
    for i, red in enumerate(reds):
        image = noisy(i, size=90)
        image[:4, :4] = red, 0, 0
        path = folder / f"{20 + i}_0_0_201701{i:011d}.png"
        cv2.imwrite(str(path), image[..., ::-1])
    return folder


def test_prepare_crops_faces_and_lists_what_it_leaves_out(tmp_path):
    photos = write_photos(tmp_path / "photos", [10, 0, 10, 20, 10])
    made = Preprocess(("denoise",), find_by_colour, crop=80)
    info = prepare(
        [str(photos)], tmp_path, name="set", transform=made, transform_id=made.id, progress=None
    )
    assert info["kept"] == 3
    assert info["skipped"] == {"no face found": 1, "more than one face": 1}
    with (tmp_path / "set/skipped.csv").open() as file:
        reasons = {row["file"][:2]: row["reason"] for row in csv.DictReader(file)}
    assert reasons == {"21": "no face found", "23": "more than one face (2 found)"}
    with (tmp_path / "set/labels.csv").open() as file:
        assert {(row["height"], row["width"]) for row in csv.DictReader(file)} == {("80", "80")}


def test_command_line_records_what_was_done(tmp_path, monkeypatch, capsys):
    photos = write_photos(tmp_path / "photos", [10] * 4)
    monkeypatch.setenv("COATNET_JAX_HOME", str(tmp_path / "home"))

    def built(*words):
        with pytest.raises(SystemExit) as end:
            main(["prepare", str(photos), "--root", str(tmp_path), "--name", "set", *words])
        assert end.value.code == 0
        return json.loads((tmp_path / "set/prepare.json").read_text())

    plain, sharp = built(), built("--preprocess", "unsharp")
    assert plain["transform_id"] == "" and "unsharp" in sharp["transform_id"]
    assert plain["fingerprint"] != sharp["fingerprint"]
    capsys.readouterr()
    assert built("--preprocess=unsharp") == sharp and "is ready" in capsys.readouterr().out

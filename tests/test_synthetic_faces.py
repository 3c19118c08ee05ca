"""Drawn faces: reproducible, named as UTKFace, and showing age in more than colour."""

import hashlib
import json
import re

import cv2
import numpy as np
import pytest

from input_pipeline import face_drawing
from input_pipeline.face_traits import pick_traits
from input_pipeline.names import parse_utkface_name
from input_pipeline.synthetic_faces import draw_face, draw_labels, marker, write_drawn_faces

NAME = re.compile(r"(\d{1,3})_([01])_([0-4])_(\d{17})\.jpg\.chip\.jpg")


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, np.ndarray]:
    """240 faces of even ages: images uint8 [240,48,48,3], ages [240]."""
    ages = np.tile(np.linspace(1, 90, 60).astype(int), 4)
    rngs = (np.random.default_rng([7, i]) for i in range(len(ages)))
    faces = [draw_face(rng, ages[i], i % 2, i % 5, 48) for i, rng in enumerate(rngs)]
    return np.stack(faces), ages


def _hashes(folder) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_same_generator_state_gives_same_face_and_other_seeds_another():
    one, same, other = (draw_face(np.random.default_rng(s), 30, 1, 2, 64) for s in (0, 0, 1))
    assert one.dtype == np.uint8 and one.shape == (64, 64, 3) and one.flags.c_contiguous
    np.testing.assert_array_equal(one, same)
    assert np.abs(one.astype(int) - other).mean() > 5


@pytest.mark.parametrize("age", [0, 1, 18, 60, 116])
def test_every_label_can_be_drawn(age):
    for gender in (0, 1):
        for race in range(5):
            face = draw_face(np.random.default_rng([age, gender, race]), age, gender, race, 16)
            assert face.shape == (16, 16, 3) and face.std() > 5


def test_folder_is_the_same_byte_for_byte(tmp_path):
    one = write_drawn_faces(tmp_path / "a", count=12, size=32, seed=3)
    two = write_drawn_faces(tmp_path / "b", count=12, size=32, seed=3)
    other = write_drawn_faces(tmp_path / "c", count=12, size=32, seed=4)
    assert one == tmp_path / "a" and len(_hashes(one)) == 12
    assert _hashes(one) == _hashes(two)
    assert not set(_hashes(one).values()) & set(_hashes(other).values())


def test_names_parse_and_files_decode(tmp_path):
    folder = write_drawn_faces(tmp_path, count=10, size=40)
    files = sorted(folder.glob("*.jpg"))
    assert len(files) == 10
    for path in files:
        age, gender, race, _ = (int(field) for field in NAME.fullmatch(path.name).groups())
        assert parse_utkface_name(path.name)[:3] == (age, gender, race)
        assert cv2.imread(str(path)).shape == (40, 40, 3)


def test_files_hold_the_drawn_face_in_rgb_order(tmp_path):
    folder = write_drawn_faces(tmp_path, count=3, size=96, seed=5)
    for i, (age, gender, race, name) in enumerate(draw_labels(3, 5)):
        face = draw_face(np.random.default_rng([5, i]), age, gender, race, 96)
        stored = cv2.imread(str(folder / name))[..., ::-1]
        assert np.abs(stored.mean((0, 1)) - face.mean((0, 1))).max() < 2


def test_shares_are_near_utkface():
    columns = zip(*draw_labels(2400, 0), strict=True)
    ages, genders, races, names = (np.array(column) for column in columns)
    assert ages.min() == 1 and 95 <= ages.max() <= 100
    classes = np.digitize(ages, (18, 41, 61))
    np.testing.assert_allclose(np.bincount(classes) / 2400, (0.18, 0.54, 0.18, 0.10), atol=0.005)
    assert genders.sum() == 1200
    np.testing.assert_allclose(np.bincount(races) / 2400, (0.42, 0.19, 0.15, 0.17, 0.07), atol=0.04)
    assert len(set(names.tolist())) == 2400 and all(NAME.fullmatch(name) for name in names)


def test_complete_folder_is_reused_and_interrupted_one_completed(tmp_path):
    lines: list[str] = []
    folder = write_drawn_faces(tmp_path, count=8, size=32, progress=lines.append)
    before = _hashes(folder)
    assert lines == ["drew 8 of 8 faces"]
    write_drawn_faces(tmp_path, count=8, size=32, progress=lines.append)
    assert len(lines) == 1
    for path in sorted(folder.glob("*.jpg"))[:3]:
        path.unlink()
    write_drawn_faces(tmp_path, count=8, size=32, progress=lines.append)
    assert lines[1:] == ["drew 3 of 3 faces"] and _hashes(folder) == before


def test_other_parameters_or_a_torn_marker_mean_drawing_anew(tmp_path):
    folder = write_drawn_faces(tmp_path / "a", count=8, size=32)
    write_drawn_faces(folder, count=5, size=24, seed=1)
    fresh = _hashes(write_drawn_faces(tmp_path / "b", count=5, size=24, seed=1))
    assert _hashes(folder) == fresh
    assert json.loads(marker(folder).read_text())["size"] == 24
    next(folder.glob("*.jpg")).write_bytes(b"torn")
    marker(folder).write_text("{")
    assert _hashes(write_drawn_faces(folder, count=5, size=24, seed=1)) == fresh


def test_foreign_files_are_never_touched(tmp_path):
    photo = tmp_path / "25_0_1_20170116174525125.jpg.chip.jpg"
    photo.write_bytes(b"someone's photograph")
    with pytest.raises(ValueError, match="25_0_1_2017.*new or empty folder"):
        write_drawn_faces(tmp_path, count=2, size=32)
    assert [p.name for p in tmp_path.iterdir()] == [photo.name]
    with pytest.raises(ValueError, match="is a file"):
        write_drawn_faces(photo, count=2, size=32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count 0 is out of range"),
        ({"count": -3}, "count -3 is out of range"),
        ({"size": 8}, "size 8 is out of range: give 16 to 1024"),
        ({"size": 4096}, "size 4096"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_wrong_options_are_clear_errors(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        write_drawn_faces(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("labels", [(-1, 0, 0), (117, 0, 0), (30, 2, 0), (30, 0, 5), (30, -1, 0)])
def test_wrong_labels_are_clear_errors(labels):
    with pytest.raises(ValueError, match="out of range: give 0 to"):
        draw_face(np.random.default_rng(0), *labels)


def test_mean_colour_explains_little_of_the_age(drawn):
    images, ages = drawn
    colour = np.c_[images.mean((1, 2)), np.ones(len(ages))]
    rest = ages - colour @ np.linalg.lstsq(colour, ages, rcond=None)[0]
    assert 1 - rest.var() / ages.var() < 0.35


def test_no_single_pixel_tells_the_age(drawn):
    images, ages = drawn
    pixels = images.reshape(len(images), -1).astype(float)
    pixels = (pixels - pixels.mean(0)) / (pixels.std(0) + 1e-6)
    correlation = pixels.T @ (ages - ages.mean()) / len(ages) / ages.std()
    assert (correlation**2).max() < 0.5


def test_older_faces_have_more_lines(drawn):
    images, ages = drawn
    middle = [cv2.cvtColor(image[12:40, 10:38], cv2.COLOR_RGB2GRAY) for image in images]
    energy = np.array([np.abs(cv2.Laplacian(m, cv2.CV_32F)).mean() / (m.std() + 1) for m in middle])
    assert energy[ages > 60].mean() > 1.1 * energy[(ages > 15) & (ages < 35)].mean()


def test_wrinkles_darken_old_faces_and_hardly_young_ones(monkeypatch):
    drawn_wrinkles, changes = face_drawing._wrinkles, []

    def spy(rng, canvas, *rest):
        before = canvas.image.copy()
        drawn_wrinkles(rng, canvas, *rest)
        changes.append((before - canvas.image).mean())

    monkeypatch.setattr(face_drawing, "_wrinkles", spy)
    for age in (20, 70):
        for i in range(10):
            draw_face(np.random.default_rng(i), age, i % 2, i % 5, 48)
    young, old = np.mean(changes[:10]), np.mean(changes[10:])
    assert old > 5 * young and old > 1


def test_signs_of_age_grow_and_stray():
    def mean_and_spread(age, sign):
        people = [pick_traits(np.random.default_rng(i), age, i % 2, i % 5) for i in range(60)]
        values = [getattr(person, sign) for person in people]
        return np.mean(values), np.std(values)

    for sign in ("forehead", "crows_feet", "folds", "bags", "jowl", "grey", "droop", "mottle"):
        means, spreads = zip(*(mean_and_spread(age, sign) for age in (25, 50, 75)), strict=True)
        assert means[0] < means[1] < means[2] and means[2] > means[0] + 0.3, sign
        assert spreads[1] > 0.05, sign
    beards = [pick_traits(np.random.default_rng(i), 17, 0, 0).beard for i in range(60)]
    assert set(beards) == {"none"}
    assert [round(mean_and_spread(age, "child")[0]) for age in (1, 25)] == [1, 0]

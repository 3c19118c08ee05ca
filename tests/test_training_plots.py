"""Curves of a training: what the axes show, what the panels say, and how they are laid out."""

import json
import math

import numpy as np
import pytest

from coatnet_jax import report, training_plots

STEPS = range(0, 1001, 10)


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draws rows of metrics and gives back the figure instead of its file."""
    drawn = []
    monkeypatch.setattr(training_plots, "save_figure", lambda figure, _: drawn.append(figure))

    def drawing(rows, **options):
        training_plots.training_curves(tmp_path / "curves.png", rows, **options)
        drawn[-1].draw_without_rendering()  # lays it out
        return drawn[-1]

    return drawing


def panel(figure, unit):
    (found,) = [ax for ax in figure.axes if ax.get_ylabel() == unit]
    return found


def notes(ax):
    return [text.get_text() for text in ax.texts if text.get_text()]


def rows_of(split, **courses):
    """A row a step; each course is a function of the step."""
    return [
        {"step": step, "split": split, **{name: f(step) for name, f in courses.items()}}
        for step in STEPS
    ]


def test_untrained_steps_and_a_spike_leave_the_later_course_readable(draw):
    wave = np.random.default_rng(0).normal(scale=0.4, size=1001)
    train = {step: 25 * math.exp(-step / 30) + 5 + wave[step] for step in STEPS}
    train[600] = 500.0
    validation = {step: 5.8 - 1.3 * step / 1000 for step in range(100, 1001, 100)}
    rows = rows_of("train", mae=train.get)
    rows += [{"step": s, "split": "validation", "mae": v} for s, v in validation.items()]
    ax = panel(draw(rows), "MAE, years")
    low, high = ax.get_ylim()
    assert low < min(validation.values()) < max(validation.values()) < high
    # 30 or 500 years would make it a flat line.
    assert np.ptp(list(validation.values())) > 0.2 * (high - low)
    above = [value for value in train.values() if value > high]
    assert len(above) > 1 and min(train.values()) > low
    assert notes(ax) == [f"{len(above)} values above, up to 500"]


@pytest.mark.parametrize(("count", "inside"), [(4, True), (19, True), (20, False)])
def test_of_few_training_values_none_is_a_spike(draw, count, inside):
    values = [5.0 + i % 2 / 10 for i in range(count)]
    values[-2] = 9.0
    ax = panel(
        draw([{"step": 10 * i, "split": "train", "mae": v} for i, v in enumerate(values)]),
        "MAE, years",
    )
    assert (ax.get_ylim()[1] > 9) == inside
    assert notes(ax) == ([] if inside else ["1 value above, up to 9"])


def test_every_validation_after_the_first_tenth_is_inside(draw):
    rows = rows_of("train", mae=lambda step: 5 + (step % 20) / 100)
    late = [(100, 40.0), *((step, 5.0) for step in range(200, 900, 100)), (900, 0.5)]
    rows += [{"step": s, "split": "validation", "mae": v} for s, v in [(50, 90.0), *late]]
    ax = panel(draw(rows), "MAE, years")
    low, high = ax.get_ylim()
    assert low < 0.5 and 40 < high < 90
    assert notes(ax) == ["1 value above, up to 90"]


def test_all_is_shown_where_the_first_steps_stretch_little(draw):
    ax = panel(draw(rows_of("train", accuracy=lambda step: step / 1000)), "accuracy")
    low, high = ax.get_ylim()
    assert low < 0 and high > 1 and not notes(ax)


def test_a_loss_over_decades_is_logarithmic_and_all_of_it_shown(draw):
    def course(step):
        return 1000 * 0.93**step + 8 * 0.995**step

    figure = draw(rows_of("train", loss=course, mae=course))
    ax = panel(figure, "loss")
    low, high = ax.get_ylim()
    assert ax.get_yscale() == "log" and 0 < low < 0.1 and high > 1008 and not notes(ax)
    assert panel(figure, "MAE, years").get_yscale() == "linear"
    # One spike is no reason for it.
    figure = draw(rows_of("train", loss=lambda s: 300.0 if s == 500 else 5 + s % 30 / 10))
    assert panel(figure, "loss").get_yscale() == "linear"
    # A loss that is below zero (SimSiam's) has no logarithm.
    figure = draw(rows_of("train", loss=lambda s: 8 * 0.99**s - 1))
    assert panel(figure, "loss").get_yscale() == "linear"


@pytest.mark.parametrize("count", range(1, 10))
def test_panels_leave_no_place_empty(draw, count):
    courses = {f"m{i}": (lambda step, i=i: step + i) for i in range(count)}
    figure = draw(rows_of("train", **courses), most_panels=9, title="a title")
    assert len(figure.axes) == count
    lines, columns = figure.axes[0].get_subplotspec().get_gridspec().get_geometry()
    taken = np.zeros((lines, columns), int)
    for ax in figure.axes:
        place = ax.get_subplotspec()
        taken[
            place.rowspan.start : place.rowspan.stop, place.colspan.start : place.colspan.stop
        ] += 1
    assert np.all(taken == 1) and columns <= 2


def test_what_was_measured_once_is_a_line_and_no_panel(draw):
    once = {"step": 1000, "split": "validation", "knn_mae": 10.894, "rank_me": 59.45}
    figure = draw([*rows_of("train", loss=float), once])
    assert [ax.get_ylabel() for ax in figure.axes] == ["loss"]
    words = figure.get_supxlabel()
    assert words == "Validation at step 1,000: kNN MAE 10.89 years, RankMe 59.45"
    # Where nothing was measured twice, points are better than an empty picture.
    figure = draw([once])
    assert [ax.get_ylabel() for ax in figure.axes] == ["kNN MAE, years", "RankMe"]
    assert all(ax.lines[0].get_marker() not in ("", "None") for ax in figure.axes)


def test_curves_take_the_later_of_repeated_steps_and_skip_what_is_no_number(draw):
    rows = [
        {"step": 2, "split": "train", "loss": 3.0, "note": "x"},
        {"step": 1, "split": "train", "loss": 4.0, "images_per_second": 9.0},
        {"step": 2, "split": "train", "loss": 2.0, "done": True, "mae": float("nan")},
        {"step": 3, "split": "train", "loss": float("inf")},
    ]
    (ax,) = draw(rows).axes
    assert ax.get_ylabel() == "loss"
    assert ax.lines[0].get_xydata().tolist() == [[1, 4], [2, 2]]


def test_curves_without_a_number_are_told_in_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no numbers to draw in .*metrics.jsonl"):
        training_plots.training_curves(tmp_path / "a.png", tmp_path / "metrics.jsonl")


def test_splits_differ_by_more_than_colour_and_the_legend_names_them(draw):
    rows = rows_of("train", mae=float) + rows_of("validation", mae=float)
    figure = draw(rows, title="Fine-tuning")
    legend = figure.legends[0]
    assert legend.get_title().get_text() == "Fine-tuning"
    assert [text.get_text() for text in legend.get_texts()] == [
        "training, mean of 3 (pale: each value)",
        "validation",
    ]
    looks = {(line.get_linestyle(), line.get_marker()) for line in legend.get_lines()}
    assert len(looks) == 2


def test_title_says_stage_model_pixels_and_folder(tmp_path, monkeypatch):
    run = tmp_path / "v"
    run.mkdir()
    assert training_plots.run_title(run) == "Run v"
    config = {"stage": "finetune", "model": {"name": "coatnet_0", "image_size": 128}}
    (run / "config.json").write_text(json.dumps(config))
    title = "Fine-tuning of coatnet_0 at 128 px (run v)"
    assert training_plots.run_title(run) == title
    monkeypatch.chdir(run)
    assert training_plots.run_title(".") == title
    # The report's pictures have it too.
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2}))
    given = []
    monkeypatch.setattr(training_plots, "training_curves", lambda *_, title: given.append(title))
    report.curve_blocks(run, tmp_path / "figures", "Fine-tuning")
    assert given == [title]

"""Measures against scikit-learn and plain loops; files; one-line errors."""

import csv
import errno
import json
import os
import re
import shutil
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from safetensors.numpy import save_file
from sklearn import metrics as oracle

from coatnet_jax import conformal, evaluate, evaluation_page, leaks, training_set
from coatnet_jax.ages import CLASS_NAMES


def one_hot(ages, sharp=1.0):
    """Posteriors with the share `sharp` at the given ages and the rest spread over all ages."""
    p = np.full((len(ages), 117), (1 - sharp) / 117, np.float32)
    p[np.arange(len(ages)), ages] += sharp
    return p


def by_hand(age):
    return 0 if age < 18 else 1 if age <= 40 else 2 if age <= 60 else 3


AGE = np.array([5, 17, 18, 30, 40, 40, 41, 55, 60, 61, 80, 25])
GUESS = np.array([7, 18, 17, 30, 41, 39, 41, 39, 61, 61, 70, 25])


@pytest.fixture(scope="module")
def many():
    rng = np.random.default_rng(0)
    age = rng.integers(0, 117, 500)
    return age, np.clip(age + rng.normal(0, 9, 500), 0, 116).round().astype(int)


def test_confusion_and_errors_are_those_counted_by_hand():
    result = evaluate.score(one_hot(GUESS), AGE, train_age=AGE)
    assert result["confusion"] == [[1, 1, 0, 0], [1, 3, 1, 0], [0, 1, 1, 1], [0, 0, 0, 2]]
    errors = np.array([2, 1, 1, 0, 1, 1, 0, 16, 1, 0, 10, 0])
    assert result["mae"] == pytest.approx(errors.mean(), abs=1e-3)
    assert result["cs5"] == pytest.approx(10 / 12)
    assert result["accuracy"] == pytest.approx(7 / 12)


def test_further_measures_are_those_of_a_loop(many):
    age, guess = many
    result = evaluate.score(one_hot(guess), age, train_age=age)
    errors = [int(g) - int(a) for a, g in zip(age, guess, strict=True)]
    assert result["bias"] == pytest.approx(sum(errors) / 500, abs=1e-3)
    middle, half = np.mean(errors), 1.96 * np.std(errors) / np.sqrt(500)
    assert result["bias_interval"] == pytest.approx([middle - half, middle + half], abs=0.1)
    assert result["median_error"] == pytest.approx(np.median(np.abs(errors)), abs=1e-3)
    assert result["p90_error"] == pytest.approx(np.quantile(np.abs(errors), 0.9), abs=1e-3)
    # one-hot posteriors are read at most 0.5 years off, at 0 and 116
    for years, found in enumerate(result["cs"], 1):
        assert found == pytest.approx(sum(abs(e) <= years for e in errors) / 500, abs=0.01)
    assert result["cs"][4] == result["cs5"] and len(result["cs"]) == 10


def test_classes_match_scikit_learn(many):
    age, guess = many
    result = evaluate.score(one_hot(guess), age, train_age=age)
    true, predicted = [by_hand(a) for a in age], [by_hand(a) for a in guess]
    expected = oracle.precision_recall_fscore_support(true, predicted)
    found = [
        [row[k] for row in result["classes"]] for k in ("precision", "recall", "f1", "support")
    ]
    np.testing.assert_allclose(found, expected)
    assert result["balanced_accuracy"] == pytest.approx(
        oracle.balanced_accuracy_score(true, predicted)
    )
    assert result["confusion"] == oracle.confusion_matrix(true, predicted).tolist()
    for k, row in enumerate(result["classes"]):
        errors = [abs(int(a) - int(g)) for a, g in zip(age, guess, strict=True) if by_hand(a) == k]
        assert row["mae"] == pytest.approx(np.mean(errors), abs=0.01)


def test_bands_match_a_loop(many):
    age, guess = many
    for band in evaluate.band_table(age, guess):
        first, last = map(int, band["band"].split("–"))
        pairs = [(a, g) for a, g in zip(age, guess, strict=True) if first <= a <= last]
        assert band["support"] == len(pairs)
        assert band["mae"] == pytest.approx(np.mean([abs(int(g) - int(a)) for a, g in pairs]))
        assert band["bias"] == pytest.approx(np.mean([int(g) - int(a) for a, g in pairs]))
    assert sum(band["support"] for band in evaluate.band_table(age, guess)) == len(age)


def test_baseline_takes_median_and_majority_from_the_training_split():
    base = evaluate.baseline(AGE, np.array([20, 22, 30, 65, 70]))
    assert (base["median_age"], base["majority_class"]) == (30, "18-40")
    assert base["mae"] == pytest.approx(np.mean([abs(int(a) - 30) for a in AGE]))
    within = [np.mean([abs(int(a) - 30) <= years for a in AGE]) for years in range(1, 11)]
    assert base["cs"] == pytest.approx(within) and base["cs5"] == pytest.approx(2 / 12)
    assert base["accuracy"] == pytest.approx(5 / 12)
    assert base["balanced_accuracy"] == pytest.approx(0.25)
    assert evaluate.baseline(AGE, np.array([70, 70, 5]))["majority_class"] == ">60"


def test_class_follows_the_median_and_class_sums_stand_beside():
    # 40 % on 17, 60 % spread over 18-60 in two classes: the median lies in 18-40, no sum is larger
    p = np.zeros((1, 117), np.float32)
    p[0, 17], p[0, 20], p[0, 50] = 0.4, 0.3, 0.3
    result = evaluate.score(p, np.array([20]), train_age=AGE)
    assert result["accuracy"] == 1.0
    assert result["accuracy_of_class_sums"] == 0.0
    row = evaluate.prediction_rows(p, np.array([20]), np.array(["a.jpg"]))[0]
    assert (row["predicted_class"], float(row["p_<18"])) == ("18-40", 0.4)


def test_confidence_is_that_of_the_class_answered():
    p = np.zeros((1, 117))
    p[0, [10, 30]] = 0.6, 0.4
    result = evaluate.score(p, np.array([30]), train_age=AGE)
    assert (result["accuracy"], result["calibration"]["mean_confidence"]) == (0, pytest.approx(0.6))


def test_measures_of_a_face_are_those_of_a_loop():
    guess = np.where(AGE == 25, 30, GUESS)  # one that is wrong by 5 years
    low, high = guess - 1.0, guess + 2.0
    found = evaluate.face_measures(one_hot(guess), AGE, low, high, decode="argmax")
    for i, (a, g) in enumerate(zip(AGE.tolist(), guess.tolist(), strict=True)):
        assert {key: values[i] for key, values in found.items()} == {
            "mae": abs(g - a),
            "bias": g - a,
            "cs5": abs(g - a) in range(6),
            "accuracy": by_hand(a) == by_hand(g),
            "covered": a in range(g - 1, g + 3),
            "width": 3,
        }
    assert {-1, 2, 5} < set(guess - AGE)  # at the ends of what is counted


@pytest.mark.parametrize(("decode", "age", "mae"), [("mean", "25.00", 5), ("argmax", "17.00", 13)])
def test_other_decoders_change_the_answer_and_are_named(tmp_path, decode, age, mae):
    p = np.zeros((1, 117))
    p[0, [17, 29, 33]] = 0.5, 0.25, 0.25  # mean 24
    p[0, [17, 33]] += -0.0625, 0.0625  # 0.4375, 0.25, 0.3125: mean 25
    result = evaluate.score(p, np.array([30]), train_age=AGE, decode=decode)
    assert (result["decode"], result["mae"]) == (decode, pytest.approx(mae))
    evaluate.write_results(tmp_path, result, p, np.array([30]), np.array(["a.jpg"]))
    (row,) = csv.DictReader((tmp_path / "predictions.csv").open())
    assert row["predicted"] == age
    assert evaluate.DECODED[decode] in (tmp_path / "report.md").read_text()


def test_empty_classes_give_none_and_a_dash(tmp_path):
    age, guess = np.array([20, 25, 30]), np.array([20, 45, 30])
    result = evaluate.score(one_hot(guess), age, train_age=age)
    young, _, middle, _ = result["classes"]
    assert young == {
        "class": "<18",
        "support": 0,
        **dict.fromkeys(("precision", "recall", "f1", "mae")),
    }
    assert (middle["precision"], middle["recall"]) == (0.0, None)
    assert result["balanced_accuracy"] == pytest.approx(2 / 3)
    evaluate.write_results(tmp_path, result, one_hot(guess), age, np.array(["a", "b", "c"]))
    line = next(
        x for x in (tmp_path / "report.md").read_text().splitlines() if x.startswith("| <18")
    )
    assert [c.strip() for c in line.strip("|").split("|")] == ["<18", "0", "–", "–", "–", "–"]


def test_attribute_accuracy_leaves_unknown_labels_out():
    p = {"gender": np.eye(2)[[1, 1, 1, 0]], "race": np.eye(5)[[0, 0, 0, 0]]}
    labels = {"gender": np.array([0, 0, 1, -1]), "race": np.full(4, -1)}
    train = {"gender": np.array([0, 0, 1, -1, -1, -1]), "race": np.full(6, -1)}
    (gender,) = evaluate.attribute_table(p, labels, train)
    assert (gender["support"], gender["accuracy"]) == (3, pytest.approx(1 / 3))
    assert gender["constant"] == pytest.approx(2 / 3)
    assert gender["macro_f1"] == pytest.approx((0 + 2 / 4) / 2)
    labels["gender"] = np.full(4, -1)
    assert evaluate.attribute_table(p, labels, train) == []


@pytest.mark.parametrize(
    ("p", "age", "message"),
    [
        (np.zeros((0, 117)), np.zeros(0, int), "no faces"),
        (one_hot(GUESS), AGE[:3], "12 predictions for 3 faces"),
        (one_hot(GUESS) * np.nan, AGE, "NaN"),
    ],
)
def test_wrong_input_is_told_in_one_line(p, age, message):
    with pytest.raises(ValueError, match=message) as error:
        evaluate.score(p, age, train_age=AGE)
    assert "\n" not in str(error.value)


class FakeFaces(SimpleNamespace):
    """A split whose pictures are one grey JPEG, with labels and hashes of their own."""

    folder = "data"

    def __len__(self):
        return len(self.labels["age"])

    def read_images(self, rows):
        return [cv2.imencode(".jpg", np.full((16, 16, 3), 99, np.uint8))[1].tobytes() for _ in rows]


def fake_faces(age, split):
    labels = {
        "age": age,
        "gender": age % 2,
        "race": age % 5,
        "file": np.array([f"{a}_{i}.jpg" for i, a in enumerate(age)]),
        "identity": np.full(len(age), ""),
        "pixel_hash": np.array([f"{split}{i}" for i in range(len(age))]),
    }
    return FakeFaces(labels=labels, split=split, fingerprint="print")


def fake_run(stage="finetune", **methods):
    data, loss = {"splits": "default"}, {"name": "kl_l1"}
    config = ConfigDict({"stage": stage, "model": {}, "data": data, "loss": loss})
    methods = {"attribute_heads": (), "decode": "median", "sides": (1.0,), **methods}
    return SimpleNamespace(
        config=config, stage=stage, step=7, source_size=8, batch_size=64, **methods
    )


@pytest.fixture
def joined(monkeypatch, many, tmp_path):
    """`evaluate.run` over fakes: splits of which the run knows a noisy age."""
    age, guess = many
    seen = {}
    faces = {
        "test": fake_faces(age, "test"),
        "validation": fake_faces(age[::-1], "validation"),
        "train": fake_faces(np.arange(50), "train"),
    }
    guesses = {"test": guess, "validation": guess[::-1]}
    (tmp_path / "run").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data/labels.csv").touch()
    model = fake_run(
        probabilities=lambda images, flip: seen.update(flip=flip) or images,
        run_dir=tmp_path / "run",
    )
    (tmp_path / "run/config.json").write_text(model.config.to_json())

    def predict_split(run, faces, fn, **_):
        index = np.arange(len(faces))[::-1]  # rows need not come in the table's order
        images = (
            one_hot(guesses[faces.split][index])
            if fn != model.__dict__.get("attributes")
            else index
        )
        return fn(images), {k: faces.labels[k][index] for k in ("age", "gender", "race")} | {
            "index": index
        }

    def open_split(folder, split, splits):
        seen["splits"] = splits
        return faces[split]

    monkeypatch.setattr(evaluate, "load_run", lambda *_, **__: model)
    for module in (evaluate, leaks, training_set):
        monkeypatch.setattr(module, "open_split", open_split)
    monkeypatch.setattr(evaluate, "predict_split", predict_split)
    return SimpleNamespace(
        model=model, faces=faces, seen=seen, age=age, guess=guess,
        run=tmp_path / "run", data=tmp_path / "data",
    )  # fmt: skip


def plain_interval(values, person, draws=1000):
    """The 95 % interval of the mean where persons are drawn with all of their photos, in a loop."""
    rng, names, means = np.random.default_rng(0), list(dict.fromkeys(person)), []
    for _ in range(draws):
        drawn = rng.integers(0, len(names), len(names))
        means.append(np.mean(np.concatenate([values[person == names[i]] for i in drawn])))
    return np.quantile(means, [0.025, 0.975])


def test_run_writes_all_files_with_a_row_for_each_image(joined, tmp_path, capsys):
    joined.model.attribute_heads = ("gender", "race")
    joined.model.attributes = lambda index: np.eye(7)[joined.age[index] % 2]
    result = evaluate.run(joined.run, joined.data, flip=False)
    folder = tmp_path / "run" / "evaluate" / "test"
    assert joined.seen == {"flip": False, "splits": "default"}
    assert json.loads((folder / "metrics.json").read_text()) == result
    assert result["attributes"][0]["accuracy"] == 1.0
    assert [row["attribute"] for row in result["attributes"]] == ["gender", "race"]
    with (folder / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(joined.age)
    for row in rows:  # labels, file and prediction of a row belong to the same face
        i = int(row["file"].split("_")[1].removesuffix(".jpg"))
        assert int(row["age"]) == joined.age[i]
        assert float(row["predicted"]) == pytest.approx(joined.guess[i], abs=0.5)
        assert row["predicted_class"] == CLASS_NAMES[by_hand(joined.guess[i])]
        assert sum(float(row[f"p_{name}"]) for name in CLASS_NAMES) == pytest.approx(1, abs=1e-3)
        assert row["pixel_hash"] == f"test{i}" and int(row["gender"]) == joined.age[i] % 2
        assert float(row["low"]) <= float(row["predicted"]) <= float(row["high"])
    pictures = "confusion scatter bands cs calibration groups groups_age worst".split()
    for name in (f"{name}.png" for name in pictures):
        with Image.open(folder / name) as image:
            assert min(image.size) > 300
    assert 'src="data:image/png' in (folder / "report.html").read_text()
    assert "| gender" in (folder / "report.md").read_text()
    assert f"MAE {result['mae']:.2f}" in capsys.readouterr().out


def test_one_head_is_judged_where_the_other_was_not_trained(joined):
    joined.model.attribute_heads = ("race",)
    joined.model.attributes = lambda index: np.eye(7)[2 + joined.age[index] % 5]
    (row,) = evaluate.run(joined.run, joined.data)["attributes"]
    assert (row["attribute"], row["accuracy"]) == ("race", 1.0)


def test_intervals_are_set_on_validation_and_judged_on_test(joined, monkeypatch):
    monkeypatch.setattr(evaluate, "write_results", lambda *_, **__: None)
    result = evaluate.run(joined.run, joined.data)
    found = json.loads((joined.run / "conformal.json").read_text())
    assert (found["faces"], found["split"], found["step"]) == (500, "validation", 7)
    # the fakes are equal in both splits, and so sure of themselves that the interval is a point
    errors = np.sort(np.abs(joined.guess - joined.age))
    assert found["years"] == pytest.approx(errors[451 - 1], abs=0.5)
    assert 0.9 <= result["conformal"]["covered"] < 0.95
    assert result["conformal"]["raw_covered"] < 0.2
    # 90 % of a year, of which half lies outside the ages at 0 and 116
    width = np.where(np.isin(joined.guess, (0, 116)), 0.45, 0.9)
    assert result["conformal"]["raw_width"] == pytest.approx(width.mean())
    assert result["conformal"]["calibrated_on_these"] == 0


@pytest.mark.parametrize("options", [{"which": "latest"}, {"flip": False}, {"sides": (1.0,)}])
def test_constants_are_kept_only_of_what_predict_does(joined, monkeypatch, options):
    monkeypatch.setattr(evaluate, "write_results", lambda *_, **__: None)
    result = evaluate.run(joined.run, joined.data, show_faces=False, **options)
    assert result["conformal"]["constants"]["years"] > 0
    assert not (joined.run / "conformal.json").exists()


@pytest.mark.parametrize("why", [errno.EACCES, errno.EROFS])
def test_a_run_that_cannot_be_written_to_is_evaluated_elsewhere(
    why, joined, monkeypatch, tmp_path, capsys
):
    def refused(*_, **__):
        raise OSError(why, os.strerror(why), str(joined.run / "conformal.json"))

    monkeypatch.setattr(evaluate, "save_constants", refused)
    result = evaluate.run(joined.run, joined.data, out=tmp_path / "out", show_faces=False)
    assert result["conformal"]["constants"]["years"] > 0
    assert f"{joined.run} cannot be written to: predict will not have" in capsys.readouterr().out


def test_evaluation_writes_the_constants_of_the_package_only_where_it_has_none(
    joined, monkeypatch, tmp_path
):
    monkeypatch.setattr(evaluate, "PACKAGED", joined.run)
    monkeypatch.chdir(tmp_path)
    path = joined.run / "conformal.json"
    evaluate.run(joined.run, joined.data, show_faces=False)  # as `release` does
    assert conformal.read_constants(joined.run, step=7)
    path.write_text(path.read_text() + " ")
    evaluate.run(joined.run, joined.data, show_faces=False)
    assert path.read_text().endswith("\n ")


@pytest.mark.parametrize(
    ("packaged", "reports"), [("PACKAGED", "evaluation"), ("SMALL", "evaluation_small")]
)
def test_packaged_models_are_judged_where_their_training_faces_are_not(
    packaged, reports, joined, monkeypatch, tmp_path
):
    released = tmp_path / "released"
    shutil.copytree(joined.run, released)
    joined.model.run_dir = released
    (released / "run.json").write_text(json.dumps({"data_fingerprint": "f", "before": []}))
    counts = {"age": np.arange(117), "gender": np.array([0, 40, 60]), "race": np.zeros(6, int)}
    save_file({"hashes": np.zeros(2, np.uint64), **counts}, released / training_set.FILE)
    years = {"level": 0.9, "years": 2.5, "step": 7, "faces": 80, "split": "validation"}
    conformal.save_constants(released, years)
    for faces in joined.faces.values():
        faces.labels["pixel_hash"] = np.array([f"{i + 1:016x}" for i in range(len(faces))])
    monkeypatch.setattr(evaluate, packaged, released)
    monkeypatch.chdir(tmp_path)
    before = {path.name: path.read_bytes() for path in released.iterdir()}
    options = {"training_folder": tmp_path / "gone", "split": "validation"}
    result = evaluate.run("released", joined.data, **options)  # by any path that leads there
    assert result["trained_on"]["faces"] == counts["age"].sum()
    assert result["conformal"]["constants"]["years"] == 2.5
    assert (tmp_path / reports / "data-validation/report.html").is_file()
    assert {path.name: path.read_bytes() for path in released.iterdir()} == before
    # Constants of other views are not those of the package: the posterior's own intervals.
    assert (
        evaluate.run(released, joined.data, flip=False, **options)["conformal"]["constants"] is None
    )


def test_without_faces_no_picture_of_them_is_left(joined):
    evaluate.run(joined.run, joined.data)
    folder = joined.run / "evaluate" / "test"
    assert "do not publish it" in (folder / "report.html").read_text()
    evaluate.run(joined.run, joined.data, show_faces=False)
    assert not (folder / "worst.png").exists()
    assert "do not publish it" not in (folder / "report.html").read_text()


def test_faces_that_were_trained_on_are_refused(joined):
    for key in ("pixel_hash", "file"):
        joined.faces["test"].labels[key][[3, 7]] = joined.faces["train"].labels[key][0]
    with pytest.raises(ValueError, match="2 of the 500 faces .* were in the training split") as e:
        evaluate.run(joined.run, joined.data)
    assert "\n" not in str(e.value)
    assert not (joined.run / "evaluate").exists()


def test_copies_that_a_published_table_tears_apart_are_counted_and_left_out_once(joined, capsys):
    faces = joined.faces["test"]
    faces.labels["file"] = np.array([f"test_{i}.jpg" for i in range(len(faces))])
    faces.labels["pixel_hash"][[3, 7]] = "train0"
    faces.labels["identity"] = person = np.array([f"p{i // 5}" for i in range(500)])
    result = evaluate.run(joined.run, joined.data)
    assert (result["images"], result["leak_check"]["identical"]) == (500, 2)
    rest = np.delete(np.abs(joined.guess - joined.age), [3, 7])
    found = result["without_copies"]
    assert (found["images"], found["mae"]) == (498, pytest.approx(rest.mean(), abs=0.01))
    assert found["cs5"] == pytest.approx(np.mean(rest <= 5), abs=0.01)
    alone = np.delete(person, [3, 7])[::-1]
    expected = plain_interval(rest[::-1], alone)
    assert found["mae_interval"] == pytest.approx(expected, abs=0.02)
    told = f"2 of these faces are pixel-identical copies .* 498: MAE {found['mae']:.2f} years"
    page = (joined.run / "evaluate" / "test" / "report.md").read_text()
    assert re.search(told, page) and re.search(told, capsys.readouterr().out)
    assert "none of the faces evaluated" not in page


def test_intervals_are_over_persons_where_they_are_known(joined):
    over_faces = evaluate.run(joined.run, joined.data)
    folder = joined.run / "evaluate" / "test"
    table, page = (folder / "predictions.csv").read_text(), (folder / "report.md").read_text()
    assert "identity" not in table.splitlines()[0] and "persons" not in over_faces
    assert "intervals are over faces" in page and "persons" not in page
    person = np.array([f"{i % 60:016x}" for i in range(500)])
    person[::50] = ""  # ten faces of unknown persons
    joined.faces["test"].labels["identity"] = person
    result = evaluate.run(joined.run, joined.data)
    with (folder / "predictions.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    named = {row["file"]: row["identity"] for row in rows}
    assert [named[file] for file in joined.faces["test"].labels["file"]] == person.tolist()
    alone = [row["identity"] or row["file"] for row in rows]
    assert result["persons"] == len(set(alone)) == 70
    alone, width = np.array(alone), np.array([float(r["high"]) - float(r["low"]) for r in rows])
    age, guess = joined.age[::-1], joined.guess[::-1]  # the order in which the fake predicts
    inside = np.array([float(r["low"]) <= int(r["age"]) <= float(r["high"]) for r in rows])
    found = result["conformal"]
    assert found["covered_interval"] == pytest.approx(plain_interval(inside, alone))
    assert found["width_interval"] == pytest.approx(plain_interval(width, alone), abs=0.01)
    error = np.abs(guess - age)
    for key, values in (("mae", error), ("cs5", error <= 5)):
        expected = plain_interval(values, alone)
        assert result[f"{key}_interval"] == pytest.approx(expected, abs=0.02)
    for key in ("mae", "balanced_accuracy", "bias", "accuracy"):  # no other number changes
        assert result[key] == over_faces[key]
        assert result[f"{key}_interval"] != over_faces[f"{key}_interval"]
    for kind in ("calibration", "groups"):
        assert result[kind] != over_faces[kind]
    page = (folder / "report.md").read_text()
    assert "intervals are over 70 persons" in page and "fewer than 20 persons" in page


def test_photos_of_one_person_alone_have_intervals_over_faces(joined):
    over_faces = evaluate.run(joined.run, joined.data)
    joined.faces["test"].labels["identity"] = np.full(500, "ab12")
    result = evaluate.run(joined.run, joined.data)
    assert result == over_faces
    table = (joined.run / "evaluate/test/predictions.csv").read_text().splitlines()
    assert table[0].endswith(",identity") and table[1].endswith(",ab12")


def test_page_tells_what_earlier_stages_saw(joined, monkeypatch, tmp_path):
    told = {"stage": "pretrain", "splits": "fold0"}
    for before, words in (
        ([], ""),
        ([told | {"seen": 0}], ""),
        ([told | {"seen": 3}], "`fold0`, saw 3 of these pictures without their ages."),
        ([told | {"seen": None}], "saw any of them is not known."),
        (None, "saw any of them is not known."),
    ):
        monkeypatch.setattr(training_set, "check_stages_before", lambda *_, b=before, **__: b)
        result = evaluate.run(joined.run, joined.data)
        assert result["leak_check"]["before"] == before
        page = (tmp_path / "run/evaluate/test/report.md").read_text()
        assert f"(compared by pixels).{words and ' '}" in page and words in page
        assert page.count("saw") == bool(words)


def test_another_set_is_named_with_what_the_run_was_trained_on(joined, tmp_path):
    result = evaluate.run(joined.run, tmp_path / "wild", training_folder=joined.data)
    assert result["trained_on"] == {
        "data_name": "data", "splits": "default", "fingerprint": "print", "faces": 50,
        "same_data": False,
    }  # fmt: skip
    page = (joined.run / "evaluate" / "wild-test" / "report.md").read_text()
    assert "test on another data set" in page and "no promise here" in page


def test_report_without_gender_and_race_shows_no_table_and_no_picture_of_them(joined, tmp_path):
    evaluate.run(joined.run, joined.data)
    assert (tmp_path / "run/evaluate/test/groups.png").is_file()  # while they are known
    joined.model.attribute_heads = ("gender", "race")
    joined.model.attributes = None  # would raise
    for faces in joined.faces.values():
        faces.labels.update(gender=np.full(len(faces), -1), race=np.full(len(faces), -1))
    result = evaluate.run(joined.run, joined.data)
    assert "attributes" not in result
    page = (tmp_path / "run" / "evaluate" / "test" / "report.md").read_text()
    assert "| gender" not in page and "auxiliary heads" not in page
    assert "groups.png" not in page and not (tmp_path / "run/evaluate/test/groups.png").exists()
    assert {row["by"] for row in result["groups"]} == {"age"}


@pytest.mark.parametrize(
    ("sides", "flip", "words"),
    [
        ([1.0], True, ", averaged over the picture and its mirror image"),
        ([1.0], False, ""),
        (
            [1.0, 0.9],
            True,
            ", averaged over the picture and its mirror image, of each the centres with 100 % and "
            "90 % of its side",
        ),
        (
            [0.9],
            True,
            ", averaged over the picture and its mirror image, of each the centre with 90 % of its "
            "side",
        ),
        ([0.9], False, ", of each picture the centre with 90 % of its side"),
        ([1.0, 0.9], False, ", of each picture the centres with 100 % and 90 % of its side"),
    ],
)
def test_page_says_which_views_were_seen(sides, flip, words):
    base = {"median_age": 27.5, "majority_class": "18-40"}
    result = {"run": "a", "step": 7, "sides": sides, "flip": flip, "baseline": base}
    text = evaluation_page.circumstances(result)
    assert text.startswith(f"Run `a` at step 7{words}. The constant answer is 27.5 years and ")


def test_page_calls_the_run_as_it_is_told_to(joined, tmp_path):
    result = evaluate.run(joined.run, joined.data, called="my_model")
    page = (tmp_path / "run/evaluate/test/report.md").read_text()
    assert result["run"] == "my_model" and "Run `my_model` at step 7" in page


def test_pretraining_run_and_a_split_too_small_are_refused(joined, tmp_path, monkeypatch):
    joined.faces["test"] = fake_faces(np.zeros(0, int), "test")
    with pytest.raises(ValueError, match="holds no face"):
        evaluate.run(joined.run, joined.data)
    joined.faces["test"] = fake_faces(np.array([30]), "test")
    with pytest.raises(ValueError, match="holds 1 face.*takes two or more"):
        evaluate.run(joined.run, joined.data)
    monkeypatch.setattr(evaluate, "load_run", lambda *_, **__: fake_run("pretrain"))
    with pytest.raises(ValueError, match="pretrain run without an age head"):
        evaluate.run(joined.run, joined.data)

"""Several runs: paired differences on common faces, seeds joined, settings that differ, files."""

import csv
import json
import re

import numpy as np
import pytest

from coatnet_jax import compare
from coatnet_jax.pages import write_csv
from coatnet_jax.weight_files import write_weights


def write_run(
    path, predicted, *, seed=0, lr=1e-3, age=None, files=None, identities=None, data="utkface",
    **config,
):  # fmt: skip
    """What compare reads of an evaluated run; face i has the age 20 + i unless told."""
    n = len(predicted)
    age = np.arange(20, 20 + n) if age is None else age
    files = [f"{i}.jpg" for i in range(n)] if files is None else files
    folder = path / "evaluate" / "test"
    folder.mkdir(parents=True)
    config = {"seed": seed, "optim": {"lr": lr}, "data": {"name": data, "workers": seed}, **config}
    (path / "config.json").write_text(json.dumps(config))
    metrics = {"data_name": data, "step": 9, "images": n, "conformal": {"covered": 0.9}}
    metrics |= dict.fromkeys(compare.MEASURES, 0.0)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    rows = [
        {"file": f, "age": a, "predicted": p, "pixel_hash": f"h{f}"}
        for f, a, p in zip(files, age, predicted, strict=True)
    ]
    if identities is not None:
        rows = [row | {"identity": i} for row, i in zip(rows, identities, strict=True)]
    write_csv(folder / "predictions.csv", rows)
    return path


@pytest.fixture
def runs(tmp_path):
    rng = np.random.default_rng(0)
    age, common = np.arange(20, 60), 8 * rng.normal(size=40)
    noise = [common + rng.normal(size=40) + shift for shift in (0, 0.5, 4)]
    return [
        write_run(tmp_path / "a", age + noise[0], seed=0),
        write_run(tmp_path / "b", age + noise[1], seed=1),
        write_run(tmp_path / "c", age + noise[2], seed=0, lr=1e-2),
    ]


def test_differences_are_paired_and_seeds_joined(runs, tmp_path, capsys):
    result = compare.run(runs, out=tmp_path / "out")
    errors = []
    for path in runs:
        with (path / "evaluate/test/predictions.csv").open() as lines:
            rows = list(csv.DictReader(lines))
        errors.append([abs(float(r["predicted"]) - int(r["age"])) for r in rows])
    for row, found in zip(result["runs"], errors, strict=True):
        assert row["mae"] == pytest.approx(np.mean(found))
    change = np.array(errors[2]) - errors[0]
    found = result["runs"][2]["mae_difference"]
    assert found["difference"] == pytest.approx(change.mean())
    half = 1.96 * change.std() / np.sqrt(40)
    assert found["interval"] == pytest.approx([change.mean() - half, change.mean() + half], abs=0.2)
    assert "mae_difference" not in result["runs"][0]
    (seeds,) = result["seeds"]  # c differs in more than its seed
    assert seeds["runs"] == ["a", "b"]
    maes = [np.mean(e) for e in errors[:2]]
    assert (seeds["mae"], seeds["mae_sd"]) == pytest.approx((np.mean(maes), np.std(maes, ddof=1)))
    settings = {row["setting"]: [row[name] for name in "abc"] for row in result["settings"]}
    assert settings == {"seed": [0, 1, 0], "optim.lr": [1e-3, 1e-3, 1e-2]}  # workers change nothing
    assert "| b " in capsys.readouterr().out


def test_all_files_are_written(runs, tmp_path):
    result = compare.run(runs, out=tmp_path / "out")
    assert json.loads((tmp_path / "out/comparison.json").read_text())["runs"] == result["runs"]
    with (tmp_path / "out/runs.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [row["run"] for row in rows] == ["a", "b", "c"]
    difference = result["runs"][1]["mae_difference"]
    assert float(rows[1]["mae_difference_low"]) == difference["interval"][0]
    for row, run in zip(rows, result["runs"], strict=True):
        for key in ("mae", "accuracy"):
            ends = [float(row[f"{key}_low"]), float(row[f"{key}_high"])]
            assert ends == run[f"{key}_interval"] and ends[0] < ends[1]
            if run is not result["runs"][0]:
                found = run[f"{key}_difference"]
                names = (f"{key}_difference{end}" for end in ("", "_low", "_high"))
                assert [float(row[n]) for n in names] == [found["difference"], *found["interval"]]
    page = (tmp_path / "out/report.html").read_text()
    assert 'src="data:image/png' in page and not re.search(r"https?://|href=|<script", page)
    assert "± " in (tmp_path / "out/report.md").read_text()


def test_words_name_the_run_with_the_smaller_error(tmp_path):
    age = np.arange(20, 60)
    right = write_run(tmp_path / "right", age + 1.0)
    wrong = write_run(tmp_path / "wrong", age + np.tile([2.0, 4.0], 20))  # 2 years worse on average
    for first, second, change in ((right, wrong, "larger"), (wrong, right, "smaller")):
        result = compare.compare(
            [compare.read_run(path, "test", name=path.name) for path in (first, second)]
        )
        told = rf"The MAE of `{second.name}` is \*\*2.00 years {change}\*\* than that of "
        told += rf"`{first.name}` \((\S+) to (\S+)\)\."
        low, high = map(float, re.fullmatch(told, compare.in_words(result)).groups())
        assert 1 < low < 2 < high < 3


def test_only_faces_that_all_runs_have_count(tmp_path):
    age = np.arange(20, 30)
    a = write_run(tmp_path / "a", age + 1.0)
    b = write_run(tmp_path / "b", age[:4] + 3.0, files=[f"{i}.jpg" for i in range(4)], age=age[:4])
    result = compare.run([a, b], out=tmp_path / "out")
    assert result["common_faces"] == 4 and result["left_out"] == {"a": 6, "b": 0}
    assert result["runs"][1]["mae_difference"]["difference"] == pytest.approx(2)
    assert "left out: 6 of a" in (tmp_path / "out/report.md").read_text()


def test_persons_are_drawn_where_an_evaluation_says_who_they_are(runs, tmp_path):
    over_faces = compare.run(runs[:2], out=tmp_path / "out")
    assert "persons" not in over_faces
    assert "intervals are over faces" in (tmp_path / "out/report.md").read_text()
    person = np.array([f"p{i // 5}" for i in range(40)])
    person[0] = ""  # unknown: a person of its own
    errors = []
    for name, path in zip("de", runs, strict=False):  # the first, of an older version, says nothing
        rows = list(csv.DictReader((path / "evaluate/test/predictions.csv").open()))
        predicted = np.array([float(row["predicted"]) for row in rows])
        told = person if name == "e" else None
        write_run(tmp_path / name, predicted, seed="de".index(name), identities=told)
        errors.append(np.abs(predicted - np.arange(20, 60)))
    result = compare.run([tmp_path / "d", tmp_path / "e"], out=tmp_path / "out")
    assert result["persons"] == 9
    order = np.argsort([f"{i}.jpg" for i in range(40)])  # in which compare holds the faces
    alone = np.where(person == "", "alone", person)[order]
    rng, means, names = np.random.default_rng(0), [], list(dict.fromkeys(alone))
    for _ in range(1000):
        rows = [np.flatnonzero(alone == names[i]) for i in rng.integers(0, 9, 9)]
        drawn = order[np.concatenate(rows)]
        means.append([errors[0][drawn].mean(), (errors[1] - errors[0])[drawn].mean()])
    first, change = np.quantile(means, [0.025, 0.975], axis=0).T
    assert result["runs"][0]["mae_interval"] == pytest.approx(first)
    found = result["runs"][1]["mae_difference"]
    assert found["interval"] == pytest.approx(change)
    before = over_faces["runs"][1]["mae_difference"]
    assert found["difference"] == pytest.approx(before["difference"])
    assert found["interval"] != before["interval"]
    assert "intervals are over 9 persons" in (tmp_path / "out/report.md").read_text()


def test_older_configs_are_those_of_the_values_then(tmp_path):
    age = np.arange(20, 60)
    old = write_run(tmp_path / "old", age + 1.0, seed=0)
    model = {"mean": compare.OLDER["model.mean"], "std": compare.OLDER["model.std"]}
    later = {"init_head": False, "progressive": [], "loss": {"decode": "median", "balanced": False}}
    new = write_run(tmp_path / "new", age + 2.0, seed=1, model=model, **later)
    result = compare.run([old, new], out=tmp_path / "out")
    assert [row["setting"] for row in result["settings"]] == ["seed"]
    assert len(result["seeds"]) == 1


def test_evaluations_made_in_other_ways_are_told(runs, tmp_path):
    for path, flip in zip(runs, (True, True, False), strict=True):
        told = path / "evaluate/test/metrics.json"
        told.write_text(json.dumps(json.loads(told.read_text()) | {"flip": flip, "sides": [1.0]}))
    settings = compare.run(runs, out=tmp_path / "out")["settings"]
    assert [row["setting"] for row in settings] == ["seed", "optim.lr", "evaluate.flip"]
    assert [settings[-1][name] for name in "abc"] == [True, True, False]


def test_what_cannot_be_compared_is_told_in_one_line(runs, tmp_path):
    age = np.arange(20, 60)
    bare = tmp_path / "bare"
    bare.mkdir()
    old = write_run(tmp_path / "old", age)
    write_csv(old / "evaluate/test/predictions.csv", [{"file": "a", "age": 1, "predicted": 1}])
    cut, torn = write_run(tmp_path / "cut", age), write_run(tmp_path / "torn", age)
    table = cut / "evaluate/test/predictions.csv"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:9]))
    (torn / "config.json").write_text("{")
    half = write_run(tmp_path / "half", age)
    (half / "evaluate/test/metrics.json").write_text('{"step": 9, ')
    cases = [
        ([runs[0]], "at least two runs"),
        ([runs[0], runs[0]], "each once"),
        ([runs[0], bare], "no evaluation .*bare/evaluate/test: make it with coatnet-jax evaluate"),
        ([runs[0], tmp_path / "gone"], "no such run"),
        ([runs[0], old], "older version: run coatnet-jax evaluate .*old again"),
        ([runs[0], write_run(tmp_path / "w", age, data="wild")], "no common faces .*w on wild"),
        ([runs[0], write_run(tmp_path / "one", age[:1])], "one face in common"),
        ([runs[0], cut], "damaged .faces are missing.: run coatnet-jax evaluate .*cut again"),
        ([runs[0], torn], "torn/config.json is damaged"),
        ([runs[0], half], "half/evaluate/test/metrics.json is damaged"),
        ([runs[0], write_run(tmp_path / "x", age, age=age + 1)], "x was evaluated with other ages"),
    ]
    for paths, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            compare.run(paths, out=tmp_path / "out")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_missing_evaluation_is_made_first(runs, tmp_path, capsys):
    (runs[1] / "evaluate").rename(tmp_path / "kept")
    made = []

    def evaluate(path):
        made.append(path)
        (tmp_path / "kept").rename(path / "evaluate")

    compare.run(runs, out=tmp_path / "out", evaluate=evaluate)
    assert made == [runs[1]] and "evaluating it" in capsys.readouterr().out


def test_evaluation_of_an_older_checkpoint_is_made_again(runs, tmp_path, monkeypatch, capsys):
    (runs[1] / "checkpoints").mkdir()
    monkeypatch.setattr(compare, "best_step", lambda path: 12)
    with pytest.raises(ValueError, match="the best step is 12 now, of step 9 is .*b/evaluate/test"):
        compare.run(runs, out=tmp_path / "out")
    made = []
    compare.run(runs, out=tmp_path / "out", evaluate=made.append)
    assert made == [runs[1]] and "evaluating it" in capsys.readouterr().out
    monkeypatch.setattr(compare, "best_step", lambda path: 9)
    compare.run(runs, out=tmp_path / "out", evaluate=made.append)
    assert made == [runs[1]]


def test_evaluation_of_a_release_that_another_replaced_is_made_again(runs, tmp_path):
    write_weights(runs[1] / "weights.safetensors", {"x": np.zeros(1)}, metadata={"step": "12"})
    (runs[1] / "run.json").write_text(json.dumps({"step": 12}))
    with pytest.raises(ValueError, match="the best step is 12 now, of step 9 is .*b/evaluate/test"):
        compare.run(runs, out=tmp_path / "out")
    (runs[1] / "run.json").write_text(json.dumps({"step": 9}))
    compare.run(runs, out=tmp_path / "out")


def test_a_soup_is_not_a_seed_of_its_runs(runs, tmp_path):
    (runs[1] / "run.json").write_text(json.dumps({"averaged": 2}))
    result = compare.run(runs[:2], out=tmp_path / "out")
    assert {"setting": "averaged", "a": None, "b": 2} in result["settings"]
    assert not result["seeds"]
    (runs[1] / "run.json").unlink()
    assert compare.run(runs[:2], out=tmp_path / "out")["seeds"]  # they differ in the seed alone


def test_runs_of_one_name_are_told_apart_by_the_folders_above(tmp_path):
    paths = [tmp_path / "a/finetune", tmp_path / "b/finetune"]
    assert compare._names(paths) == ["a/finetune", "b/finetune"]


def test_a_run_that_is_called_as_a_column_hides_no_setting(tmp_path):
    age = np.arange(20, 60)
    rates = {"first": 1e-3, "setting": 1e-2}
    paths = [write_run(tmp_path / f"in/{name}", age + 1.0, lr=rate) for name, rate in rates.items()]
    (row,) = compare.run(paths, out=tmp_path / "out")["settings"]
    assert row == {"setting": "optim.lr", "in/first": 1e-3, "in/setting": 1e-2}

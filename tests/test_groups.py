"""Groups against plain loops; small, empty and unknown ones."""

import numpy as np
import pytest

from coatnet_jax.bootstrap import bootstrap_interval
from coatnet_jax.groups import group_table, unknown_counts
from coatnet_jax.palette import GENDER_NAMES, RACE_NAMES


@pytest.fixture(scope="module")
def faces():
    rng = np.random.default_rng(0)
    labels = {
        "age": rng.integers(0, 117, 600),
        "gender": rng.integers(-1, 2, 600),
        "race": rng.choice([-1, 0, 1, 2, 4], 600, p=[0.02, 0.5, 0.3, 0.16, 0.02]),
    }
    error = rng.normal(size=600) * 5
    return labels, {"mae": np.abs(error), "bias": error, "hit": rng.random(600) < 0.5}


def of_group(row, labels, i):
    """Whether face i is in the group, from the group's name alone."""
    for word, key in zip(row["group"].split(", "), row["by"].split(" × "), strict=True):
        if key == "age":
            first, last = map(int, word.split("–"))
            if not first <= labels["age"][i] <= last:
                return False
        else:
            names = GENDER_NAMES if key == "gender" else RACE_NAMES
            if labels[key][i] != names.index(word):
                return False
    return True


def test_every_group_is_that_of_a_loop(faces):
    labels, measures = faces
    rows = group_table(measures, labels, resamples=30)
    kinds = {by: sum(row["by"] == by for row in rows) for by in {row["by"] for row in rows}}
    assert kinds == {
        "age": 12, "gender": 2, "race": 5, "gender × race": 10, "age × gender": 24
    }  # fmt: skip
    for row in rows:
        inside = [i for i in range(600) if of_group(row, labels, i)]
        assert row["support"] == len(inside) and row["few"] == (len(inside) < 20)
        for name, values in measures.items():
            if inside:
                assert row[name] == pytest.approx(np.mean(values[inside]))
            else:
                assert row[name] is None and row[f"{name}_interval"] is None
    assert any(row["few"] and row["support"] for row in rows)
    assert any(not row["support"] for row in rows)


def test_interval_of_a_group_is_that_of_its_own_faces(faces):
    labels, measures = faces
    row = next(r for r in group_table(measures, labels) if r["group"] == "male, White")
    values = measures["bias"][(labels["gender"] == 0) & (labels["race"] == 0)]
    half = 1.96 * values.std() / np.sqrt(len(values))
    expected = [values.mean() - half, values.mean() + half]
    assert row["bias_interval"] == pytest.approx(expected, abs=0.12)


def test_other_seeds_draw_other_intervals(faces):
    labels, measures = faces
    first, again, other = (
        group_table(measures, labels, seed=seed, resamples=30)[0] for seed in (1, 1, 2)
    )
    assert first == again
    assert first["bias"] == other["bias"] and first["bias_interval"] != other["bias_interval"]


def test_groups_are_judged_by_their_persons(faces):
    labels, measures = faces
    person = np.repeat(np.arange(40), 15)
    one = person == 7
    labels = labels | {"gender": one.astype(int), "race": np.where(person < 25, 0, 1)}
    rows = {row["group"]: row for row in group_table(measures, labels, persons=person)}
    alone = {row["group"]: row for row in group_table(measures, labels)}
    # A person cannot be drawn in place of another where there is no other.
    assert rows["female"]["mae_interval"] is None and rows["female"]["few"]
    assert alone["female"]["mae_interval"] and rows["female"]["mae"] == alone["female"]["mae"]
    assert (rows["White"]["few"], rows["Black"]["few"]) == (False, True)  # 25 and 15 persons
    inside = person < 25
    expected = bootstrap_interval(measures["bias"][inside], groups=person[inside])
    assert rows["White"]["bias_interval"] == pytest.approx(expected)
    assert rows["White"]["bias_interval"] != alone["White"]["bias_interval"]


def test_unknown_labels_make_no_group_and_are_counted(faces):
    labels, measures = faces
    assert unknown_counts(labels)["gender"] == int((labels["gender"] == -1).sum())
    none = {**labels, "gender": np.full(600, -1), "race": np.full(600, -1)}
    rows = group_table(measures, none, resamples=3)
    assert {row["by"] for row in rows} == {"age"} and unknown_counts(none)["race"] == 600

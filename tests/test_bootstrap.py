"""Bootstrap intervals against the normal approximation and plain loops, over faces and persons."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from coatnet_jax import bootstrap


def test_interval_is_seeded_and_near_the_normal_one():
    values = np.random.default_rng(1).exponential(5, 800)
    found = bootstrap.bootstrap_interval(values, seed=3)
    assert found == bootstrap.bootstrap_interval(values, seed=3)
    assert found != bootstrap.bootstrap_interval(values, seed=4)
    half = 1.96 * values.std() / np.sqrt(len(values))
    found = bootstrap.bootstrap_interval(values, resamples=4000)
    assert found == pytest.approx([values.mean() - half, values.mean() + half], abs=0.03)


def test_resampled_means_are_those_of_drawn_rows():
    values = np.random.default_rng(0).normal(size=(30, 2))
    rng = np.random.default_rng(5)
    expected = [values[rng.integers(0, 30, 30)].mean(axis=0) for _ in range(7)]
    np.testing.assert_allclose(bootstrap.resampled_means(values, seed=5, resamples=7), expected)


@pytest.fixture
def photos():
    """40 persons of 1 to 6 photos in mixed order, whose values resemble each other: (name of the
    person, values [n, 2])."""
    rng = np.random.default_rng(2)
    person = rng.permutation(np.repeat(np.arange(40), rng.integers(1, 7, 40)))
    values = rng.normal(size=(40, 2))[person] + 0.2 * rng.normal(size=(len(person), 2))
    return np.array([f"p{i}" for i in person]), values


def drawn_with_all_photos(person, seed, resamples):
    """The rows of each resample, by a plain loop."""
    rng, names = np.random.default_rng(seed), list(dict.fromkeys(person))
    for _ in range(resamples):
        drawn = rng.integers(0, len(names), len(names))
        yield np.concatenate([np.flatnonzero(person == names[i]) for i in drawn])


def test_persons_are_drawn_with_all_of_their_photos(photos):
    person, values = photos
    expected = [values[rows].mean(axis=0) for rows in drawn_with_all_photos(person, 5, 50)]
    found = bootstrap.resampled_means(values, groups=person, seed=5, resamples=50)
    np.testing.assert_allclose(found, expected)
    low, high = bootstrap.bootstrap_interval(
        values[:, 0], groups=bootstrap.persons_of(person), seed=5, resamples=50
    )
    assert (low, high) == pytest.approx(np.quantile(np.array(expected)[:, 0], [0.025, 0.975]))
    alone = bootstrap.bootstrap_interval(values[:, 0])
    together = bootstrap.bootstrap_interval(values[:, 0], groups=person)
    assert np.diff(together) > 1.3 * np.diff(alone)


def test_recall_and_differences_are_those_of_the_drawn_persons(photos):
    person, values = photos
    true, predicted = values.round().astype(int).clip(-1, 1).T
    scores, changes = [], []
    for rows in drawn_with_all_photos(person, 9, 60):
        scores.append(balanced_accuracy_score(true[rows], predicted[rows]))
        changes.append((predicted - true)[rows].mean())
    told = {"groups": person, "seed": 9, "resamples": 60}
    found = bootstrap.balanced_accuracy_interval(true, predicted, **told)
    assert found == pytest.approx(np.quantile(scores, [0.025, 0.975]))
    found = bootstrap.paired_difference(true, predicted, **told)
    assert found["difference"] == pytest.approx((predicted - true).mean())
    assert found["interval"] == pytest.approx(np.quantile(changes, [0.025, 0.975]))


def test_copies_of_every_photo_make_no_interval_narrower():
    values = np.random.default_rng(0).exponential(5, 60)
    alone = bootstrap.bootstrap_interval(values, seed=4)
    copies = bootstrap.bootstrap_interval(np.tile(values, 7), groups=[*range(60)] * 7, seed=4)
    assert copies == pytest.approx(alone, rel=1e-12)
    assert np.diff(bootstrap.bootstrap_interval(np.tile(values, 7), seed=4)) < 0.5 * np.diff(alone)


@pytest.mark.parametrize("groups", [np.arange(200)[::-1], [f"p{i % 7}-{i}" for i in range(200)]])
def test_one_photo_a_person_gives_the_very_numbers_of_faces(groups):
    values = np.random.default_rng(1).normal(size=(200, 3))
    found = bootstrap.resampled_means(values, groups=groups, seed=2)
    assert (found == bootstrap.resampled_means(values, seed=2)).all()


def test_unknown_identities_are_persons_of_their_own():
    found = bootstrap.persons_of(["", "b", "a", "", "b"])
    assert found[1] == found[4] and len(set(found)) == 4
    assert bootstrap.persons_of(["", "", ""]) is None  # nothing is known
    assert bootstrap.persons_of(["a", "a"]) is None  # nobody to draw in place of a
    assert bootstrap.persons_of([]) is None
    assert len(set(bootstrap.persons_of(["a", "a", ""]))) == 2
    with pytest.raises(ValueError, match="2 groups for 3 rows"):
        bootstrap.resampled_means(np.zeros((3, 1)), groups=[1, 2])


def test_balanced_accuracy_interval_matches_a_loop_over_resamples():
    rng = np.random.default_rng(0)
    true = rng.choice(4, 200, p=[0.6, 0.2, 0.15, 0.05])
    predicted = np.where(rng.random(200) < 0.6, true, rng.integers(0, 4, 200))
    draws, scores = np.random.default_rng(9), []
    for _ in range(200):
        rows = draws.integers(0, 200, 200)
        scores.append(balanced_accuracy_score(true[rows], predicted[rows]))
    found = bootstrap.balanced_accuracy_interval(true, predicted, seed=9, resamples=200)
    assert found == pytest.approx(np.quantile(scores, [0.025, 0.975]))


def test_paired_difference_has_the_analytic_normal_interval():
    # two runs that find the same faces hard: sd 6 each, correlation 0.9, so sd of the change
    # 6 sqrt(2 (1 - 0.9)) = 2.68, where unpaired intervals would be 3.2 times as wide
    rng = np.random.default_rng(0)
    n, common = 2000, rng.normal(size=2000)
    first, second = (6 * (0.9**0.5 * common + 0.1**0.5 * rng.normal(size=n)) for _ in range(2))
    second = second + 0.3
    found = bootstrap.paired_difference(first, second, resamples=4000)
    change = second - first
    half = 1.96 * change.std() / np.sqrt(n)
    assert found["difference"] == pytest.approx(change.mean())
    expected = [change.mean() - half, change.mean() + half]
    assert found["interval"] == pytest.approx(expected, abs=0.01)
    assert half == pytest.approx(1.96 * 2.68 / np.sqrt(n), rel=0.1)
    with pytest.raises(ValueError, match="3 and 4 values cannot be paired"):
        bootstrap.paired_difference(np.zeros(3), np.zeros(4))

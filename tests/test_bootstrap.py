"""Bootstrap intervals against the normal approximation and plain loops."""

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

"""Metrics against NumPy over whole splits, loops, and values worked out by hand."""

import numpy as np
import pytest
from sklearn.metrics import f1_score

from coatnet_jax import metrics


def test_mae_and_cumulative_score_by_hand():
    true, predicted = np.array([10, 20, 30, 40]), np.array([10.0, 25.0, 24.5, 41.0])
    assert metrics.mae(true, predicted) == pytest.approx((0 + 5 + 5.5 + 1) / 4)
    assert metrics.cumulative_score(predicted - true) == 0.75  # 5 years off is within 5
    assert metrics.cumulative_score(predicted - true, within=0) == 0.25


def test_mae_refuses_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match=r"\(4,\).*\(4, 1\)"):
        metrics.mae(np.zeros(4), np.zeros((4, 1)))


def test_class_scores_leave_unknown_labels_out():
    true = np.array([0, 0, 0, 0, 1, 1, 3, -1, -1])
    predicted = np.array([0, 0, 0, 1, 1, 3, 2, 0, 3])
    assert metrics.accuracy(true, predicted) == pytest.approx(4 / 7)
    assert metrics.balanced_accuracy(true, predicted) == pytest.approx((3 / 4 + 1 / 2 + 0) / 3)
    expected = [[3, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]]
    np.testing.assert_array_equal(metrics.confusion_matrix(true, predicted, 4), expected)
    assert np.isnan(metrics.accuracy(np.array([-1]), np.array([0])))
    assert np.isnan(metrics.balanced_accuracy(np.array([-1]), np.array([0])))
    with pytest.raises(ValueError, match="0..2"):
        metrics.confusion_matrix(true, predicted, 3)
    with pytest.raises(ValueError, match="-1..0"):
        metrics.confusion_matrix(np.array([0, 0]), np.array([0, -1]), 2)


def test_knn_mae_matches_a_loop_across_chunks():
    rng = np.random.default_rng(0)
    bank, queries = rng.normal(size=(700, 6)), rng.normal(size=(1100, 6))  # more than one chunk
    bank *= rng.uniform(0.1, 10, size=(700, 1))  # length must not count, only direction
    ages, age = rng.integers(0, 100, 700), rng.integers(0, 100, 1100)
    expected, votes, directions = [], [], bank / np.linalg.norm(bank, axis=1, keepdims=True)
    for query, true in zip(queries, age, strict=True):
        nearest = np.argsort(directions @ query)[-20:]
        expected.append(abs(np.mean(ages[nearest]) - true))
        votes.append(np.bincount(ages[nearest] // 20).argmax())
    assert metrics.knn_mae(bank, ages, queries, age, k=20) == pytest.approx(np.mean(expected))
    np.testing.assert_array_equal(metrics.knn_class(bank, ages // 20, queries, k=20), votes)


def test_knn_refuses_more_neighbours_than_rows():
    with pytest.raises(ValueError, match="k=20.*3 training rows"):
        metrics.knn_mae(np.eye(3), np.arange(3), np.eye(3), np.arange(3))


def test_a_row_of_zeros_is_like_no_other():
    rows, similarities = metrics.nearest_rows(np.eye(3), np.zeros((1, 3)), 3)
    assert sorted(rows[0]) == [0, 1, 2]
    np.testing.assert_array_equal(similarities, np.zeros((1, 3)))


def test_macro_f1_matches_scikit_learn():
    rng = np.random.default_rng(4)
    true, predicted = rng.integers(0, 4, 80), rng.integers(1, 5, 80)
    expected = f1_score(true, predicted, average="macro")
    assert metrics.macro_f1(true, predicted) == pytest.approx(expected)
    unknown = np.where(np.arange(80) < 40, true, -1)
    expected = f1_score(true[:40], predicted[:40], average="macro")
    assert metrics.macro_f1(unknown, predicted) == pytest.approx(expected)
    assert np.isnan(metrics.macro_f1(np.full(3, -1), np.zeros(3, int)))

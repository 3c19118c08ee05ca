"""Losses against optax, NumPy loops and values worked out by hand."""

import jax
import numpy as np
import optax
from sklearn.utils.class_weight import compute_class_weight

from coatnet_jax import losses


def _z(rows=12, dim=7, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32) * 3


def test_target_row_of_zeros_counts_for_nothing():
    logits, target = _z(4, 5), np.eye(5, dtype=np.float32)[[2, 0, 1, 3]]
    target[1] = 0  # an unknown label
    loss = losses.cross_entropy(logits, target)
    expected = optax.losses.softmax_cross_entropy(logits, target)
    np.testing.assert_allclose(loss, np.where([0, 1, 0, 0], 0, expected), rtol=1e-5)
    gradient = jax.grad(lambda x: losses.cross_entropy(x, target).sum())(logits)
    assert not np.any(gradient[1]) and np.all(np.any(np.delete(gradient, 1, axis=0), axis=1))


def test_cross_entropy_matches_optax():
    logits, target = _z(5, 9), np.random.default_rng(1).dirichlet(np.ones(9), 5)
    expected = optax.losses.softmax_cross_entropy(logits, target)
    np.testing.assert_allclose(losses.cross_entropy(logits, target), expected, rtol=1e-5)


def test_balanced_weights_match_scikit_learn():
    labels = np.array([0, 0, 0, 2, 2, 4, -1, -1])
    expected = compute_class_weight("balanced", classes=np.array([0, 2, 4]), y=labels[:6])
    weights = losses.balanced_weights(labels, 5)
    np.testing.assert_allclose(np.array(weights)[[0, 2, 4]], expected)
    assert weights[1] == weights[3] == 0 and isinstance(hash(weights), int)
    assert losses.balanced_weights(np.full(3, -1), 2) == (0, 0)

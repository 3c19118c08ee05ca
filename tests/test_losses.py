"""Losses against optax, NumPy loops and values worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from coatnet_jax import losses

YEARS = np.arange(117)


def _z(rows=12, dim=7, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32) * 3


def test_age_distribution_is_the_normalised_gaussian():
    age = np.array([0, 1, 30, 116], np.int32)
    expected = np.exp(-((YEARS - age[:, None]) ** 2) / (2 * 2.5**2))
    expected /= expected.sum(-1, keepdims=True)
    np.testing.assert_allclose(losses.age_distribution(age, sigma=2.5), expected, atol=1e-6)
    np.testing.assert_array_equal(losses.age_distribution(age, sigma=0), np.eye(117)[age])
    with pytest.raises(ValueError, match="-1"):
        losses.age_distribution(age, sigma=-1)


def _logits_and_target():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(5, 117)).astype(np.float32) * 2
    target = 0.3 * np.eye(117)[[3, 20, 40, 60, 80]] + 0.7 * np.eye(117)[[9, 8, 7, 6, 5]]
    p = np.exp(logits.astype(np.float64))
    return logits, target.astype(np.float32), p / p.sum(-1, keepdims=True)


def test_cross_entropy_matches_numpy():
    logits, target, p = _logits_and_target()
    np.testing.assert_allclose(
        losses.cross_entropy(logits, target), -(target * np.log(p)).sum(-1), rtol=1e-5
    )


def test_kl_l1_matches_numpy():
    logits, target, p = _logits_and_target()
    kl = np.where(target > 0, target * np.log(np.where(target > 0, target, 1) / p), 0).sum(-1)
    l1 = np.abs((p * YEARS).sum(-1) - (target * YEARS).sum(-1))
    np.testing.assert_allclose(losses.kl_l1(logits, target), kl + l1, rtol=1e-5)


def test_kl_l1_is_zero_at_the_target_with_finite_gradients():
    target = losses.age_distribution(np.array([5, 50]), sigma=2.0)
    assert np.abs(losses.kl_l1(jnp.log(target + 1e-12), target)).max() < 1e-3
    one_hot = losses.age_distribution(np.array([5, 50]), sigma=0)
    gradient = jax.grad(lambda x: losses.kl_l1(x, one_hot).sum())(jnp.zeros((2, 117)))
    assert np.isfinite(gradient).all()


def test_mean_variance_matches_the_papers_terms():
    logits, target, p = _logits_and_target()
    mean, true = (p * YEARS).sum(-1), (target * YEARS).sum(-1)
    variance = (p * YEARS**2).sum(-1) - mean**2
    expected = -(target * np.log(p)).sum(-1) + 0.2 * (mean - true) ** 2 / 2 + 0.05 * variance
    np.testing.assert_allclose(losses.mean_variance(logits, target), expected, rtol=1e-4)


def test_unknown_age_loss_is_answered_with_the_nearest_name():
    assert losses.get_age_loss("kl_l1") is losses.kl_l1
    with pytest.raises(ValueError, match="did you mean mean_variance"):
        losses.get_age_loss("mean_varience")
    with pytest.raises(ValueError, match="choose from cross_entropy, kl_l1, mean_variance"):
        losses.get_age_loss("zzz")


def test_target_row_of_zeros_counts_for_nothing():
    logits, target = _z(4, 5), np.eye(5, dtype=np.float32)[[2, 0, 1, 3]]
    target[1] = 0  # an unknown label
    loss = losses.cross_entropy(logits, target)
    expected = optax.losses.softmax_cross_entropy(logits, target)
    np.testing.assert_allclose(loss, np.where([0, 1, 0, 0], 0, expected), rtol=1e-5)
    gradient = jax.grad(lambda x: losses.cross_entropy(x, target).sum())(logits)
    assert not np.any(gradient[1]) and np.all(np.any(np.delete(gradient, 1, axis=0), axis=1))

"""Losses against optax, NumPy loops and values worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.utils.class_weight import compute_class_weight

from coatnet_jax import losses


def _z(rows=12, dim=7, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32) * 3


def _nt_xent_loop(z, temperature, decoupled):
    z = z.astype(np.float64) / np.linalg.norm(z, axis=1, keepdims=True)
    rows, total = len(z), 0.0
    for i in range(rows):
        j = (i + rows // 2) % rows
        others = [k for k in range(rows) if k != i and not (decoupled and k == j)]
        total -= z[i] @ z[j] / temperature
        total += np.log(sum(np.exp(z[i] @ z[k] / temperature) for k in others))
    return total / rows


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_matches_optax(temperature):
    z = _z()
    labels = jnp.tile(jnp.arange(6), 2)  # optax wants the same label on the rows of a pair
    ours, gradient = jax.value_and_grad(lambda z: losses.nt_xent(z, temperature=temperature)[0])(z)
    theirs, their_gradient = jax.value_and_grad(optax.losses.ntxent)(z, labels, temperature)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    np.testing.assert_allclose(gradient, their_gradient, atol=1e-5)


@pytest.mark.parametrize("decoupled", [False, True])
def test_nt_xent_matches_a_loop(decoupled):
    loss, _ = losses.nt_xent(_z(), temperature=0.2, decoupled=decoupled)
    np.testing.assert_allclose(loss, _nt_xent_loop(_z(), 0.2, decoupled), rtol=1e-5)


def test_decoupled_loss_has_finite_gradients():
    loss = lambda z: losses.nt_xent(z, temperature=0.2, decoupled=True)[0]  # noqa: E731
    assert np.isfinite(jax.grad(loss)(_z())).all()
    assert np.isfinite(jax.grad(loss)(jnp.zeros((4, 3)))).all()


def test_contrastive_top1_counts_rows_that_find_their_other_view():
    z = np.eye(4, dtype=np.float32)
    views = np.concatenate([z, z + 0.01])
    assert losses.nt_xent(views, temperature=0.2)[1]["contrastive_top1"] == 1
    views[[4, 5]] = views[[5, 4]]  # two images swapped: four of the eight rows are wrong
    assert losses.nt_xent(views, temperature=0.2)[1]["contrastive_top1"] == 0.5


def test_nt_xent_is_float32_inside_for_bfloat16_input():
    z = jnp.asarray(_z(), jnp.bfloat16)
    loss, _ = losses.nt_xent(z, temperature=0.05)
    assert loss.dtype == jnp.float32
    expected = _nt_xent_loop(np.asarray(z, np.float32), 0.05, False)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_nt_xent_never_holds_an_array_of_all_pairs_by_width():
    rows, dim = 16, 32
    jaxpr = jax.make_jaxpr(jax.grad(lambda z: losses.nt_xent(z, temperature=0.2)[0]))(
        jnp.zeros((rows, dim))
    )
    sizes = [np.prod(v.aval.shape, dtype=int) for e in jaxpr.jaxpr.eqns for v in e.outvars]
    assert max(sizes) <= max(rows * rows, rows * dim)


@pytest.mark.parametrize("rows", [2, 5])
def test_nt_xent_refuses_odd_and_tiny_batches(rows):
    with pytest.raises(ValueError, match=f"{rows} rows"):
        losses.nt_xent(_z(rows), temperature=0.2)


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

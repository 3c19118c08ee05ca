"""NT-Xent against optax and NumPy loops; in chunks it is the same loss in less memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from coatnet_jax.sharding import make_mesh, shard_batch
from coatnet_jax.ssl.nt_xent import nt_xent


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
    ours, gradient = jax.value_and_grad(lambda z: nt_xent(z, temperature=temperature)[0])(z)
    theirs, their_gradient = jax.value_and_grad(optax.losses.ntxent)(z, labels, temperature)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    np.testing.assert_allclose(gradient, their_gradient, atol=1e-5)


@pytest.mark.parametrize("decoupled", [False, True])
def test_nt_xent_matches_a_loop(decoupled):
    loss, _ = nt_xent(_z(), temperature=0.2, decoupled=decoupled)
    np.testing.assert_allclose(loss, _nt_xent_loop(_z(), 0.2, decoupled), rtol=1e-5)


def test_decoupled_loss_has_finite_gradients():
    loss = lambda z: nt_xent(z, temperature=0.2, decoupled=True)[0]  # noqa: E731
    assert np.isfinite(jax.grad(loss)(_z())).all()
    assert np.isfinite(jax.grad(loss)(jnp.zeros((4, 3)))).all()


def test_contrastive_top1_counts_rows_that_find_their_other_view():
    z = np.eye(4, dtype=np.float32)
    views = np.concatenate([z, z + 0.01])
    assert nt_xent(views, temperature=0.2)[1]["contrastive_top1"] == 1
    views[[4, 5]] = views[[5, 4]]  # two images swapped: four of the eight rows are wrong
    assert nt_xent(views, temperature=0.2)[1]["contrastive_top1"] == 0.5


def test_nt_xent_is_float32_inside_for_bfloat16_input():
    z = jnp.asarray(_z(), jnp.bfloat16)
    loss, _ = nt_xent(z, temperature=0.05)
    assert loss.dtype == jnp.float32
    expected = _nt_xent_loop(np.asarray(z, np.float32), 0.05, False)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_nt_xent_never_holds_an_array_of_all_pairs_by_width():
    rows, dim = 16, 32
    jaxpr = jax.make_jaxpr(jax.grad(lambda z: nt_xent(z, temperature=0.2)[0]))(
        jnp.zeros((rows, dim))
    )
    sizes = [np.prod(v.aval.shape, dtype=int) for e in jaxpr.jaxpr.eqns for v in e.outvars]
    assert max(sizes) <= max(rows * rows, rows * dim)


@pytest.mark.parametrize("rows", [2, 5])
def test_nt_xent_refuses_odd_and_tiny_batches(rows):
    with pytest.raises(ValueError, match=f"{rows} rows"):
        nt_xent(_z(rows), temperature=0.2)


def _value_and_grad(z, **options):
    return jax.value_and_grad(lambda z: nt_xent(z, temperature=0.2, **options), has_aux=True)(z)


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 12])
def test_chunks_change_neither_loss_nor_metrics_nor_gradients(chunk, decoupled):
    dense = _value_and_grad(_z(), decoupled=decoupled)
    chunked = _value_and_grad(_z(), decoupled=decoupled, chunk=chunk)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), dense, chunked)


@pytest.mark.parametrize("chunk", [5, -1, 24])
def test_chunk_that_does_not_divide_the_rows_is_refused(chunk):
    with pytest.raises(ValueError, match=f"loss.chunk {chunk} does not divide the 12 rows"):
        nt_xent(_z(), temperature=0.2, chunk=chunk)


def _temp_bytes(rows, chunk):
    grad = jax.jit(jax.grad(lambda z: nt_xent(z, temperature=0.2, chunk=chunk)[0]))
    compiled = grad.lower(jax.ShapeDtypeStruct((rows, 16), jnp.float32)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_in_chunks_grows_linearly_with_the_batch():
    small, large = 1024, 4096
    assert _temp_bytes(large, 0) > 12 * _temp_bytes(small, 0)  # all pairs: 16 times
    chunked = _temp_bytes(large, 64)
    assert chunked < 5 * _temp_bytes(small, 64)
    assert chunked < 4 * large * large / 10


def test_chunks_on_eight_devices_equal_one():
    z = _z(32, 8)
    on_eight = shard_batch({"z": z}, make_mesh(8))["z"]
    eight = jax.jit(partial(_value_and_grad, chunk=16))(on_eight)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), _value_and_grad(z), eight
    )

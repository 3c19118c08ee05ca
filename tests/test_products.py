"""Products, sums and their gradients against NumPy's, in every way of computing them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coatnet_jax import coatnet, products


@pytest.mark.parametrize("k, n", [(5, 3), (3, 5), (4, 4)])
@pytest.mark.parametrize("rows", [7, products.TALL])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_product_and_its_gradients_are_numpys(rows, k, n, dtype):
    rng = np.random.default_rng(0)
    # Small integers: every sum of products is exact in either dtype's product.
    x, w, dy = (rng.integers(-1, 2, shape) for shape in ((rows, k), (k, n), (rows, n)))
    y, gradients = jax.vjp(products.product, jnp.asarray(x, dtype), jnp.asarray(w, dtype))
    dx, dw = gradients(jnp.asarray(dy, dtype))
    for ours, exact in ((y, x @ w), (dx, dy @ w.T), (dw, x.T @ dy)):
        assert ours.dtype == dtype
        np.testing.assert_array_equal(np.float32(ours), exact)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_added_to_each_has_the_sum_of_their_gradients(dtype):
    rng = np.random.default_rng(0)
    batch, one, dy = (
        rng.integers(-4, 5, shape) for shape in ((6, 2, 3, 3), (2, 3, 3), (6, 2, 3, 3))
    )
    y, gradients = jax.vjp(products.add_to_each, jnp.asarray(batch, dtype), jnp.asarray(one, dtype))
    dbatch, done = gradients(jnp.asarray(dy, dtype))
    for ours, exact in ((y, batch + one), (dbatch, dy), (done, dy.sum(0))):
        assert ours.dtype == dtype
        np.testing.assert_array_equal(np.float32(ours), exact)


def test_dense_is_flaxs_over_the_last_axis():
    x = jax.random.normal(jax.random.key(0), (2, 3, 5, 7))
    ours, theirs = coatnet.Dense(4), coatnet.nn.Dense(4)
    variables = theirs.init(jax.random.key(1), x)
    jax.tree.map(np.testing.assert_array_equal, ours.init(jax.random.key(1), x), variables)
    y, z = (jax.vjp(m.apply, variables, x) for m in (ours, theirs))
    np.testing.assert_allclose(y[0], z[0], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), y[1](z[0]), z[1](z[0]))

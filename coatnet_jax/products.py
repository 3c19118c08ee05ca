"""Matrix products, and a sum, whose gradients suit the CPU.

XLA's CPU product that sums over the rows of two tall matrices loses up to half of its speed where
the result has more rows than columns: it is computed the other way round then, and turned
(`benchmarks/products.py`). The sum over a batch, which is the gradient of what its members share,
is a product too. Other backends take both as they are.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

TALL = 1024  # rows; below, the optimiser's reading of the turned result costs what is gained


def product(x: Float[Array, "m k"], weights: Float[Array, "k n"]) -> Float[Array, "m n"]:
    """The product of two matrices."""
    return _product(x, weights) if jax.default_backend() == "cpu" else x @ weights


def weight_gradient(
    x: Float[Array, "m k"], dy: Float[Array, "m n"], *, dtype: jnp.dtype
) -> Float[Array, "k n"]:
    """Sum over the m rows of all pairs of columns, in `dtype`: what x @ weights has from dy."""
    tall = len(x) >= TALL and x.shape[1] > dy.shape[1]
    if not tall or jax.default_backend() != "cpu":
        return _over_rows(x, dy, dtype)
    # The barrier keeps XLA from turning the product back.
    return lax.optimization_barrier(_over_rows(dy, x, dtype)).T


def _over_rows(a, b, dtype):
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=dtype)


@jax.custom_vjp
def _product(x, weights):
    return x @ weights


def _backward(saved, dy):
    x, weights = saved
    return dy @ weights.T, weight_gradient(x, dy, dtype=weights.dtype)


_product.defvjp(lambda x, weights: (x @ weights, (x, weights)), _backward)


def add_to_each(
    batch: Float[Array, "b *rest"], one: Float[Array, "*rest"]
) -> Float[Array, "b *rest"]:
    """Adds `one` to every member of a batch of the same dtype."""
    return _add_to_each(batch, one) if jax.default_backend() == "cpu" else batch + one


@jax.custom_vjp
def _add_to_each(batch, one):
    return batch + one


def _sum_backward(_, dy):
    # XLA's own sum over the leading axis takes twenty times as long.
    total = jnp.ones((1, len(dy)), dy.dtype) @ dy.reshape(len(dy), -1)
    return dy, total.reshape(dy.shape[1:])


_add_to_each.defvjp(lambda batch, one: (batch + one, None), _sum_backward)

"""Matrix products whose weight gradient suits the CPU.

XLA's CPU product that sums over the rows of two tall matrices loses up to half of its speed where
the result has more rows than columns: it is computed the other way round then, and turned
(`benchmarks/products.py`). Other backends take the product as it is.
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

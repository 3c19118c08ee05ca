"""Gradients of matrix products and of what a batch shares: ours against XLA's, in turns.

    python benchmarks/products.py

Rows are the pixels of a batch of 16 at 224 px, in coatnet_0, or the patches that a 3x3 convolution
at stride 2 of ResNet-50 meets, on the default backend; below are the position biases that the 16
images share in attention. Shown are medians of --rounds, in milliseconds, and what our time makes
in GFLOP/s; a ratio over 1 says that ours is faster.
"""

import argparse
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from interleaved import median_milliseconds, waited_for

from coatnet_jax.pages import markdown_table
from coatnet_jax.products import add_to_each, weight_gradient
from coatnet_jax.runtime import set_up

LAYERS = {
    "stage 1, expand": (16 * 56**2, 96, 384),
    "stage 1, project": (16 * 56**2, 384, 96),
    "stage 2, project": (16 * 28**2, 768, 192),
    "stage 3, second of the MLP": (16 * 14**2, 1536, 384),
    "stage 4, second of the MLP": (16 * 7**2, 3072, 768),
    "ResNet-50, 28x28x128": (16 * 28**2, 9 * 128, 128),
    "ResNet-50, 14x14x256": (16 * 14**2, 9 * 256, 256),
}
SHARED = {"stage 3, attention": (12, 14**2, 14**2), "stage 4, attention": (24, 7**2, 7**2)}


@jax.jit
def ours(x: jax.Array, dy: jax.Array) -> jax.Array:
    """As the layers take it."""
    return weight_gradient(x, dy, dtype=x.dtype)


@jax.jit
def xla(x: jax.Array, dy: jax.Array) -> jax.Array:
    """As automatic differentiation takes it."""
    return x.T @ dy


def shared_gradient(add: Callable) -> Callable:
    """(batch, one, dy) → the gradient of what `add` gave to each of the batch, compiled."""
    return jax.jit(lambda batch, one, dy: jax.vjp(partial(add, batch), one)[1](dy))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    set_up()
    rows = []
    for layer, (m, k, n) in LAYERS.items():
        mine, theirs = milliseconds(ours, xla, (m, k), (m, n), rounds=arguments.rounds)
        rows.append(
            {
                "layer": layer,
                "rows": m,
                "weights": f"{k}x{n}",
                "ours, ms": mine,
                "GFLOP/s": f"{2 * math.prod((m, k, n)) / mine / 1e6:.0f}",
                "XLA, ms": theirs,
                "ratio": theirs / mine,
            }
        )
    print(markdown_table(rows))
    rows = []
    for layer, shape in SHARED.items():
        batch = (16, *shape)
        sums = shared_gradient(add_to_each), shared_gradient(jnp.add)
        mine, theirs = milliseconds(*sums, batch, shape, batch, rounds=arguments.rounds)
        rows.append(
            {
                "shared in": layer,
                "bias": "x".join(map(str, shape)),
                "ours, ms": mine,
                "XLA, ms": theirs,
                "ratio": theirs / mine,
            }
        )
    print(markdown_table(rows))


def milliseconds(mine: Callable, theirs: Callable, *shapes: tuple, rounds: int) -> list[float]:
    """Medians of both functions of arrays of ones."""
    args = [jnp.ones(shape) for shape in shapes]
    both = {"ours": waited_for(mine, *args), "xla": waited_for(theirs, *args)}
    return median_milliseconds(both, rounds)


if __name__ == "__main__":
    main()

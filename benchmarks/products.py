"""The weight gradient of a matrix product: ours against XLA's own, in interleaved rounds.

    python benchmarks/products.py

Rows are the pixels of a batch of 16 at 224 px, in coatnet_0, or the patches that a 3x3 convolution
of ResNet-50 meets, on the default backend. Shown are medians of --rounds, in milliseconds, and what
our time makes in GFLOP/s; a ratio over 1 says that ours is faster.
"""

import argparse
import math
import statistics

import jax
import jax.numpy as jnp
from interleaved import seconds_in_turns, waited_for

from coatnet_jax.pages import markdown_table
from coatnet_jax.products import weight_gradient
from coatnet_jax.runtime import set_up

LAYERS = {
    "stem, second convolution": (16 * 112**2, 9 * 64, 64),
    "stage 1, expand": (16 * 56**2, 96, 384),
    "stage 1, project": (16 * 56**2, 384, 96),
    "stage 2, project": (16 * 28**2, 768, 192),
    "stage 3, second of the MLP": (16 * 14**2, 1536, 384),
    "stage 4, second of the MLP": (16 * 7**2, 3072, 768),
    "ResNet-50, 28x28x128": (16 * 28**2, 9 * 128, 128),
    "ResNet-50, 14x14x256": (16 * 14**2, 9 * 256, 256),
}


@jax.jit
def ours(x: jax.Array, dy: jax.Array) -> jax.Array:
    """As the layers take it."""
    return weight_gradient(x, dy, dtype=x.dtype)


@jax.jit
def xla(x: jax.Array, dy: jax.Array) -> jax.Array:
    """As automatic differentiation takes it."""
    return x.T @ dy


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    set_up()
    rows = []
    for layer, (m, k, n) in LAYERS.items():
        args = [jnp.ones((m, k)), jnp.ones((m, n))]
        both = {"ours": waited_for(ours, *args), "xla": waited_for(xla, *args)}
        taken = seconds_in_turns(both, arguments.rounds).values()
        mine, theirs = (1000 * statistics.median(seconds) for seconds in taken)
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


if __name__ == "__main__":
    main()

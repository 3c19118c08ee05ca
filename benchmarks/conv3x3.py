"""The 3x3 convolution, forward and gradients: ours against XLA's own, in interleaved rounds.

    python benchmarks/conv3x3.py

The maps are those of the stems of coatnet_micro and coatnet_0 at 128 px and of ResNet-50 at 64 and
128 px, batch 64, on the default backend; images have no gradient. Shown are medians of --rounds, in
milliseconds; a ratio over 1 says that ours is faster.
"""

import argparse
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from interleaved import median_milliseconds, waited_for

from coatnet_jax.conv import conv3x3
from coatnet_jax.pages import markdown_table
from coatnet_jax.runtime import set_up

LAYERS = (  # sides, channels before and after, strides
    (128, 3, 24, 2),
    (64, 24, 24, 1),
    (64, 64, 64, 1),
    (32, 64, 64, 1),
    (16, 128, 128, 1),
    (8, 256, 256, 1),
    (8, 512, 512, 2),
    (4, 512, 512, 1),
    (4, 512, 512, 2),
    (2, 512, 512, 1),
)


def xla(x: jax.Array, kernel: jax.Array, *, stride: int) -> jax.Array:
    """The convolution as `lax` has it."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def training_step(conv: Callable) -> Callable:
    """(x, kernel, dy) → the result and the gradients, compiled."""

    @jax.jit
    def step(x, kernel, dy):
        images = x.shape[-1] == 3
        y, gradients = jax.vjp(partial(conv, x), kernel) if images else jax.vjp(conv, x, kernel)
        return y, gradients(dy)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    set_up()
    rows = []
    for side, c, d, stride in LAYERS:
        after = -(-side // stride)
        shapes = ((arguments.batch, side, side, c), (3, 3, c, d))
        args = [jnp.ones(s) for s in (*shapes, (arguments.batch, after, after, d))]
        steps = {
            name: waited_for(training_step(partial(conv, stride=stride)), *args)
            for name, conv in (("ours", conv3x3), ("xla", xla))
        }
        ours, theirs = median_milliseconds(steps, arguments.rounds)
        rows.append(
            {
                "map": f"{side}x{side}x{c} to {d}, stride {stride}",
                "ours, ms": ours,
                "XLA, ms": theirs,
                "ratio": theirs / ours,
            }
        )
        print(f"{rows[-1]['map']}: {ours:.1f} ms, XLA {theirs:.1f} ms", flush=True)
    print(markdown_table(rows))


if __name__ == "__main__":
    main()

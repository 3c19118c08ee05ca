"""Training whose views grow: early steps at smaller, cheaper sizes (arXiv 2104.00298).

The parameters are those of the final size throughout. A step at a smaller size interpolates the
tables of positions on the way in, so the gradient comes back to the full tables through that
interpolation, and optimizer, moving average, checkpoints and evaluation know of one size only.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from coatnet_jax.allocator import give_back_freed_memory
from coatnet_jax.baselines.vit import adapt_positions
from coatnet_jax.coatnet import adapt_relative_bias


def check_sizes(sizes: Sequence[int], image_size: int, *, total_steps: int) -> None:
    """ValueError in one line where `sizes` do not grow, end elsewhere or are more than steps.

    Sizes are in pixels; none at all are right too, and mean `image_size` throughout.
    """
    if not sizes:
        return
    growing = all(a < b for a, b in zip(sizes[:-1], sizes[1:], strict=True))
    if not growing or sizes[-1] != image_size:
        raise ValueError(
            f"progressive {tuple(sizes)} must grow from size to size and end with "
            f"model.image_size, which is {image_size}: for instance "
            f"({round(image_size * 0.75)}, {image_size})"
        )
    if len(sizes) > total_steps:
        raise ValueError(
            f"progressive {tuple(sizes)} are {len(sizes)} sizes for a training of {total_steps} "
            "steps: give fewer sizes or more epochs"
        )


def size_at(step: int, sizes: Sequence[int], *, total_steps: int) -> int:
    """The size of the views of step `step` (from 0): every size has an equal share of the steps."""
    return sizes[min(step * len(sizes) // total_steps, len(sizes) - 1)]


def steps_before_last(sizes: Sequence[int], *, total_steps: int) -> int:
    """How many steps have views of another size than the last one."""
    return -(-total_steps * (len(sizes) - 1) // len(sizes)) if sizes else 0


def growing_step(
    make_step: Callable[[int], Callable], sizes: Sequence[int], *, total_steps: int, name: str
) -> Callable:
    """A train step that is `make_step(size)` of the size whose turn it is; each compiles once.

    The size follows from the state's own step, so a resumed run has the sizes of an unbroken one.
    The step is read from the device on the first call alone, and counted after that: reading it
    every time would have the host wait for each step.
    """
    steps = {size: make_step(size) for size in sizes}
    done, before = None, None

    def train_step(state: Any, batch: Any) -> Any:
        nonlocal done, before
        done = int(state.step) if done is None else done + 1
        size = size_at(done, sizes, total_steps=total_steps)
        if size != before:
            jax.block_until_ready(state)  # the arrays of the last step are free after it
            give_back_freed_memory()
            print(f"[{name}] step {done + 1}: views of {size} px from here", flush=True)
            before = size
        return steps[size](state, batch)

    return train_step


def params_for(
    params: dict[str, Any], images: Float[Array, "b h w 3"], *, model: nn.Module
) -> dict[str, Any]:
    """`params` with the backbone's tables of positions interpolated to the size of `images`.

    As when a backbone is loaded for another size, but inside the traced step. Raises ValueError
    where `model` cannot take images of that size.
    """
    like = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, *images.shape[1:])), train=False)
    )
    backbone = params["backbone"]
    for adapt in (adapt_relative_bias, adapt_positions):
        backbone = adapt(backbone, like["params"]["backbone"])
    return {**params, "backbone": backbone}

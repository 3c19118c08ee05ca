"""Optimizers: AdamW, SGD or LARS with a schedule, weight decay only where it belongs, layer-wise
learning rates (BEiT, arXiv 2106.08254) and frozen stages.

Everything is decided by the names in the parameter tree: `backbone/stem`, `backbone/stage2_block0`,
..., a last `backbone/*norm*`, and next to the backbone the heads (`head`, `projection`).
"""

import difflib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

Params = Any
OPTIMIZERS = ("adamw", "lars", "sgd")


def warmup_cosine(lr: float, *, total_steps: int, warmup_steps: int) -> optax.Schedule:
    """Linear from 0 to `lr` over `warmup_steps`, then half a cosine to 0 at `total_steps`."""
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps is {warmup_steps}, it must be below total_steps, which is {total_steps}"
        )
    return optax.warmup_cosine_decay_schedule(0.0, lr, warmup_steps, total_steps)


def decay_mask(params: Params) -> Params:
    """True for the kernels that weight decay and LARS adapt; False for biases, norms and
    tables of positions. The names count too, for blocks stacked along a leading axis."""

    def decays(path, leaf):
        names = _names(path)
        plain = leaf.ndim < 2 or names[-1] in ("bias", "scale", "position_embedding")
        return not (plain or any(name.startswith("relative_bias") for name in names))

    return jax.tree_util.tree_map_with_path(decays, params)


def layer_scales(params: Params, *, decay: float) -> Params:
    """The learning rate multiplier decay**depth of every leaf, as Python floats.

    Depth is 0 in the heads and the backbone's last norm, 1 in the last block of the last stage,
    one more for each block towards the input, and the most in the stem.

    Raises:
      ValueError: for a leaf of the backbone that is in no stage, stem or norm, by its full name.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    layers = {layer for path, _ in leaves if (layer := _layer(path)) not in (None, "norm")}
    order = sorted(layers, reverse=True)  # ("stage", 4, 1), ..., ("stage", 1, 0), ("stage", 0, 0)
    depth = {None: 0, "norm": 0} | {layer: i + 1 for i, layer in enumerate(order)}
    return jax.tree_util.tree_map_with_path(lambda path, _: decay ** depth[_layer(path)], params)


def freeze_mask(params: Params, train_from: str) -> Params:
    """True for the leaves that stay as they are.

    `train_from` 'full' freezes nothing, 'head' the whole backbone, and 'stage3' the stem and the
    stages below 3. Batch statistics are no parameters: keep a frozen backbone's with train=False.

    Raises:
      ValueError: for another `train_from`, with the choices these parameters give.
    """
    if train_from in ("full", "head"):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: train_from == "head" and _names(path)[0] == "backbone", params
        )
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    found = {int(m[1]) for path in paths if (m := _stage_name(path))}
    choices = ["full", "head", *(f"stage{stage}" for stage in sorted(found, reverse=True))]
    if train_from not in choices:
        raise ValueError(f"unknown train_from '{train_from}': choose from {', '.join(choices)}")
    first = int(train_from.removeprefix("stage"))

    def frozen(path, _):
        layer = _layer(path)
        return layer not in (None, "norm") and layer[0] < first

    return jax.tree_util.tree_map_with_path(frozen, params)


def hold_frozen(params: Params, train_from: str) -> Params:
    """`params` without gradients to the leaves that `freeze_mask` holds where they are: there is no
    backward pass through what lies before the first trained layer."""
    return jax.tree.map(
        lambda frozen, leaf: jax.lax.stop_gradient(leaf) if frozen else leaf,
        freeze_mask(params, train_from),
        params,
    )


def first_trained_stage(train_from: str) -> int:
    """The stage that training starts from: 0 (the stem) for 'full', 5 for 'head', 3 for 'stage3'.

    Raises ValueError for another `train_from`.
    """
    if train_from == "full":
        return 0
    if train_from == "head":
        return 5
    if match := re.fullmatch(r"stage([1-4])", train_from):
        return int(match[1])
    raise ValueError(f"unknown train_from '{train_from}': choose full, head, stage4, … or stage1")


def create_optimizer(
    params: Params,
    *,
    name: str = "adamw",
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    layer_decay: float = 1.0,
    train_from: str = "full",
    momentum: float = 0.9,
    b1: float = 0.9,
    b2: float = 0.999,
) -> optax.GradientTransformation:
    """The whole gradient transformation for these parameters.

    Args:
      params: gives the names and shapes; its values are not kept.
      name: 'adamw', 'lars' (arXiv 1708.03888, trust coefficient 0.001 as in SimCLR; norms, biases
        and bias tables are neither adapted nor decayed) or 'sgd' (with Nesterov off).
      weight_decay: on the leaves of `decay_mask` only; times the learning rate in every case.
      clip_norm: greatest global gradient norm over the trained leaves; None or 0 for no clipping.
      layer_decay: see `layer_scales`; 1 leaves all layers alike and takes any parameter names.
      train_from: see `freeze_mask`; frozen leaves get exactly zero updates and no memory.

    Raises:
      ValueError: for an unknown `name` or `train_from`, or unknown layers under `layer_decay`.
    """
    if name == "adamw":
        core = optax.adamw(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=decay_mask)
    elif name == "lars":
        core = optax.lars(
            learning_rate,
            weight_decay=weight_decay,
            weight_decay_mask=decay_mask,
            trust_ratio_mask=decay_mask,
            momentum=momentum,
        )
    elif name == "sgd":
        core = optax.chain(
            optax.add_decayed_weights(weight_decay, mask=decay_mask),
            optax.sgd(learning_rate, momentum=momentum),
        )
    else:
        near = difflib.get_close_matches(name, OPTIMIZERS)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(OPTIMIZERS)}"
        raise ValueError(f"unknown optimizer '{name}': {hint}")
    tx = optax.chain(optax.clip_by_global_norm(clip_norm), core) if clip_norm else core
    if train_from != "full":
        # Inside the partition the frozen leaves do not exist: no moments, no share in the norm.
        labels = jax.tree.map(
            lambda frozen: "frozen" if frozen else "trained", freeze_mask(params, train_from)
        )
        tx = optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, labels)
    if layer_decay != 1.0:
        tx = optax.chain(tx, _scale_each(layer_scales(params, decay=layer_decay)))
    return tx


def optimizer_with_traced_rates(
    create: Callable[..., optax.GradientTransformation],
    *,
    schedule: optax.Schedule,
    learning_rate: float,
    weight_decay: float,
) -> optax.GradientTransformation:
    """`create(learning_rate=, weight_decay=)` that keeps both numbers in its state.

    The learning rate is `learning_rate` times `schedule`, whose peak should be 1. Neither number is
    then a constant of the compiled step: trainings that differ in nothing else compile it once.
    """

    def make(peak, decay):
        return create(learning_rate=lambda step: peak * schedule(step), weight_decay=decay)

    return optax.inject_hyperparams(make)(peak=learning_rate, decay=weight_decay)


def _scale_each(scales: Params) -> optax.GradientTransformation:
    """Multiplies every update by its own constant; last in the chain, so it scales the step."""
    return optax.stateless(
        lambda updates, _: jax.tree.map(lambda u, s: u * jnp.asarray(s, u.dtype), updates, scales)
    )


def _names(path) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def _stage_name(path) -> re.Match | None:
    names = _names(path)
    in_backbone = names[0] == "backbone" and len(names) > 1
    return re.match(r"stage(\d+)(?:_blocks?(\d*))?$", names[1]) if in_backbone else None


def _layer(path) -> tuple[int, int] | str | None:
    """(stage, block) in the backbone, (0, 0) the stem, 'norm' the last norm, None for the heads."""
    names = _names(path)
    if names[0] != "backbone":
        return None
    if match := _stage_name(path):
        return int(match[1]), int(match[2] or 0)
    if len(names) > 1 and names[1].startswith("stem"):
        return 0, 0
    if len(names) > 1 and "norm" in names[1]:
        return "norm"
    raise ValueError(
        f"cannot tell the layer of parameter '{'/'.join(names)}': expected "
        "backbone/stem, backbone/stage<n>_block<m> or a backbone norm"
    )

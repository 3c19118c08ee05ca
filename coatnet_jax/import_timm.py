"""Weights of timm's CoAtNets as our variables, name by name; the layout is timm 1.0.31's.

The arrays that are wanted are those of our own model: each is asked for under the name and in the
shape that timm gives it, so that nothing can be missing or left over unnoticed.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from coatnet_jax.coatnet_rw import RW_VARIANTS
from coatnet_jax.heads import ClassifierModel
from coatnet_jax.models import create_backbone
from coatnet_jax.weight_files import nested

HEAD_DIM = 32  # of attention in all of timm's CoAtNets
# Our modules inside a block, the stem or the head -> timm's; what is not here has the same name.
MODULES = {
    "shortcut": "shortcut.expand",
    "expand": "conv1_1x1",
    "depthwise": "conv2_kxk",
    "project": "conv3_1x1",
    "se/reduce": "se.fc1",
    "se/expand": "se.fc2",
    "attention/qkv": "attn.qkv",
    "attention/out": "attn.proj",
    "attention": "attn.rel_pos",
    "attention/relative_bias_hidden": "attn.rel_pos.mlp.fc1",
    "attention/relative_bias_out": "attn.rel_pos.mlp.fc2",
    "layer_scale1": "ls1",
    "layer_scale2": "ls2",
    "mlp1": "mlp.fc1",
    "mlp2": "mlp.fc2",
    "hidden": "head.pre_logits.fc",
    "logits": "head.fc",
}
LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "mean": "running_mean",
    "var": "running_var",
    "relative_bias": "relative_position_bias_table",
}
# Of no use here: a count of steps, and an index that follows from the shape.
IGNORED = ("num_batches_tracked", "relative_position_index")


class Weight(NamedTuple):
    """One array of ours as timm has it: its name and shape there, and the way to our layout."""

    path: tuple[str, ...]
    name: str
    shape: tuple[int, ...]
    convert: Callable[[np.ndarray], np.ndarray]


def classifier(name: str, *, classes: int, **options: Any) -> ClassifierModel:
    """The backbone `name`, made with `options`, under the head that timm's model has."""
    backbone = create_backbone(name, **options)
    return ClassifierModel(backbone, classes, hidden=name not in RW_VARIANTS)


def import_timm(state: Mapping[str, np.ndarray], name: str) -> dict[str, Any]:
    """Returns {'params': {'backbone', 'head'}, 'batch_stats': {'backbone'}} of float32 arrays.

    They are those of `classifier(name, …)`; `state` is the `state_dict()` of timm's model of that
    name as NumPy arrays, for any square image size and number of classes. Raises ValueError where
    names or shapes are not those of the model, with both sides of up to four.
    """
    weights = expected_weights(name, image_size=image_size(state), classes=_classes(state))
    there = {key: tuple(value.shape) for key, value in state.items() if not key.endswith(IGNORED)}
    here = {weight.name: weight.shape for weight in weights}
    differing = [
        f"{key}: {there.get(key, 'missing')} there, {here.get(key, 'unknown')} in {name}"
        for key in sorted(here.keys() | there.keys())
        if there.get(key) != here.get(key)
    ]
    if differing:
        more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise ValueError(
            f"these are not the weights of timm's {name}: {'; '.join(differing[:4])}{more}"
        )
    arrays = {w.path: w.convert(np.asarray(state[w.name], np.float32)) for w in weights}
    # Copies: torch changes its own.
    return nested({path: np.array(array, order="C") for path, array in arrays.items()})


def expected_weights(name: str, *, image_size: int = 224, classes: int = 1000) -> list[Weight]:
    """What timm's model of this name holds, in the order of our variables."""
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    model = classifier(name, classes=classes)
    made = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    leaves = jax.tree.leaves_with_path(made)
    return [_weight(tuple(key.key for key in path), leaf.shape, name) for path, leaf in leaves]


def image_size(state: Mapping[str, np.ndarray], *, otherwise: int = 224) -> int:
    """Side in pixels of the images that a model with relative bias tables was made for.

    One without tables fits any size: `otherwise`. Raises ValueError where it was no square.
    """
    table = state.get("stages.2.blocks.0.attn.rel_pos.relative_position_bias_table")
    if table is None:
        return otherwise
    side = round(len(table) ** 0.5)
    if side * side != len(table) or side % 2 == 0:
        raise ValueError(
            f"{len(table)} relative positions in stages.2 are not those of a square image, and "
            "only weights for square images can be imported"
        )
    return (side + 1) // 2 * 16


def _classes(state):
    return len(state["head.fc.weight"]) if "head.fc.weight" in state else 1000


def _weight(path, shape, model):
    """The `Weight` for our array at `path`: (collection, 'backbone' or 'head', modules …, leaf)."""
    _, part, *modules, leaf = path
    place = ""
    if part == "backbone" and modules != ["norm"]:
        block, *modules = modules
        found = re.fullmatch(r"stage(\d)_block(\d+)", block)
        place = f"stages.{int(found[1]) - 1}.blocks.{found[2]}." if found else f"{block}."
    ours = "/".join(modules)
    theirs = place + MODULES.get(ours, ours)
    rw = model in RW_VARIANTS
    if part == "backbone" and not place and not rw:
        theirs = "head.norm"
    if rw and RW_VARIANTS[model].se_early:
        theirs = theirs.replace(".se.", ".se_early.")
    if re.fullmatch(r"stages\.[23]\.blocks\.0\.norm1", theirs):
        theirs += ".norm"  # the norm and the pooling after it
    leaf_there = "gamma" if ours.startswith("layer_scale") else LEAVES.get(leaf, leaf)
    shape_there, convert = _layout(ours, leaf, tuple(shape))
    return Weight(path, f"{theirs}.{leaf_there}", shape_there, convert)


def _layout(module, leaf, shape):
    """timm's shape of an array and the function that brings it into ours."""
    if module == "attention/qkv":
        # timm's rows are (head, q/k/v, channel); ours are (q/k/v, head, channel).
        rest = (shape[0], 1, 1) if leaf == "kernel" else ()
        return (shape[-1], *rest), lambda value: _heads_last(value).reshape(shape[::-1]).T
    if leaf != "kernel":
        return shape, lambda value: value
    if module == "depthwise":
        return (shape[2], 1, 3, 3), lambda value: value[:, 0].transpose(1, 2, 0)
    if len(shape) == 4:
        return (shape[3], shape[2], 3, 3), lambda value: value.transpose(2, 3, 1, 0)
    dense = module in ("hidden", "logits") or "relative_bias" in module
    return (
        shape[1],
        shape[0],
        *(() if dense else (1, 1)),
    ), lambda value: value.reshape(shape[::-1]).T


def _heads_last(value):
    heads = len(value) // (3 * HEAD_DIM)
    return value.reshape(heads, 3, HEAD_DIM, -1).swapaxes(0, 1)

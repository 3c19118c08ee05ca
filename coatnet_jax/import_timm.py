"""Turns weights of timm's `coatnet_0_224` … `coatnet_3_224` into our variables.

The layout is that of timm 1.0.31 `maxxvit.py`. timm's `_rw` and `rmlp` models are other networks
(expansion from the input, another attention width) and are not meant here.
"""

import re

import numpy as np

# timm's name inside a block, the stem or the head -> our path there.
MODULES = {
    "conv1": ("conv1",),
    "conv2": ("conv2",),
    "shortcut.expand": ("shortcut",),
    "pre_norm": ("pre_norm",),
    "norm1": ("norm1",),
    "norm1.norm": ("norm1",),
    "norm2": ("norm2",),
    "conv1_1x1": ("expand",),
    "conv2_kxk": ("depthwise",),
    "conv3_1x1": ("project",),
    "se.fc1": ("se", "reduce"),
    "se.fc2": ("se", "expand"),
    "attn.qkv": ("attention", "qkv"),
    "attn.rel_pos": ("attention",),
    "attn.proj": ("attention", "out"),
    "mlp.fc1": ("mlp1",),
    "mlp.fc2": ("mlp2",),
}
WHOLE_MODULES = {
    "head.norm": ("backbone", "norm"),
    "head.pre_logits.fc": ("head", "hidden"),
    "head.fc": ("head", "logits"),
}
STATISTICS = {"running_mean": "mean", "running_var": "var"}


def import_timm(state: dict[str, np.ndarray]) -> dict:
    """Returns {'params': {'backbone', 'head'}, 'batch_stats': {'backbone'}} of float32 arrays.

    `state` is the model's `state_dict()` as NumPy arrays; `head` is a `ClassifierHead`. Raises
    ValueError for a name that such a model does not have.
    """
    variables = {"params": {}, "batch_stats": {}}
    for name, value in state.items():
        module, leaf = name.rsplit(".", 1)
        if leaf == "num_batches_tracked" or leaf == "relative_position_index":
            continue
        value = np.asarray(value, np.float32)
        if module.endswith("attn.qkv"):
            table = f"{module.removesuffix('qkv')}rel_pos.relative_position_bias_table"
            value = _heads_last(value, heads=state[table].shape[1])
        path = _path(module, name)
        collection, leaf, value = _leaf(leaf, value, depthwise=path[-1] == "depthwise")
        tree = variables[collection]
        for key in path:
            tree = tree.setdefault(key, {})
        tree[leaf] = value
    return variables


def _path(module, name):
    if module in WHOLE_MODULES:
        return WHOLE_MODULES[module]
    block = re.fullmatch(r"(?:stem|stages\.(\d)\.blocks\.(\d+))\.(.+)", module)
    if block is None or block[3] not in MODULES:
        raise ValueError(f"{name} is no weight of timm's coatnet_0_224 … coatnet_3_224")
    place = "stem" if block[1] is None else f"stage{int(block[1]) + 1}_block{block[2]}"
    return ("backbone", place, *MODULES[block[3]])


def _heads_last(value, heads):
    """timm's rows are (head, q/k/v, channel); ours are (q/k/v, head, channel)."""
    return value.reshape(heads, 3, -1, *value.shape[1:]).swapaxes(0, 1).reshape(value.shape)


def _leaf(leaf, value, depthwise):
    """The collection, name and layout that a timm array has with us."""
    if leaf in STATISTICS:
        return "batch_stats", STATISTICS[leaf], value
    if leaf == "relative_position_bias_table":
        return "params", "relative_bias", value
    if leaf == "bias":
        return "params", "bias", value
    if value.ndim == 1:
        return "params", "scale", value
    if depthwise:
        return "params", "kernel", value[:, 0].transpose(1, 2, 0)
    if value.ndim == 4 and value.shape[2:] == (3, 3):
        return "params", "kernel", value.transpose(2, 3, 1, 0)
    return "params", "kernel", value.reshape(value.shape[:2]).T

"""timm's baselines with random weights, copied, against ours: the same features."""

import re

import jax
import numpy as np
import pytest

from coatnet_jax.models import create_backbone

# timm's name, ours, and a height and width, odd where the model takes them.
MODELS = [
    ("resnet18", "resnet18", (65, 48)),
    ("resnet50", "resnet50", (65, 48)),
    ("mobilenetv2_100", "mobilenet_v2", (65, 48)),
    ("efficientnet_b0", "efficientnet_b0", (65, 48)),
    ("vit_small_patch16_224", "vit_s16", (64, 48)),
]
LEAVES = {"running_mean": "mean", "running_var": "var"}
RESNET = {"downsample.0": "shortcut/conv", "downsample.1": "shortcut/norm"}
INVERTED_RESIDUAL = {
    **{"conv_pw": "expand", "bn1": "expand_norm", "conv_dw": "depthwise", "bn2": "depthwise_norm"},
    **{"conv_pwl": "project", "bn3": "project_norm"},
    **{"se.conv_reduce": "se/reduce", "se.conv_expand": "se/expand"},
}
SEPARABLE = INVERTED_RESIDUAL | {
    **{"bn1": "depthwise_norm", "conv_pw": "project", "bn2": "project_norm"}
}
VIT = {"attn.qkv": "attention/qkv", "attn.proj": "attention/out", "mlp.fc1": "mlp1"}
VIT |= {"mlp.fc2": "mlp2", "norm1": "norm1", "norm2": "norm2"}
# Blocks of our stages, from timm's stages of a mobile net: (stage, first block).
MOBILE = [(1, 0), (1, 1), (2, 0), (3, 0), (3, None), (4, 0), (4, None)]


def resnet_module(module, leaf, state):
    stem = {"conv1": "stem/conv", "bn1": "stem/norm"}
    if module in stem:
        return stem[module]
    stage, n, name = re.fullmatch(r"layer(\d)\.(\d+)\.(.+)", module).groups()
    return f"stage{stage}_block{n}/{RESNET.get(name, name.replace('bn', 'norm'))}"


def mobile_module(module, leaf, state):
    last = {"conv_head": "stage4_block{}/conv", "bn2": "stage4_block{}/norm"}
    if module in ("conv_stem", "bn1"):
        return "stem/conv" if module == "conv_stem" else "stem/norm"
    depths = {}
    for found in (re.match(r"blocks\.(\d)\.(\d+)\.", name) for name in state):
        if found:
            depths[int(found[1])] = max(depths.get(int(found[1]), 0), int(found[2]) + 1)
    if module in last:
        return last[module].format(depths[5] + depths[6])
    row, n, name = re.fullmatch(r"blocks\.(\d)\.(\d+)\.(.+)", module).groups()
    stage, first = MOBILE[int(row)]
    first = depths[int(row) - 1] if first is None else first
    table = SEPARABLE if row == "0" else INVERTED_RESIDUAL
    return f"stage{stage}_block{first + int(n)}/{table[name]}"


def vit_module(module, leaf, state):
    whole = {"patch_embed.proj": "stem/patches", "norm": "norm", "": "stem"}
    if module in whole:
        return whole[module]
    layer, name = re.fullmatch(r"blocks\.(\d+)\.(.+)", module).groups()
    return f"stage{int(layer) // 3 + 1}_block{int(layer) % 3}/{VIT[name]}"


def converted(state, like, to_module):
    """timm's arrays under our names, in the shapes of `like`."""
    variables = {"params": {}, "batch_stats": {}}
    for name, value in state.items():
        module, _, leaf = name.rpartition(".")
        if module in ("fc", "classifier", "head") or leaf == "num_batches_tracked":
            continue
        path = to_module(module, leaf, state)
        collection = "batch_stats" if leaf in LEAVES else "params"
        if leaf == "weight":
            leaf = "scale" if value.ndim == 1 else "kernel"
        special = {"cls_token": "class_token", "pos_embed": "position_embedding"}
        leaf = special.get(leaf, LEAVES.get(leaf, leaf))
        tree = variables[collection]
        for key in path.split("/"):
            tree = tree.setdefault(key, {})
        if leaf == "kernel" and value.ndim == 4:  # out, in, rows, columns
            value = value.transpose(2, 3, 1, 0)
        elif leaf == "kernel":
            value = value.T
        tree[leaf] = value
    shapes = jax.tree.map(lambda a: a.shape, like)
    # 1x1 kernels, patches and depthwise kernels have other axes with us, in the same order.
    return jax.tree.map(lambda value, shape: value.reshape(shape), variables, shapes)


def randomise(model, torch):
    """Random norms, statistics, biases, tokens and positions; kernels are random as they are."""
    generator = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        if value.ndim == 1 and name.endswith(("weight", "running_var")):
            last = name.startswith("layer") and name.endswith("bn3.weight")
            # Where branches are added to shortcuts sixteen times, each has to be small.
            value.uniform_(0.5, 1.5, generator=generator).mul_(0.3 if last else 1.0)
        elif value.ndim == 1 or name in ("cls_token", "pos_embed"):
            value.normal_(0, 0.1, generator=generator)


@pytest.mark.parametrize("theirs, name, hw", MODELS)
def test_features_are_timms(timm, theirs, name, hw):
    import torch

    options = {"img_size": hw} if name.startswith("vit") else {}
    torch.manual_seed(0)
    model = timm.create_model(theirs, **options).eval()
    randomise(model, torch)
    images = np.random.default_rng(0).normal(size=(2, *hw, 3)).astype(np.float32)
    with torch.no_grad():
        last = model.forward_features(torch.tensor(images.transpose(0, 3, 1, 2)))
        expected = model.forward_head(last, pre_logits=True).numpy()
    last = last.numpy()

    backbone = create_backbone(name)
    like = jax.eval_shape(lambda x: backbone.init(jax.random.key(0), x, train=False), images)
    like = {"batch_stats": {}, **like}
    kinds = {"resnet": resnet_module, "vit": vit_module}
    to_module = next((f for kind, f in kinds.items() if name.startswith(kind)), mobile_module)
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    variables = converted(state, like, to_module)

    @jax.jit
    def apply(variables, images):
        return backbone.apply(variables, images, train=False, return_map=True)

    features, feature_map = apply(variables, images)
    print(f"{name}: std {expected.std():.3f} max |Δ| {np.abs(features - expected).max():.1e}")
    np.testing.assert_allclose(features, expected, atol=1e-4 * min(1, expected.std()))
    if name.startswith("vit"):
        feature_map, last = feature_map.reshape(2, -1, 384), last[:, 1:]
    else:
        last = last.transpose(0, 2, 3, 1)
    np.testing.assert_allclose(feature_map, last, atol=1e-4 * max(1, np.abs(last).max()))

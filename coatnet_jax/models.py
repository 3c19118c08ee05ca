"""Backbones by name, as the configs and the command line know them."""

import dataclasses
import difflib
import functools
from collections.abc import Callable

import flax.linen as nn

from coatnet_jax.baselines import inverted_residual, resnet, vit
from coatnet_jax.baselines.simple_cnn import SimpleCNN
from coatnet_jax.coatnet import VARIANTS, CoAtNet
from coatnet_jax.coatnet_rw import RW_VARIANTS

# Baselines: name -> (constructor, source). The CoAtNets are in `VARIANTS` and `RW_VARIANTS`.
BASELINES = {
    "simple_cnn": (SimpleCNN, "tutorials, no paper"),
    **{
        name: (functools.partial(resnet.ResNet, config), "He et al. 2015, arXiv 1512.03385")
        for name, config in resnet.VARIANTS.items()
    },
    "efficientnet_b0": (
        functools.partial(
            inverted_residual.InvertedResidualNet, inverted_residual.VARIANTS["efficientnet_b0"]
        ),
        "Tan and Le 2019, arXiv 1905.11946",
    ),
    "mobilenet_v2": (
        functools.partial(
            inverted_residual.InvertedResidualNet, inverted_residual.VARIANTS["mobilenet_v2"]
        ),
        "Sandler et al. 2018, arXiv 1801.04381",
    ),
    "vit_s16": (
        functools.partial(vit.ViT, vit.VARIANTS["vit_s16"]),
        "Dosovitskiy et al. 2020, arXiv 2010.11929; small: Touvron et al. 2020, arXiv 2012.12877",
    ),
}
BACKBONES = (*VARIANTS, *RW_VARIANTS, *BASELINES)


def create_backbone(
    name: str, *, drop_path: float = 0.0, dtype: str = "float32", **options
) -> nn.Module:
    """Makes the backbone `name`: images [b, h, w, 3] to float32 features [b, D].

    `options` are further attributes of the module (of CoAtNet `remat`, `scan`, `attention` and
    `frozen_below`). Raises ValueError for a name or an option that does not exist, with the nearest
    names.
    """
    make = _constructor(name)
    known = _options(make)
    for option in options:
        if option not in known:
            raise ValueError(f"{name} has no option {option!r}; it has: {', '.join(known)}")
    return make(drop_path=drop_path, dtype=dtype, **options)


def has_option(name: str, option: str) -> bool:
    """Whether `create_backbone` takes the option for this backbone; raises ValueError as above."""
    return option in _options(_constructor(name))


def source(name: str) -> str:
    """Where the backbone `name` was published, in a few words; raises ValueError as above."""
    _constructor(name)
    if name in BASELINES:
        return BASELINES[name][1]
    paper = "Dai et al. 2021, arXiv 2106.04803"
    if name in ("coatnet_micro", "coatnet_atto"):
        return f"this project, after {paper}"
    return f"timm, after {paper}" if name in RW_VARIANTS else paper


def _constructor(name: str) -> Callable[..., nn.Module]:
    if name in VARIANTS:
        return functools.partial(CoAtNet, VARIANTS[name])
    if name in RW_VARIANTS:
        return functools.partial(CoAtNet, RW_VARIANTS[name])
    if name in BASELINES:
        return BASELINES[name][0]
    near = difflib.get_close_matches(name, BACKBONES, n=3) or BACKBONES
    raise ValueError(f"no backbone is called {name!r}; near: {', '.join(near)}")


def _options(make: Callable) -> list[str]:
    """Attributes of the module besides those that every backbone has or Flax adds."""
    module = getattr(make, "func", make)
    given = ("config", "drop_path", "dtype", "parent", "name")
    return [field.name for field in dataclasses.fields(module) if field.name not in given]

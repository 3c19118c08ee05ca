"""Backbones by name, as the configs and the command line know them."""

import difflib

import flax.linen as nn

from coatnet_jax.coatnet import VARIANTS, CoAtNet
from coatnet_jax.coatnet_rw import RW_VARIANTS

BACKBONES = (*VARIANTS, *RW_VARIANTS)


def create_backbone(
    name: str, *, drop_path: float = 0.0, dtype: str = "float32", **options
) -> nn.Module:
    """Makes the backbone `name`: images [b, h, w, 3] to float32 features [b, D].

    `options` are further attributes of the module (of CoAtNet `remat` and `frozen_below`). Raises
    ValueError for a name or an option that does not exist, with the nearest names.
    """
    if name not in BACKBONES:
        near = difflib.get_close_matches(name, BACKBONES, n=3) or BACKBONES
        raise ValueError(f"no backbone is called {name!r}; near: {', '.join(near)}")
    known = ("remat", "frozen_below")
    for option in options:
        if option not in known:
            raise ValueError(f"{name} has no option {option!r}; it has: {', '.join(known)}")
    config = VARIANTS[name] if name in VARIANTS else RW_VARIANTS[name]
    return CoAtNet(config, drop_path=drop_path, dtype=dtype, **options)

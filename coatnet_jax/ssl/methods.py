"""The methods of pre-training by name."""

import dataclasses

import ml_collections
from flax import linen as nn

from coatnet_jax.heads import SiameseModel
from coatnet_jax.ssl.barlow_twins import BarlowTwins
from coatnet_jax.ssl.byol import BYOL
from coatnet_jax.ssl.dino import DINO
from coatnet_jax.ssl.method import Method
from coatnet_jax.ssl.rank_n_contrast import RankNContrast
from coatnet_jax.ssl.simclr import SimCLR
from coatnet_jax.ssl.simsiam import SimSiam
from coatnet_jax.ssl.supcon import SupCon
from coatnet_jax.ssl.vicreg import VICReg

METHODS: dict[str, type[Method]] = {
    "simclr": SimCLR,
    "byol": BYOL,
    "barlow_twins": BarlowTwins,
    "vicreg": VICReg,
    "simsiam": SimSiam,
    "dino": DINO,
    "supcon": SupCon,
    "rank_n_contrast": RankNContrast,
}


def create_method(config: ml_collections.ConfigDict) -> Method:
    """The method of a pre-training config; SimCLR where the config is older than that key.

    Raises ValueError for another name, or a `config.loss` that is of another method.
    """
    name = config.get("method", "simclr")
    if name not in METHODS:
        raise ValueError(f"unknown method '{name}': choose from {', '.join(METHODS)}")
    options = config.loss.to_dict()
    fields = {field.name for field in dataclasses.fields(METHODS[name])}
    if strange := sorted(options.keys() - fields):
        raise ValueError(
            f"config.loss has {', '.join(strange)}, which {name} has not: choose a method by its "
            f"word, as in --config=pretrain:micro,{name}"
        )
    return METHODS[name](**options)


def create_siamese(config: ml_collections.ConfigDict, backbone: nn.Module) -> SiameseModel:
    """`backbone` with the heads of the config's method."""
    parts = {key: config.get(key, {}) for key in ("projection", "prediction")}
    return create_method(config).model(
        backbone, **{key: dict(part.items()) for key, part in parts.items()}
    )

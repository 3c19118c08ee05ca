"""BYOL (arXiv 2006.07733): predict what a slower copy of the network says of the other view."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from coatnet_jax.heads import ProjectionHead, SiameseModel
from coatnet_jax.ssl.method import Method, other_views
from coatnet_jax.ssl.nt_xent import unit_length


@dataclass(frozen=True)
class BYOL(Method):
    """No negatives: the moving average and the prediction head keep the features from collapsing.

    `momentum` is the first one (the authors' code: 0.99 for 100 epochs, 0.996 for 1,000).
    """

    has_target: ClassVar[bool] = True

    momentum: float = 0.99

    def model(self, backbone, *, projection, prediction):
        """Projection and prediction are MLPs that end in a linear layer."""
        return SiameseModel(
            backbone,
            ProjectionHead(**projection, last_norm=False),
            ProjectionHead(**prediction, out=projection["out"], last_norm=False),
        )

    def loss(self, online, target, *, age, memory):
        """The squared distance of unit vectors, 2 - 2 cos, summed over both directions."""
        towards = jax.lax.stop_gradient(unit_length(other_views(target["z"])))
        cosine = jnp.sum(unit_length(online["p"]) * towards, axis=-1)
        return 2 * jnp.mean(2 - 2 * cosine), {"cosine": jnp.mean(cosine)}, memory

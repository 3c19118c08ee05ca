"""SimSiam (arXiv 2011.10566): BYOL without the slower copy; a stopped gradient is enough."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from coatnet_jax.heads import ProjectionHead, SiameseModel
from coatnet_jax.ssl.method import Method, other_views
from coatnet_jax.ssl.nt_xent import unit_length


@dataclass(frozen=True)
class SimSiam(Method):
    """The prediction head is a bottleneck: its hidden layer is narrower than the projection (in
    the paper a quarter of it)."""

    def model(self, backbone, *, projection, prediction):
        """The projection ends in BatchNorm without parameters, the prediction in a linear layer."""
        return SiameseModel(
            backbone,
            ProjectionHead(**projection),
            ProjectionHead(**prediction, out=projection["out"], last_norm=False),
        )

    def loss(self, online, target, *, age, memory):
        """Minus the cosine to the other view's projection, which gets no gradient."""
        towards = jax.lax.stop_gradient(unit_length(other_views(online["z"])))
        cosine = jnp.mean(jnp.sum(unit_length(online["p"]) * towards, axis=-1))
        return -cosine, {"cosine": cosine}, memory

"""VICReg (arXiv 2105.04906): views agree, every dimension varies, no two vary together."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from coatnet_jax.heads import ProjectionHead, SiameseModel
from coatnet_jax.ssl.method import Method


@dataclass(frozen=True)
class VICReg(Method):
    """The weights of the three terms; the defaults are the paper's."""

    invariance: float = 25.0
    variance: float = 25.0
    covariance: float = 1.0

    def model(self, backbone, *, projection, prediction):
        """The projection (the paper's expander) ends in a linear layer."""
        return SiameseModel(backbone, ProjectionHead(**projection, last_norm=False))

    def loss(self, online, target, *, age, memory):
        """Equation 6. The variance term is the mean of the two views, as in the authors' code."""
        views = jnp.split(online["z"].astype(jnp.float32), 2)
        metrics = {
            "invariance": jnp.mean((views[0] - views[1]) ** 2),
            "variance": sum(variance_hinge(z) for z in views) / 2,
            "covariance": sum(covariance(z) for z in views),
        }
        loss = sum(getattr(self, name) * term for name, term in metrics.items())
        return loss, metrics, memory


def variance_hinge(z):
    """How far the standard deviations of the columns of [b, d] lie below 1, on average."""
    return jnp.mean(jax.nn.relu(1 - jnp.sqrt(z.var(0, ddof=1) + 1e-4)))


def covariance(z):
    """The squared covariances between different columns of [b, d], summed, over d."""
    b, width = z.shape
    z = z - z.mean(0)
    matrix = jnp.matmul(z.T, z, precision=jax.lax.Precision.HIGHEST) / (b - 1)
    return jnp.sum(jnp.where(jnp.eye(width, dtype=bool), 0, matrix**2)) / width

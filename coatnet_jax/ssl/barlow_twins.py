"""Barlow Twins (arXiv 2103.03230): the cross-correlation of the two views shall be the identity."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from coatnet_jax.heads import ProjectionHead, SiameseModel
from coatnet_jax.ssl.method import Method


@dataclass(frozen=True)
class BarlowTwins(Method):
    """`redundancy` weighs the terms off the diagonal (lambda in the paper: 0.005)."""

    redundancy: float = 0.005

    def model(self, backbone, *, projection, prediction):
        """The projection ends in a linear layer; the loss standardises its output."""
        return SiameseModel(backbone, ProjectionHead(**projection, last_norm=False))

    def loss(self, online, target, *, age, memory):
        """Equation 1: the squared distance of the diagonal from 1, and of the rest from 0."""
        first, second = jnp.split(online["z"].astype(jnp.float32), 2)
        b, width = first.shape
        correlation = (
            jnp.matmul(_standard(first).T, _standard(second), precision=jax.lax.Precision.HIGHEST)
            / b
        )
        itself = jnp.eye(width, dtype=bool)
        invariance = jnp.sum(jnp.where(itself, (1 - correlation) ** 2, 0))
        redundancy = jnp.sum(jnp.where(itself, 0, correlation**2))
        metrics = {"invariance": invariance, "redundancy": redundancy}
        return invariance + self.redundancy * redundancy, metrics, memory


def _standard(z):
    """Columns of mean 0 and standard deviation 1 over the batch."""
    return (z - z.mean(0)) * jax.lax.rsqrt(z.var(0) + 1e-5)

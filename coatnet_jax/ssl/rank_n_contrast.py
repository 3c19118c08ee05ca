"""Rank-N-Contrast (arXiv 2210.01189): distances between features in the order of those in age.

It is told the ages: a ceiling, no self-supervision.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Real

from coatnet_jax.heads import ProjectionHead, SiameseModel
from coatnet_jax.ssl.method import Method


@dataclass(frozen=True)
class RankNContrast(Method):
    """`temperature` 2 is the paper's, which has no projection: `projection.layers` is 0."""

    labelled: ClassVar[bool] = True

    temperature: float = 2.0

    def model(self, backbone, *, projection, prediction):
        """The backbone, with a projection that ends in a linear layer where one is asked for."""
        if projection["layers"] == 0:
            return SiameseModel(backbone, None)
        return SiameseModel(backbone, ProjectionHead(**projection, last_norm=False))

    def loss(self, online, target, *, age, memory):
        """See `rank_n_contrast`."""
        labels = jnp.tile(age, 2)
        return rank_n_contrast(online["z"], labels, temperature=self.temperature), {}, memory


def rank_n_contrast(
    z: Float[Array, "n d"], labels: Real[Array, "n"], *, temperature: float
) -> Float[Array, ""]:
    """Equation 2 with minus the Euclidean distance as similarity, over all ordered pairs.

    The negatives of a pair (i, j) are the rows at least as far from i in label as j is. The rows
    are sorted by that distance, so the sums of all pairs take [n, n] memory and not its n-fold.
    """
    n = len(z)
    itself = jnp.eye(n, dtype=bool)
    logits = -pairwise_distance(z.astype(jnp.float32)) / temperature
    apart = jnp.abs(labels[:, None] - labels).astype(jnp.float32)

    def of_row(logits, apart, itself):
        # Farthest first, and the row itself last, as a term of nothing.
        order = jnp.argsort(jnp.where(itself, 1.0, -apart))
        sums = jax.lax.cumlogsumexp(jnp.where(itself, -1e30, logits)[order])
        # Equally far rows are negatives of each other: all take the sum that ends with them.
        last = jnp.searchsorted(-apart[order][:-1], -apart, side="right") - 1
        return jnp.sum(jnp.where(itself, 0, sums[last] - logits))

    return jnp.sum(jax.vmap(of_row)(logits, apart, itself)) / (n * (n - 1))


def pairwise_distance(z: Float[Array, "n d"]) -> Float[Array, "n n"]:
    """Euclidean distances of rows, with gradient 0 where two rows are the same."""
    product = jnp.matmul(z, z.T, precision=jax.lax.Precision.HIGHEST)
    length = jnp.sum(z * z, axis=-1)
    squared = jnp.maximum(length[:, None] + length - 2 * product, 0)
    apart = squared > 1e-9
    return jnp.where(apart, jnp.sqrt(jnp.where(apart, squared, 1.0)), 0.0)

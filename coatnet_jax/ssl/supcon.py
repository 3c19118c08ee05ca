"""SupCon (arXiv 2004.11362): SimCLR that is told the ages. A ceiling, no self-supervision."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Real

from coatnet_jax.ssl.method import Method
from coatnet_jax.ssl.nt_xent import unit_length


@dataclass(frozen=True)
class SupCon(Method):
    """Faces of the same `years` of age (0-4, 5-9, … for 5) are positives of each other."""

    labelled: ClassVar[bool] = True

    temperature: float = 0.1
    years: int = 5

    def loss(self, online, target, *, age, memory):
        """See `supervised_contrastive`."""
        labels = jnp.tile(age // self.years, 2)
        loss = supervised_contrastive(online["z"], labels, temperature=self.temperature)
        return loss, {}, memory


def supervised_contrastive(
    z: Float[Array, "n d"], labels: Real[Array, "n"], *, temperature: float
) -> Float[Array, ""]:
    """Equation 2, L_out: over each row's positives, the mean of NT-Xent's term.

    With labels that only the two views of an image share it is NT-Xent. A row without another of
    its label counts 0. Memory is [n, n], in float32.
    """
    z = unit_length(z)
    itself = jnp.eye(len(z), dtype=bool)
    logits = jnp.matmul(z, z.T, precision=jax.lax.Precision.HIGHEST) / temperature
    normaliser = jax.nn.logsumexp(jnp.where(itself, -jnp.inf, logits), axis=-1, keepdims=True)
    positive = (labels[:, None] == labels) & ~itself
    count = jnp.maximum(jnp.sum(positive, axis=-1), 1)
    return jnp.mean(jnp.sum(jnp.where(positive, normaliser - logits, 0), axis=-1) / count)

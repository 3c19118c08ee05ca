"""Losses: NT-Xent for contrastive pretraining (SimCLR) and cross-entropy of classes.

The losses of an age are in `age_losses`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def nt_xent(
    z: Float[Array, "2b d"], *, temperature: float, decoupled: bool = False
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The normalised temperature-scaled cross-entropy of two views, SimCLR (arXiv 2002.05709).

    Rows i and i + b are the two views of one image; every other row is a negative. Under `jax.jit`
    over global arrays this is the loss over the global batch. Memory is [2b, 2b], in float32.

    Args:
      z: projections of any length; they are L2-normalised here.
      temperature: divides the cosine similarities.
      decoupled: leave the positive out of the denominator (DCL, arXiv 2110.06848).

    Returns:
      The mean loss, and `contrastive_top1`: how often a row's most similar row is its other view.

    Raises:
      ValueError: for an odd number of rows, or fewer than two images.
    """
    rows = z.shape[0]
    if rows % 2 or rows < 4:
        raise ValueError(f"nt_xent needs two views of at least 2 images, z has {rows} rows")
    z = z.astype(jnp.float32)
    z = z * jax.lax.rsqrt(jnp.maximum(jnp.sum(z * z, axis=-1, keepdims=True), 1e-12))
    similarity = jnp.matmul(z, z.T, precision=jax.lax.Precision.HIGHEST)
    itself = jnp.arange(rows)
    partner = (itself + rows // 2) % rows
    similarity = jnp.where(itself[:, None] == itself, -jnp.inf, similarity)
    positive = jnp.sum(z * jnp.roll(z, rows // 2, axis=0), axis=-1) / temperature
    logits = similarity / temperature
    if decoupled:
        logits = jnp.where(partner[:, None] == itself, -jnp.inf, logits)
    loss = jnp.mean(jax.nn.logsumexp(logits, axis=-1) - positive)
    top1 = jnp.mean(jnp.argmax(similarity, axis=-1) == partner)
    return loss, {"contrastive_top1": top1}


def cross_entropy(logits: Float[Array, "b k"], target: Float[Array, "b k"]) -> Float[Array, "b"]:
    """-sum target log p. Serves any number of classes; a target row of zeros counts for nothing."""
    return -jnp.sum(target * jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)


def balanced_weights(labels: Int[np.ndarray, "n"], classes: int) -> tuple[float, ...]:
    """For each class n / (classes that occur * its labels), 0 where it has none.

    Every class that occurs then weighs the same in total, and a label weighs 1 on average. Labels
    below zero are unknown and left out.
    """
    labels = np.asarray(labels)
    count = np.bincount(labels[labels >= 0], minlength=classes)
    weights = count.sum() / (max(1, np.count_nonzero(count)) * np.maximum(count, 1))
    return tuple(np.where(count > 0, weights, 0.0).tolist())

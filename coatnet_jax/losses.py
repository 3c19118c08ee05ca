"""Cross-entropy of classes, and weights that balance them.

The losses of an age are in `age_losses`, those of pre-training in `ssl`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


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

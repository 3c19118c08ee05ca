"""Losses: NT-Xent for contrastive pretraining (SimCLR) and losses on a distribution over ages.

The age losses take logits and a target *distribution* over ages 0-116, so that blurred, one-hot
and mixed labels are all treated alike, and give one value an example.
"""

import difflib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Real

from coatnet_jax.ages import N_AGES, expected_age


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


def age_distribution(age: Real[Array, "b"], *, sigma: float) -> Float[Array, "b 117"]:
    """Labels as a Gaussian of `sigma` years around each age, summing to one over ages 0-116.

    `sigma` 0 gives one-hot rows. Near age 0 the Gaussian is cut off and renormalised (as in
    DLDL-v2), so such a label lies above the age: mean 1.8, median 1.6 at age 1 with sigma 2.
    """
    if sigma < 0:
        raise ValueError(f"sigma is {sigma} years, it must be 0 (one-hot) or more")
    age = jnp.asarray(age)
    if sigma == 0:
        return jax.nn.one_hot(jnp.round(age).astype(jnp.int32), N_AGES)
    years = jnp.arange(N_AGES, dtype=jnp.float32)
    return jax.nn.softmax(-0.5 * ((years - age[:, None]) / sigma) ** 2, axis=-1)


def cross_entropy(logits: Float[Array, "b k"], target: Float[Array, "b k"]) -> Float[Array, "b"]:
    """-sum target log p. Serves any number of classes; a target row of zeros counts for nothing."""
    return -jnp.sum(target * jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)


def kl_l1(logits: Float[Array, "b 117"], target: Float[Array, "b 117"]) -> Float[Array, "b"]:
    """KL(target || p) + |mean of p - mean of target| in years: DLDL-v2 (IJCAI 2018), weight 1."""
    logits = logits.astype(jnp.float32)
    kl = cross_entropy(logits, target) - jnp.sum(jax.scipy.special.entr(target), axis=-1)
    years_off = expected_age(jax.nn.softmax(logits)) - expected_age(target)
    return kl + jnp.abs(years_off)


def mean_variance(
    logits: Float[Array, "b 117"], target: Float[Array, "b 117"]
) -> Float[Array, "b"]:
    """Cross-entropy + 0.2 (mean error)^2 / 2 + 0.05 variance, Pan et al., CVPR 2018.

    The mean error is against the target's mean; the variance (years^2) is the prediction's own.
    """
    logits = logits.astype(jnp.float32)
    p = jax.nn.softmax(logits)
    mean = expected_age(p)
    years = jnp.arange(N_AGES, dtype=jnp.float32)
    variance = jnp.sum(p * (years - mean[:, None]) ** 2, axis=-1)
    squared = 0.5 * (mean - expected_age(target)) ** 2
    return cross_entropy(logits, target) + 0.2 * squared + 0.05 * variance


AGE_LOSSES: dict[str, Callable] = {
    "cross_entropy": cross_entropy,
    "kl_l1": kl_l1,
    "mean_variance": mean_variance,
}


def get_age_loss(name: str) -> Callable:
    """The age loss of that name; ValueError with the nearest names for any other."""
    if name in AGE_LOSSES:
        return AGE_LOSSES[name]
    near = difflib.get_close_matches(name, AGE_LOSSES)
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(AGE_LOSSES)}"
    raise ValueError(f"unknown age loss '{name}': {hint}")

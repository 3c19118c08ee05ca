"""Losses on a distribution over ages.

They take logits and a target *distribution* over ages 0-116, so that blurred, one-hot
and mixed labels are all treated alike, and give one value an example.
"""

import difflib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Real

from coatnet_jax.ages import N_AGES, expected_age
from coatnet_jax.ssl.nt_xent import nt_xent as nt_xent


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

"""Ages as a distribution over whole years, and the answers read from it.

A model gives one probability to each age 0-116. The age in years is read from them by one of the
`DECODERS` and the age class is the one that holds it, so the two answers cannot disagree. The
functions that read probabilities take NumPy or JAX arrays and give back the same kind; only
`age_quantile` gives NumPy arrays whatever it is given.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

N_AGES = 117  # ages 0-116, the range of UTKFace
CLASS_NAMES = ("<18", "18-40", "41-60", ">60")
CLASS_STARTS = (18, 41, 61)  # the first age of every class after the first

# Keeps the median so far inside its year that two decimals can never carry it into the next.
_INSIDE = 0.01


def _numpy_or_jax(array):
    return jnp if isinstance(array, jax.Array) else np


def age_class(age: Int[Array, "..."]) -> Int[Array, "..."]:
    """The class 0-3 (see `CLASS_NAMES`) of ages in years; 18 and 40 are class 1, 60 is class 2.

    An age between two whole years counts as the nearest one, so medians can be given as they are.
    """
    xp = _numpy_or_jax(age)
    age = xp.asarray(age)
    return sum((age >= start - 0.5).astype(xp.int32) for start in CLASS_STARTS)


def class_probabilities(p: Float[Array, "... 117"]) -> Float[Array, "... 4"]:
    """The probability of each of the four classes: the sum over its ages."""
    edges = (0, *CLASS_STARTS, N_AGES)
    sums = [p[..., a:b].sum(-1) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    return _numpy_or_jax(p).stack(sums, axis=-1)


def expected_age(p: Float[Array, "... 117"]) -> Float[Array, "..."]:
    """The mean of the distribution, in years."""
    years = _numpy_or_jax(p).arange(N_AGES, dtype=p.dtype)
    return (p * years).sum(-1)


def median_age(p: Float[Array, "... 117"]) -> Float[Array, "..."]:
    """The median of the distribution, in years: the answer with the least expected absolute error.

    The probability of age a is spread evenly over [a - 0.5, a + 0.5); the result lies in 0-116.
    Rounded, it is the integer median (the first age by which half the probability is
    reached), whose class is the median of `class_probabilities`. `p` need not sum to one.
    """
    xp = _numpy_or_jax(p)
    cumulative = xp.cumsum(p, axis=-1)
    half = cumulative[..., -1:] / 2
    year = xp.argmax(cumulative >= half, axis=-1)[..., None]
    mass = xp.take_along_axis(p, year, axis=-1)
    before = xp.take_along_axis(cumulative, year, axis=-1) - mass
    tiny = xp.finfo(p.dtype).tiny
    inside = xp.clip((half - before) / xp.maximum(mass, tiny), _INSIDE, 1 - _INSIDE)
    return (year.astype(p.dtype) - 0.5 + inside)[..., 0]


def age_quantile(p: Float[np.ndarray, "... 117"], q: float) -> Float[np.ndarray, "..."]:
    """The q-quantile of the age in years; a year's probability is spread evenly over [a-.5, a+.5).

    Held to 0-116, as `median_age` is. `p` need not sum to one.
    """
    p = np.asarray(p, np.float64)
    cumulative = np.cumsum(p, axis=-1)
    target = q * cumulative[..., -1:]
    year = np.argmax(cumulative >= target, axis=-1)[..., None]
    mass = np.take_along_axis(p, year, axis=-1)
    before = np.take_along_axis(cumulative, year, axis=-1) - mass
    inside = np.clip((target - before) / np.maximum(mass, np.finfo(np.float64).tiny), 0, 1)
    return np.clip(year - 0.5 + inside, 0, N_AGES - 1)[..., 0]


def most_likely_age(p: Float[Array, "... 117"]) -> Int[Array, "..."]:
    """The single most probable age, in years."""
    return _numpy_or_jax(p).argmax(p, axis=-1)


DECODERS: dict[str, Callable] = {
    "median": median_age,  # least expected absolute error
    "mean": expected_age,  # least expected squared error
    "argmax": most_likely_age,
}
DECODED = {"median": "posterior median", "mean": "posterior mean", "argmax": "most probable age"}


def get_decoder(name: str) -> Callable:
    """The function [..., 117] -> age in years of that name; ValueError for any other."""
    if name not in DECODERS:
        raise ValueError(f"unknown loss.decode '{name}': choose from {', '.join(DECODERS)}")
    return DECODERS[name]


def check_ages(age: Int[np.ndarray, "n"], where: str) -> None:
    """ValueError where an age label lies outside 0-116 years; `where` names the faces."""
    age = np.asarray(age)
    wrong = age[(age < 0) | (age >= N_AGES)]
    if len(wrong):
        raise ValueError(
            f"{len(wrong):,} of the {len(age):,} faces of {where} have an age outside "
            f"0-{N_AGES - 1} years, the first one {wrong[0]}: mend the labels and prepare it again"
        )

"""The percentile bootstrap (Efron & Tibshirani 1993), of means and of differences, over faces or
over persons.

Photos of one person resemble each other, and drawn one by one they would make intervals too narrow.
Where it is known who is on them, `groups` draws persons, each with all of their photos: the cluster
bootstrap (Field & Welsh 2007, J. R. Statist. Soc. B 69, 369-390).

Intervals are of 95 %. They say how a number would vary with other faces of the same kind, not how
it would vary with another training of the model: for that, train with several seeds.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

RESAMPLES = 1000

Groups = Int[np.ndarray, " n"] | Sequence[int | str] | None


def persons_of(identities: Sequence[str]) -> Int[np.ndarray, " n"] | None:
    """The `groups` of faces with these identities, a number a person.

    A face of unknown identity ('') is taken for the only one of its person. None where no identity
    is known, and where all faces are of one person: one cannot be drawn in place of another.
    """
    identities = np.asarray(identities, str)
    unknown = identities == ""
    numbers = np.unique(identities, return_inverse=True)[1]
    numbers[unknown] = len(numbers) + np.flatnonzero(unknown)
    return None if unknown.all() or len(np.unique(numbers)) < 2 else numbers


def drawn_units(result: Mapping[str, Any]) -> str:
    """'persons' or 'faces': what the intervals of an evaluation or a comparison are over."""
    return "persons" if "persons" in result else "faces"


def resampled_means(
    values: Float[np.ndarray, "n k"],
    *,
    groups: Groups = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Float[np.ndarray, "r k"]:
    """The means of the columns in each resample of the rows; a row's values stay together.

    With `groups`, a number or name a row, as many groups are drawn as there are, each with all of
    its rows, and the mean is over the rows that this gives. Raises ValueError where they are not
    one a row.
    """
    sums, sizes = _group_sums(np.asarray(values, np.float64), groups)
    rng = np.random.default_rng(seed)
    m = len(sizes)
    draws = (np.bincount(rng.integers(0, m, m), minlength=m) for _ in range(resamples))
    return np.stack([counts @ sums / (counts @ sizes) for counts in draws])


def bootstrap_interval(
    values: Float[np.ndarray, " n"],
    *,
    groups: Groups = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> list[float]:
    """[low, high] of the mean."""
    values = np.asarray(values, np.float64)[:, None]
    means = resampled_means(values, groups=groups, seed=seed, resamples=resamples)
    return _interval(means[:, 0])


def balanced_accuracy_interval(
    true: Int[np.ndarray, " n"],
    predicted: Int[np.ndarray, " n"],
    *,
    groups: Groups = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> list[float]:
    """[low, high] of the mean recall; a class missing from a resample is left out of its mean."""
    is_class = np.asarray(true)[:, None] == np.unique(true)
    hit = is_class & (np.asarray(true) == np.asarray(predicted))[:, None]
    both = np.hstack([hit, is_class])
    means = resampled_means(both, groups=groups, seed=seed, resamples=resamples)
    hits, there = np.split(means, 2, axis=1)
    recall = np.divide(hits, there, out=np.full_like(hits, np.nan), where=there > 0)
    return _interval(np.nanmean(recall, axis=1))


def paired_difference(
    first: Float[np.ndarray, " n"],
    second: Float[np.ndarray, " n"],
    *,
    groups: Groups = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """`difference` of the means, second - first, over the same faces, and its `interval`.

    A face is drawn with both of its values, so that what is hard for both runs cancels out.
    Raises ValueError where the two are not of the same faces.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.shape != second.shape or not len(first):
        raise ValueError(f"{len(first)} and {len(second)} values cannot be paired")
    change = second - first
    interval = bootstrap_interval(change, groups=groups, seed=seed, resamples=resamples)
    return {"difference": float(change.mean()), "interval": interval}


def _group_sums(
    values: Float[np.ndarray, "n k"], groups: Groups
) -> tuple[Float[np.ndarray, "m k"], Int[np.ndarray, " m"]]:
    """(the sums of each group's rows, its number of rows); groups in the order of their first rows,
    so that rows which are all groups of their own stay as they are."""
    if groups is None:
        return values, np.ones(len(values), int)
    if len(groups) != len(values):
        raise ValueError(f"{len(groups)} groups for {len(values)} rows")
    _, first, group = np.unique(groups, return_index=True, return_inverse=True)
    place = np.argsort(np.argsort(first))[group]
    sums = np.zeros((len(first), values.shape[1]))
    np.add.at(sums, place, values)
    return sums, np.bincount(place)


def _interval(samples: Float[np.ndarray, " r"]) -> list[float]:
    return [float(value) for value in np.quantile(samples, [0.025, 0.975])]

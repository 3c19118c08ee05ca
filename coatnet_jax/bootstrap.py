"""The percentile bootstrap over faces (Efron & Tibshirani 1993), of means and of differences.

Intervals are of 95 %. They say how a number would vary with other faces of the same kind, not how
it would vary with another training of the model: for that, train with several seeds.
"""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

RESAMPLES = 1000


def resampled_means(
    values: Float[np.ndarray, "n k"], *, seed: int = 0, resamples: int = RESAMPLES
) -> Float[np.ndarray, "r k"]:
    """The means of the columns in each resample of the rows; a row's values stay together."""
    values = np.asarray(values, np.float64)
    rng = np.random.default_rng(seed)
    n = len(values)
    draws = (np.bincount(rng.integers(0, n, n), minlength=n) for _ in range(resamples))
    return np.stack([counts @ values / n for counts in draws])


def bootstrap_interval(
    values: Float[np.ndarray, " n"], *, seed: int = 0, resamples: int = RESAMPLES
) -> list[float]:
    """[low, high] of the mean."""
    values = np.asarray(values, np.float64)[:, None]
    return _interval(resampled_means(values, seed=seed, resamples=resamples)[:, 0])


def balanced_accuracy_interval(
    true: Int[np.ndarray, " n"],
    predicted: Int[np.ndarray, " n"],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> list[float]:
    """[low, high] of the mean recall; a class missing from a resample is left out of its mean."""
    is_class = np.asarray(true)[:, None] == np.unique(true)
    hit = is_class & (np.asarray(true) == np.asarray(predicted))[:, None]
    means = resampled_means(np.hstack([hit, is_class]), seed=seed, resamples=resamples)
    hits, there = np.split(means, 2, axis=1)
    recall = np.divide(hits, there, out=np.full_like(hits, np.nan), where=there > 0)
    return _interval(np.nanmean(recall, axis=1))


def paired_difference(
    first: Float[np.ndarray, " n"],
    second: Float[np.ndarray, " n"],
    *,
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
    interval = bootstrap_interval(change, seed=seed, resamples=resamples)
    return {"difference": float(change.mean()), "interval": interval}


def _interval(samples: Float[np.ndarray, " r"]) -> list[float]:
    return [float(value) for value in np.quantile(samples, [0.025, 0.975])]

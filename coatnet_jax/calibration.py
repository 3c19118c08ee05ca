"""Whether stated probabilities come true: of the four classes, and of the age's quantiles.

Nothing is refitted here, no temperature either: probabilities are judged as the model gives them.
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from coatnet_jax.ages import age_quantile
from coatnet_jax.bootstrap import bootstrap_interval

LEVELS = (0.5, 0.8, 0.9, 0.95)


def calibration(
    p: Float[np.ndarray, "n 117"],
    age: Int[np.ndarray, " n"],
    *,
    confidence: Float[np.ndarray, " n"],
    hit: Bool[np.ndarray, " n"],
    persons: Int[np.ndarray, " n"] | None = None,
    seed: int = 0,
    resamples: int = 1000,
) -> dict[str, Any]:
    """All of this module as plain numbers; `confidence` is the probability of the class answered,
    `hit` whether it was right. Intervals are over `persons`, a number a face, or over faces."""
    bins = reliability(confidence, hit)
    return {
        "ece": expected_calibration_error(bins),
        "mean_confidence": float(np.mean(confidence)),
        "reliability": bins,
        "pit": pit_histogram(p, age).tolist(),
        "quantile_error": quantile_error(p, age),
        "intervals": quantile_coverage(p, age, persons=persons, seed=seed, resamples=resamples),
    }


def reliability(
    confidence: Float[np.ndarray, " n"], hit: Bool[np.ndarray, " n"], *, bins: int = 15
) -> list[dict[str, Any]]:
    """Equal bins (low, high] of confidence, with the mean confidence and accuracy in each."""
    confidence, hit = np.asarray(confidence, np.float64), np.asarray(hit, bool)
    edges = np.linspace(0, 1, bins + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    rows = []
    for b in range(bins):
        inside = place == b
        found = inside.any()
        rows.append(
            {
                "low": float(edges[b]),
                "high": float(edges[b + 1]),
                "support": int(inside.sum()),
                "confidence": float(confidence[inside].mean()) if found else None,
                "accuracy": float(hit[inside].mean()) if found else None,
            }
        )
    return rows


def expected_calibration_error(bins: list[dict[str, Any]]) -> float:
    """ECE: the mean over faces of |accuracy - confidence| of their bin (Guo et al., arXiv
    1706.04599), with the 15 bins of that paper."""
    n = sum(row["support"] for row in bins)
    filled = [row for row in bins if row["support"]]
    return sum(r["support"] * abs(r["accuracy"] - r["confidence"]) for r in filled) / n


def quantile_coverage(
    p: Float[np.ndarray, "n 117"],
    age: Int[np.ndarray, " n"],
    *,
    persons: Int[np.ndarray, " n"] | None = None,
    seed: int = 0,
    resamples: int = 1000,
) -> list[dict[str, Any]]:
    """For each level the share of faces whose age lies in the central interval, and mean width.

    Ages are whole years: an interval narrower than a year can still hold one, so a very sharp model
    may cover more than its level.
    """
    rows = []
    for level in LEVELS:
        low, high = age_quantile(p, (1 - level) / 2), age_quantile(p, (1 + level) / 2)
        inside = (low <= age) & (age <= high)
        rows.append(
            {
                "level": level,
                "covered": float(inside.mean()),
                "interval": bootstrap_interval(
                    inside, groups=persons, seed=seed, resamples=resamples
                ),
                "width": float((high - low).mean()),
            }
        )
    return rows


def pit_cdf(
    p: Float[np.ndarray, "n 117"], age: Int[np.ndarray, " n"], u: Float[np.ndarray, " m"]
) -> Float[np.ndarray, " m"]:
    """The mean distribution function, at `u` in 0-1, of the probability integral transform.

    The non-randomised form for counts (Czado, Gneiting & Held 2009, Biometrics 65): a face's share
    is spread evenly from P(younger than its age) to P(not older). It is `u` itself where the
    predicted distributions are right.
    """
    p = np.asarray(p, np.float64)
    upto = np.cumsum(p / p.sum(-1, keepdims=True), axis=-1)
    rows = np.arange(len(p))
    end = upto[rows, age]
    start = np.where(age > 0, upto[rows, np.maximum(age - 1, 0)], 0.0)
    width = np.maximum(end - start, 1e-12)
    return np.array([np.clip((value - start) / width, 0, 1).mean() for value in np.asarray(u)])


def pit_histogram(
    p: Float[np.ndarray, "n 117"], age: Int[np.ndarray, " n"], *, bins: int = 10
) -> Float[np.ndarray, " bins"]:
    """The share of faces in equal bins of the transform: all 1 / bins where calibrated.

    Heaped at both ends the distributions are too narrow; at one end, the ages are biased.
    """
    u = np.linspace(0, 1, bins + 1)
    found = pit_cdf(p, age, u)
    found[0], found[-1] = 0, 1
    return np.diff(found)


def quantile_error(p: Float[np.ndarray, "n 117"], age: Int[np.ndarray, " n"]) -> float:
    """The mean of |share of faces below their q-quantile - q| over q = 0.05, 0.10 … 0.95."""
    q = np.arange(1, 20) / 20
    return float(np.abs(pit_cdf(p, age, q) - q).mean())

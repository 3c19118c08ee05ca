"""The same measures for each band of ages, gender and race, and for their crossings."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from coatnet_jax.bootstrap import RESAMPLES, resampled_means
from coatnet_jax.palette import GENDER_NAMES, RACE_NAMES

MINIMUM = 20  # faces (persons, where known); below, a group is marked as too small to judge
BANDS = tuple((start, min(start + 9, 116)) for start in range(0, 120, 10))


def band_name(first: int, last: int) -> str:
    """'20–29'."""
    return f"{first}–{last}"


def group_table(
    measures: Mapping[str, Float[np.ndarray, " n"]],
    labels: Mapping[str, Int[np.ndarray, " n"]],
    *,
    persons: Int[np.ndarray, " n"] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> list[dict[str, Any]]:
    """One row a group: `by` (what it is a group by), `group`, `support`, `few`, and for each of the
    measures (one value a face) its mean and `<measure>_interval` of 95 %.

    Intervals are over `persons`, a number a face, and without them over faces. `few` marks fewer
    than `MINIMUM` of these. Means are None in a group without faces, intervals in one with fewer
    than two faces or persons. Where gender or race is unknown of every face there are no groups by
    it; a face of which it is unknown is in none of them.
    """
    values = np.stack([np.asarray(v, np.float64) for v in measures.values()], axis=1)
    rows = []
    for by, name, inside in groups(labels):
        support = int(inside.sum())
        chosen, who = values[inside], None if persons is None else persons[inside]
        drawn = support if who is None else len(np.unique(who))
        row = {"by": by, "group": name, "support": support, "few": drawn < MINIMUM}
        means = chosen.mean(axis=0) if support else np.full(len(measures), np.nan)
        told = {"groups": who, "seed": seed, "resamples": resamples}
        draws = resampled_means(chosen, **told) if drawn > 1 else None
        for k, measure in enumerate(measures):
            row[measure] = float(means[k]) if support else None
            row[f"{measure}_interval"] = (
                None if draws is None else np.quantile(draws[:, k], [0.025, 0.975]).tolist()
            )
        rows.append(row)
    return rows


def groups(
    labels: Mapping[str, Int[np.ndarray, " n"]],
) -> Iterator[tuple[str, str, Bool[np.ndarray, " n"]]]:
    """(by, name, which faces) of every band, gender, race, gender × race and band × gender."""
    age, gender, race = (np.asarray(labels[key]) for key in ("age", "gender", "race"))
    bands = [(band_name(*band), (age >= band[0]) & (age <= band[1])) for band in BANDS]
    genders = _named(gender, GENDER_NAMES)
    races = _named(race, RACE_NAMES)
    yield from _listed("age", bands)
    yield from _listed("gender", genders)
    yield from _listed("race", races)
    yield from _listed("gender × race", _crossed(genders, races))
    yield from _listed("age × gender", _crossed(bands, genders))


def unknown_counts(labels: Mapping[str, Int[np.ndarray, " n"]]) -> dict[str, int]:
    """Of how many faces gender and race are unknown."""
    return {key: int((np.asarray(labels[key]) < 0).sum()) for key in ("gender", "race")}


def _named(values, names):
    known = np.any(values >= 0)
    return [(name, values == k) for k, name in enumerate(names)] if known else []


def _crossed(left, right):
    return [(f"{a}, {b}", inside & also) for a, inside in left for b, also in right]


def _listed(by, found):
    return ((by, name, inside) for name, inside in found)

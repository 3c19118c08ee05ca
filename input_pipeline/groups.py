"""Which pictures belong together: copies of one picture, and pictures of one person."""

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from input_pipeline.near_duplicates import near_pairs


def copy_groups(
    pixel_hashes: Sequence[str], perceptual_hashes: Sequence[str], photos: Sequence[str] = ()
) -> Int[np.ndarray, " n"]:
    """Returns the group of every picture: those of equal pixels, near copies of each other, and
    with one photo's name (`photos`, '' for none) are together, and whatever that joins."""
    n = len(pixel_hashes)
    return _join(n, near_pairs(perceptual_hashes), _equal(pixel_hashes), _equal(photos))


def joined_groups(groups: Sequence[int], identities: Sequence[str]) -> Int[np.ndarray, " n"]:
    """Returns the groups after pictures of one identity ('' unknown) were put together as well."""
    return _join(len(groups), _equal([str(group) for group in groups]), _equal(identities))


def group_keys(groups: Sequence[int], pixel_hashes: Sequence[str]) -> list[str]:
    """Returns for every picture the least pixel hash of its group: a name for the group that does
    not hang on the order of the pictures."""
    least: dict[int, str] = {}
    for group, key in zip(groups, pixel_hashes, strict=True):
        least[group] = min(key, least.get(group, key))
    return [least[group] for group in groups]


def members(groups: Sequence[int]) -> list[list[int]]:
    """Returns the rows of each group of two or more, in order of their first rows."""
    rows: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(int(group), []).append(row)
    return [found for found in rows.values() if len(found) > 1]


def _equal(values: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of a row and the first row of the same value; '' is equal to nothing."""
    first: dict[str, int] = {}
    pairs = ((first.setdefault(value, row), row) for row, value in enumerate(values) if value)
    return [pair for pair in pairs if pair[0] != pair[1]]


def _join(n: int, *pairs: Iterable[tuple[int, int]]) -> Int[np.ndarray, " n"]:
    edges = np.concatenate([np.array(part, int).reshape(-1, 2) for part in pairs])
    graph = coo_array((np.ones(len(edges), bool), edges.T), shape=(n, n))
    return connected_components(graph, directed=False)[1]

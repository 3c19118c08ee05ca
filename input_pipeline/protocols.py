"""Several ways to split one set: our own, five folds, and those that others published."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from input_pipeline.splits import (
    assign_splits,
    fingerprint,
    match_splits,
    read_splits,
    straddling_groups,
    write_splits,
)

FOLDS = 5
# A published protocol often has no validation split; this share of its training split is taken.
VALIDATION_SHARE = 0.1


class Images(NamedTuple):
    """What splitting needs to know of every image; groups are those that never part."""

    files: Sequence[str]
    hashes: Sequence[str]
    ages: Sequence[int]
    groups: Sequence[str]


class Protocol(NamedTuple):
    """The split of every image ('' for none), and how the rows of a given file were matched."""

    splits: list[str]
    counts: Mapping[str, int]


def own_protocols(images: Images, *, seed: int = 0) -> dict[str, Protocol]:
    """Returns `default` (70/15/15), `80_10_10` and `fold0` to `fold4` (60/20/20) of the images.

    Fold k has the k-th fifth as its test split and the next fifth for validation.
    """

    def assign(*fractions: tuple[str, float]) -> list[str]:
        return assign_splits(images.groups, images.ages, fractions=fractions, seed=seed).tolist()

    made = {
        "default": assign(("train", 0.7), ("validation", 0.15), ("test", 0.15)),
        "80_10_10": assign(("train", 0.8), ("validation", 0.1), ("test", 0.1)),
    }
    fifths = assign(*((str(k), 1 / FOLDS) for k in range(FOLDS)))
    for k in range(FOLDS):
        names = {str(k): "test", str((k + 1) % FOLDS): "validation"}
        made[f"fold{k}"] = [names.get(fifth, "train") for fifth in fifths]
    return {name: Protocol(splits, {}) for name, splits in made.items()}


def given_protocols(
    images: Images, paths: Mapping[str, str | Path], *, seed: int = 0
) -> dict[str, Protocol]:
    """Returns the protocols in these CSV files, each exactly as it is given.

    One with `train` but without `validation` is joined by another, `<name>_val`, in which a tenth
    of the training images is for validation. Raises as `read_splits` does, and ValueError where no
    file of a protocol is here.
    """
    found = {}
    for name, path in paths.items():
        splits, counts = match_splits(images.files, images.hashes, read_splits(path))
        if not any(splits):
            raise ValueError(f"{path}: none of its {counts['rows']} files is among the images")
        found |= with_validation(images, name, Protocol(splits, counts), seed=seed)
    return found


def with_validation(
    images: Images, name: str, protocol: Protocol, *, seed: int = 0
) -> dict[str, Protocol]:
    """Returns the protocol, and where it has no validation split a second one that has."""
    present = set(protocol.splits)
    if "train" not in present or "validation" in present:
        return {name: protocol}
    rows = [row for row, split in enumerate(protocol.splits) if split == "train"]
    parts = assign_splits(
        [images.groups[row] for row in rows],
        [images.ages[row] for row in rows],
        fractions=(("train", 1 - VALIDATION_SHARE), ("validation", VALIDATION_SHARE)),
        seed=seed,
    )
    splits = list(protocol.splits)
    for row, part in zip(rows, parts.tolist(), strict=True):
        splits[row] = part
    return {name: protocol, f"{name}_val": Protocol(splits, protocol.counts)}


def write_protocol(
    path: Path, images: Images, protocol: Protocol, *, transform_id: str
) -> dict[str, object]:
    """Writes the split file and returns its account: splits (sizes), groups and identical pictures
    that lie in two splits, fingerprint, and how its rows were matched."""
    write_splits(path, images.files, images.hashes, protocol.splits)
    rows = [row for row, split in enumerate(protocol.splits) if split]
    splits = [protocol.splits[row] for row in rows]
    hashes = [images.hashes[row] for row in rows]
    order = sorted(set(splits), key=lambda split: (split == "test", split))
    return {
        "splits": {split: splits.count(split) for split in order},
        "straddling_groups": straddling_groups([images.groups[row] for row in rows], splits),
        "straddling_identical_groups": straddling_groups(hashes, splits),
        "fingerprint": fingerprint(hashes, splits, transform_id=transform_id),
        **protocol.counts,
    }

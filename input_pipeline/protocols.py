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
# What `82_3_15` leaves of the validation split of `default`: enough to set intervals and to see
# that a training goes well, once its settings have been chosen.
KEPT_SHARE = 0.2
OWN = ("default", "82_3_15", "80_10_10", *(f"fold{k}" for k in range(FOLDS)))


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
    """Returns `default` (70/15/15), `82_3_15`, `80_10_10` and `fold0` to `fold4` (60/20/20).

    `82_3_15` has the test split of `default` and trains on its training split and four fifths of
    its validation split: for the last training, when nothing is left to choose. Fold k has the k-th
    fifth as its test split and the next fifth for validation.
    """

    def assign(*fractions: tuple[str, float]) -> list[str]:
        return assign_splits(images.groups, images.ages, fractions=fractions, seed=seed).tolist()

    default = assign(("train", 0.7), ("validation", 0.15), ("test", 0.15))
    made = {
        "default": default,
        "82_3_15": _divide(images, default, "validation", kept=KEPT_SHARE, seed=seed),
        "80_10_10": assign(("train", 0.8), ("validation", 0.1), ("test", 0.1)),
    }
    fifths = assign(*((str(k), 1 / FOLDS) for k in range(FOLDS)))
    for k in range(FOLDS):
        names = {str(k): "test", str((k + 1) % FOLDS): "validation"}
        made[f"fold{k}"] = [names.get(fifth, "train") for fifth in fifths]
    return {name: Protocol(splits, {}) for name, splits in made.items()}


def check_given(paths: Mapping[str, str | Path]) -> None:
    """Raises what can be known of given protocols before any picture is read: as `read_splits`
    does, and ValueError where a name is that of one of our own."""
    if taken := sorted(paths.keys() & set(OWN)):
        raise ValueError(f"the splits {', '.join(taken)} are made here: give yours another name")
    for path in paths.values():
        read_splits(path)


def given_protocols(
    images: Images, paths: Mapping[str, str | Path], *, seed: int = 0
) -> dict[str, Protocol]:
    """Returns the protocols in these CSV files, each exactly as it is given.

    One with `train` but without `validation` is joined by another, `<name>_val`, in which a tenth
    of the training images is for validation, unless one of that name is given too. Raises as
    `read_splits` does, and ValueError where no file of a protocol is here.
    """
    found = {}
    for name, path in paths.items():
        splits, counts = match_splits(images.files, images.hashes, read_splits(path))
        if not any(splits):
            raise ValueError(f"{path}: none of its {counts['rows']} files is among the images")
        made = with_validation(images, name, Protocol(splits, counts), seed=seed)
        found |= {key: made[key] for key in made if key == name or key not in paths}
    return found


def with_validation(
    images: Images, name: str, protocol: Protocol, *, seed: int = 0
) -> dict[str, Protocol]:
    """Returns the protocol, and where it has no validation split a second one that has."""
    present = set(protocol.splits)
    if "train" not in present or "validation" in present:
        return {name: protocol}
    splits = _divide(images, protocol.splits, "train", kept=1 - VALIDATION_SHARE, seed=seed)
    return {name: protocol, f"{name}_val": Protocol(splits, protocol.counts)}


def _divide(
    images: Images, splits: Sequence[str], divided: str, *, kept: float, seed: int
) -> list[str]:
    """`splits` with the images of one split divided anew between it, a share of `kept`, and the
    other of train and validation."""
    other = {"train": "validation", "validation": "train"}[divided]
    rows = [row for row, split in enumerate(splits) if split == divided]
    shares = {divided: kept, other: 1 - kept}
    parts = assign_splits(
        [images.groups[row] for row in rows],
        [images.ages[row] for row in rows],
        fractions=[(name, shares[name]) for name in ("train", "validation")],
        seed=seed,
    )
    result = list(splits)
    for row, part in zip(rows, parts.tolist(), strict=True):
        result[row] = part
    return result


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

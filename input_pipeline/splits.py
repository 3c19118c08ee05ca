"""Train, validation and test splits in which identical pictures never part.

UTKFace holds hundreds of pixel-identical pictures under several names, often with different ages;
a random split by file would put copies of test faces into the training set.
"""

import csv
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

FRACTIONS = (("train", 0.7), ("validation", 0.15), ("test", 0.15))


def assign_splits(
    hashes: Sequence[str],
    ages: Sequence[int],
    *,
    fractions: Sequence[tuple[str, float]] = FRACTIONS,
    seed: int = 0,
) -> np.ndarray:
    """Returns a split name for every image, str [n], independent of the order of the images.

    Images of equal hash form a group which stays together. The groups are ordered by age, and
    within an age by SHA-256 of (seed, hash); each goes to the split which is then furthest behind
    its fraction, so every stretch of ages is divided alike. Raises ValueError on bad fractions.
    """
    if len(hashes) != len(ages):
        raise ValueError(f"{len(hashes)} hashes but {len(ages)} ages")
    names, shares = [name for name, _ in fractions], np.array([share for _, share in fractions])
    if len(set(names)) != len(names) or (shares <= 0).any() or abs(shares.sum() - 1) > 1e-6:
        raise ValueError(f"split fractions must be positive and sum to 1, got {tuple(fractions)}")
    rows = defaultdict(list)
    for row, key in enumerate(hashes):
        rows[key].append(row)
    counts = np.zeros(len(names))
    result = np.empty(len(hashes), dtype=f"<U{max(map(len, names))}")
    for key in sorted(rows, key=lambda key: _group_order(key, [ages[i] for i in rows[key]], seed)):
        behind = shares * (counts.sum() + len(rows[key])) - counts
        chosen = int(np.argmax(behind))
        counts[chosen] += len(rows[key])
        result[rows[key]] = names[chosen]
    return result


def _group_order(key: str, ages: list[int], seed: int) -> tuple[int, str]:
    """Copies may disagree on the age; the middle one (the lower of two) places the group."""
    age = sorted(ages)[(len(ages) - 1) // 2]
    return int(age), hashlib.sha256(f"{seed}:{key}".encode()).hexdigest()


def fingerprint(hashes: Iterable[str], splits: Iterable[str], *, transform_id: str = "") -> str:
    """Returns the SHA-256 over the sorted `hash split` lines: equal for equal splits of a set.

    `transform_id` names what was done to the pictures when they were prepared; '' is nothing.
    """
    lines = sorted(f"{key} {split}\n" for key, split in zip(hashes, splits, strict=True))
    if transform_id:
        lines.append(f"transform {transform_id}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def straddling_groups(hashes: Iterable[str], splits: Iterable[str]) -> int:
    """Returns how many groups of identical pictures lie in more than one split."""
    found = defaultdict(set)
    for key, split in zip(hashes, splits, strict=True):
        found[key].add(split)
    return sum(len(names) > 1 for names in found.values())


def write_splits(
    path: str | Path, files: Sequence[str], hashes: Sequence[str], splits: Sequence[str]
) -> None:
    """Writes a CSV of file, pixel_hash and split, sorted by file."""
    with open(path, "w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(("file", "pixel_hash", "split"))
        writer.writerows(sorted(zip(files, hashes, splits, strict=True)))


def read_splits(path: str | Path) -> dict[str, str]:
    """Returns {file: split} from a CSV with at least the columns `file` and `split`.

    Raises FileNotFoundError, or ValueError on missing columns, an empty split name, no rows, or a
    file that lies in two splits.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"split file {path} does not exist")
    result: dict[str, str] = {}
    with path.open(newline="", encoding="utf-8-sig") as lines:
        reader = csv.DictReader(lines)
        missing = {"file", "split"} - set(reader.fieldnames or ())
        if missing:
            raise ValueError(
                f"{path} has the columns {', '.join(reader.fieldnames or ()) or '(none)'}, but "
                f"{' and '.join(sorted(missing))} must be among them"
            )
        for row in reader:
            file, split = row["file"], (row["split"] or "").strip()
            if not file or not split:
                raise ValueError(f"{path} line {reader.line_num}: file or split is empty")
            if result.setdefault(file, split) != split:
                raise ValueError(f"{path}: {file} is in {result[file]} and in {split}")
    if not result:
        raise ValueError(f"{path} has no rows")
    return result

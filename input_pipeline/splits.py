"""Train, validation and test splits in which pictures that belong together never part.

UTKFace holds hundreds of photos under several names, identical or nearly so, often with different
ages; a random split by file would put copies of test faces into the training set.
"""

import csv
import gzip
import hashlib
import io
import shutil
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import NamedTuple

import numpy as np

from input_pipeline.names import bare_name, composed, public_name

FRACTIONS = (("train", 0.7), ("validation", 0.15), ("test", 0.15))


def assign_splits(
    groups: Sequence[str],
    ages: Sequence[int],
    *,
    fractions: Sequence[tuple[str, float]] = FRACTIONS,
    seed: int = 0,
) -> np.ndarray:
    """Returns a split name for every image, str [n], independent of the order of the images.

    Images of equal `groups` stay together (`groups.group_keys`). The groups are ordered by age, and
    within an age by SHA-256 of (seed, group); each goes to the split which is then furthest behind
    its fraction, so every stretch of ages is divided alike. Raises ValueError on bad fractions.
    """
    if len(groups) != len(ages):
        raise ValueError(f"{len(groups)} groups but {len(ages)} ages")
    names, shares = [name for name, _ in fractions], np.array([share for _, share in fractions])
    if len(set(names)) != len(names) or (shares <= 0).any() or abs(shares.sum() - 1) > 1e-6:
        raise ValueError(f"split fractions must be positive and sum to 1, got {tuple(fractions)}")
    rows = defaultdict(list)
    for row, key in enumerate(groups):
        rows[key].append(row)
    counts = np.zeros(len(names))
    result = np.empty(len(groups), dtype=f"<U{max(map(len, names))}")
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


def label_digest(hashes: Iterable[str], *labels: Iterable[int]) -> str:
    """Returns the SHA-256 over the sorted lines of pixel hash and labels: what the fingerprint does
    not see."""
    lines = sorted(" ".join(map(str, row)) + "\n" for row in zip(hashes, *labels, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def straddling_groups(groups: Iterable[str], splits: Iterable[str]) -> int:
    """Returns how many groups lie in more than one split; images without a split ('') are none."""
    found = defaultdict(set)
    for key, split in zip(groups, splits, strict=True):
        if split:
            found[key].add(split)
    return sum(len(names) > 1 for names in found.values())


def write_splits(
    path: str | Path, files: Sequence[str], hashes: Sequence[str], splits: Sequence[str]
) -> None:
    """Writes a CSV of file, pixel_hash and split, sorted by file, without those of split ''."""
    rows = (row for row in zip(files, hashes, splits, strict=True) if row[-1])
    with open(path, "w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(("file", "pixel_hash", "split"))
        writer.writerows(sorted(rows))


class SplitRow(NamedTuple):
    """What a split file says of a picture; pixel_hash is '' where it does not say it."""

    split: str
    pixel_hash: str


def read_splits(path: str | Path) -> dict[str, SplitRow]:
    """Returns {file: row} from a CSV (`.csv.gz`: through gzip) with at least the columns `file` and
    `split`.

    Raises FileNotFoundError, or ValueError on missing columns, an empty split name, no rows, a file
    that lies in two splits, or a table that is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"split file {path} does not exist")
    result: dict[str, SplitRow] = {}
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be unpacked ({error}): fetch it again") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}): save it as such") from None
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
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
            found = result.setdefault(file, SplitRow(split, row.get("pixel_hash") or ""))
            if found.split != split:
                name = public_name(file)
                raise ValueError(f"{path}: {name} is in {found.split} and in {split}")
    except csv.Error as error:
        raise ValueError(
            f"{path} cannot be read after line {reader.line_num} ({error}): is a quote left open?"
        ) from None
    if not result:
        raise ValueError(f"{path} has no rows")
    return result


def match_splits(
    files: Sequence[str], hashes: Sequence[str], rows: Mapping[str, SplitRow]
) -> tuple[list[str], dict[str, int]]:
    """Returns the split of every image ('' where there is none), and how the rows were matched.

    Names are compared with their folders, else without them, else without the person's name, and
    letters with accents are equal in both of Unicode's forms; a pixel hash in a row must be the
    image's. The counts: rows; missing (no such file here); changed (another picture under that
    name); ambiguous (images that fit rows of several splits, and so are in none).
    """
    splits, used, changed, ambiguous = [], set(), 0, 0
    for names, right in _rows_of_images(files, hashes, rows):
        found = {rows[name].split for name in right}
        changed += bool(names) and not right
        ambiguous += len(found) > 1
        used |= names
        splits.append(found.pop() if len(found) == 1 else "")
    counts = {"rows": len(rows), "missing": len(rows) - len(used), "changed": changed}
    return splits, counts | {"ambiguous": ambiguous}


def copy_without(
    path: Path, target: Path, left_out: Set[str], files: Sequence[str], hashes: Sequence[str]
) -> bool:
    """Copies a split file without the rows of the images `left_out`, which are some of `files`;
    returns whether there were any. A file that is none of splits is copied as it is."""
    gone, kept = set(), set()
    try:
        rows = read_splits(path)
    except ValueError:
        rows = {}
    for file, (_, right) in zip(files, _rows_of_images(files, hashes, rows), strict=True):
        (gone if file in left_out else kept).update(right)
    gone -= kept
    if not gone:
        shutil.copy2(path, target)
        return False
    with path.open(newline="", encoding="utf-8-sig") as lines:
        header, *table = csv.reader(lines)
    column = header.index("file")
    with target.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(row for row in table if row and row[column] not in gone)
    return True


def _rows_of_images(
    files: Sequence[str], hashes: Sequence[str], rows: Mapping[str, SplitRow]
) -> Iterator[tuple[set[str], set[str]]]:
    """Yields for every image the rows of its name, and those of them that mean its picture."""
    whole: dict[str, set[str]] = defaultdict(set)
    by_name: dict[str, set[str]] = defaultdict(set)
    # Mostly all names are those of the rows, and the others cost a second for 20,000 images.
    for file in rows if not rows.keys() >= set(files) else ():
        whole[composed(file)].add(file)
        for name in {bare_name(file), public_name(file)}:
            by_name[composed(name)].add(file)
    for file, key in zip(files, hashes, strict=True):
        names = {file}
        if file not in rows:
            plain = composed(file)
            names = whole.get(plain) or by_name.get(plain, set())
        yield names, {name for name in names if rows[name].pixel_hash in ("", key)}

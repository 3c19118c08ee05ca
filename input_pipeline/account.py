"""The tables of a prepared set: labels, copies that disagree, what was left out, and a summary."""

import csv
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from input_pipeline.groups import copy_groups, group_keys, joined_groups, members
from input_pipeline.layouts import Layout
from input_pipeline.prepared import LABEL_COLUMNS, records_folder
from input_pipeline.protocols import (
    Images,
    Protocol,
    given_protocols,
    own_protocols,
    with_validation,
    write_protocol,
)

_CLASSES = (("<18", 0, 17), ("18-40", 18, 40), ("41-60", 41, 60), (">60", 61, 116))
_LABELS = ("age", "gender", "race")

Labels = dict[str, list]


def write_account(
    folder: Path,
    skipped: Sequence[tuple[str, str]],
    *,
    layout: Layout,
    seed: int,
    drop_conflicts: int | None,
    splits: Mapping[str, str | Path],
    transform_id: str,
) -> dict[str, Any]:
    """Writes all CSV files of a set whose records lie in `folder`; returns what they hold, counted.

    `splits` are files of protocols to add. With `drop_conflicts`, copies of a picture whose ages
    lie more than that many years apart are in no split.
    """
    labels = _labels_of_records(folder)
    ages, hashes = labels["age"], labels["pixel_hash"]
    copies = copy_groups(hashes, labels["perceptual_hash"], _photos(labels, layout))
    conflicts = [rows for rows in members(copies) if _conflict(labels, rows)]
    dropped = [rows for rows in conflicts if _far_apart(ages, rows, drop_conflicts)]
    _write(folder / "labels.csv", ("index", *LABEL_COLUMNS), _indexed(labels))
    _write(folder / "skipped.csv", ("file", "reason"), sorted(skipped))
    _write_conflicts(folder / "conflicts.csv", labels, conflicts, dropped)

    together = group_keys(joined_groups(copies, labels["identity"]), hashes)
    left_out = {row for rows in dropped for row in rows}
    images = _images(labels, together, left_out)
    (folder / "splits").mkdir()
    written = {
        name: write_protocol(
            folder / "splits" / f"{name}.csv", images, protocol, transform_id=transform_id
        )
        for name, protocol in _protocols(images, layout, splits, seed=seed).items()
    }
    known = {column: sum(value >= 0 for value in labels[column]) for column in ("gender", "race")}
    found = len(ages) + len(skipped)
    default = written["default"]
    return {
        "found": found,
        "kept": len(ages),
        "skipped": dict(Counter(_kind(reason) for _, reason in skipped).most_common()),
        "dropped": len(left_out),
        "gender_known": known["gender"],
        "race_known": known["race"],
        "identities": len(set(labels["identity"]) - {""}),
        **_table_facts(layout, labels["file"], skipped, folder),
        **_copy_facts(labels, copies),
        "label_conflicts": len(conflicts),
        "straddling_groups": default["straddling_groups"],
        "splits": default["splits"],
        "classes": {c: sum(low <= age <= high for age in ages) for c, low, high in _CLASSES},
        "protocols": written,
        "fingerprint": default["fingerprint"],
    }


def summary(info: Mapping[str, Any]) -> str:
    """Returns a table of what prepare.json holds: counts, reasons, copies, splits, classes."""
    kept = info["kept"]
    lines = [_line("found", info["found"]), _line("kept", kept)]
    lines += [_line(f"skipped: {reason}", n) for reason, n in info["skipped"].items()]
    lines += [
        _line(f"{what} unknown", kept - info[f"{what}_known"])
        for what in ("gender", "race")
        if info[f"{what}_known"] < kept
    ]
    lines += [_line(f"not understood: {word}", n) for word, n in info["not_understood"].items()]
    optional = (
        ("rows of the label table without an image", "rows_without_image"),
        ("people", "identities"),
        ("dropped for their conflicting ages", "dropped"),
    )
    lines += [_line(text, info[key]) for text, key in optional if info[key]]
    lines += [
        _line("groups of identical pictures", info["duplicate_groups"]),
        _line("  files in them", info["duplicate_files"]),
        _line("  groups that disagree on the age", info["conflicting_age_groups"]),
        _line("groups of one photo in other pixels", info["near_groups"]),
        _line("  files in them", info["near_files"]),
        _line("  groups that disagree on the age", info["near_conflicting_age_groups"]),
        _line("all groups that disagree (conflicts.csv)", info["label_conflicts"]),
        _line("groups in two splits", info["straddling_groups"]),
    ]
    lines += [_line(f"split {split}", n) for split, n in info["splits"].items()]
    lines += [f"{_line(f'class {c}', n)}  {n / kept:6.1%}" for c, n in info["classes"].items()]
    lines.append(f"fingerprint {info['fingerprint'][:16]}")
    lines.append("splits to choose with --config.data.splits=NAME")
    lines += [f"  {name:<22}{_sizes(found)}" for name, found in info["protocols"].items()]
    return "\n".join(lines)


def _line(text: str, n: int) -> str:
    return f"{text:<44.43}{n:>8,}"


def _sizes(found: Mapping[str, Any]) -> str:
    """The sizes of a protocol's splits, and what was the matter with it."""
    text = ", ".join(f"{split} {n:,}" for split, n in found["splits"].items())
    remarks = (
        ("missing", "of its rows without an image"),
        ("changed", "images other than it says"),
        ("ambiguous", "images that fit rows of several splits"),
        ("straddling_groups", "groups in two splits"),
        ("straddling_identical_groups", "of them of identical pictures"),
    )
    return "; ".join([text, *(f"{found[k]:,} {what}" for k, what in remarks if found.get(k))])


def _labels_of_records(folder: Path) -> Labels:
    """Reads the labels back in record order, which TFDS chose by hashing the file names."""
    builder = tfds.builder_from_directory(records_folder(folder))
    skip = {"image": tfds.decode.SkipDecoding()}
    labels: Labels = {column: [] for column in LABEL_COLUMNS}
    for record in builder.as_data_source(split="faces", decoders=skip):
        for column, values in labels.items():
            value = record[column]
            values.append(value.decode() if isinstance(value, bytes) else int(value))
    return labels


def _photos(labels: Labels, layout: Layout) -> list[str]:
    """UTKFace's crops and the photos they were cut from share a name up to `.jpg`."""
    if layout.name != "utkface":
        return []
    return [file.rpartition("/")[2].partition(".jpg")[0] for file in labels["file"]]


def _conflict(labels: Labels, rows: Sequence[int]) -> bool:
    """Whether copies of one picture have different known labels."""
    values = ({labels[column][row] for row in rows} - {-1} for column in _LABELS)
    return any(len(found) > 1 for found in values)


def _far_apart(ages: Sequence[int], rows: Sequence[int], years: int | None) -> bool:
    found = [ages[row] for row in rows]
    return years is not None and max(found) - min(found) > years


def _write(path: Path, columns: Sequence[str], rows: Iterable[Sequence]) -> None:
    with path.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def _indexed(labels: Labels) -> Iterable[tuple]:
    return zip(range(len(labels["file"])), *labels.values(), strict=True)


def _write_conflicts(
    path: Path, labels: Labels, conflicts: Sequence[list[int]], dropped: Sequence[list[int]]
) -> None:
    """A row per file of a group that disagrees; `copy` says if its pixels are in there twice."""
    rows = []
    for group, found in enumerate(conflicts):
        hashes = Counter(labels["pixel_hash"][row] for row in found)
        for row in found:
            copy = "identical" if hashes[labels["pixel_hash"][row]] > 1 else "near"
            values = (labels[column][row] for column in ("file", *_LABELS))
            rows.append((group, *values, copy, "dropped" if found in dropped else "kept"))
    _write(path, ("group", "file", *_LABELS, "copy", "kept"), rows)


def _images(labels: Labels, groups: Sequence[str], left_out: set[int]) -> Images:
    """What splitting needs of the pictures that are not left out of all splits."""
    columns = (labels["file"], labels["pixel_hash"], labels["age"], groups)
    rows = [row for row in range(len(groups)) if row not in left_out]
    if not rows:
        raise ValueError("all images were dropped for their conflicting ages")
    return Images(*([column[row] for row in rows] for column in columns))


def _protocols(
    images: Images, layout: Layout, splits: Mapping[str, str | Path], *, seed: int
) -> dict[str, Protocol]:
    """Our own, the one in the label table, and those given: a given name may replace no other."""
    protocols = own_protocols(images, seed=seed)
    if layout.table:
        published = [layout.table.split_of(file) for file in images.files]
        if any(published):
            several = sum(len(layout.table.splits_of(file)) > 1 for file in images.files)
            protocol = Protocol(published, {"ambiguous": several})
            protocols |= with_validation(images, "published", protocol, seed=seed)
    given = given_protocols(images, splits, seed=seed)
    if taken := sorted(protocols.keys() & given.keys()):
        raise ValueError(f"the splits {', '.join(taken)} are made here: give yours another name")
    return protocols | given


def _kind(reason: str) -> str:
    """A reason without what is particular to one file, in parentheses at its end."""
    return reason.partition(" (")[0]


def _table_facts(
    layout: Layout, files: Sequence[str], skipped: Sequence[tuple[str, str]], folder: Path
) -> dict[str, Any]:
    if layout.table is None:
        return {"not_understood": {}, "rows_without_image": 0}
    without = layout.table.without_picture([*files, *(path for path, _ in skipped)])
    if without:
        _write(folder / "rows_without_image.csv", ("file",), sorted({(row,) for row in without}))
    return {"not_understood": layout.table.unknown, "rows_without_image": len(without)}


def _copy_facts(labels: Labels, copies: Sequence[int]) -> dict[str, int]:
    """Counts groups of equal pixels, and groups that near copies join."""
    hashes, ages = labels["pixel_hash"], labels["age"]
    number: dict[str, int] = {}
    same = members([number.setdefault(key, len(number)) for key in hashes])
    near = [rows for rows in members(copies) if len({hashes[row] for row in rows}) > 1]

    def disagree(groups: Sequence[list[int]]) -> int:
        return sum(len({ages[row] for row in rows}) > 1 for rows in groups)

    return {
        "duplicate_groups": len(same),
        "duplicate_files": sum(map(len, same)),
        "conflicting_age_groups": disagree(same),
        "near_groups": len(near),
        "near_files": sum(map(len, near)),
        "near_conflicting_age_groups": disagree(near),
    }

"""Copies of one photo whose ages disagree: kept, left out of the training, or given both ages."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np

from input_pipeline.pipeline import Faces

LABEL_NOISE = ("keep", "drop", "widen")


def settle_conflicts(faces: Faces, how: str) -> tuple[Faces, list[dict[str, str]]]:
    """Returns the split with its conflicting ages settled, and a row for each face concerned.

    Only copies within this very split count, so no label of another split is used or changed.
    `drop` leaves all faces of a conflicting group out: which of the ages is right nobody knows.
    `widen` keeps them and adds labels `ages` int32 [n, k]: the ages of all copies of the row's
    photo, its own among them, and -1 where there are fewer than k. `keep` changes nothing.

    A row tells group, file, its own age, and all ages of the group. Raises ValueError for another
    word, FileNotFoundError where the folder has no conflicts.csv.
    """
    if how not in LABEL_NOISE:
        raise ValueError(f"data.label_noise must be one of {', '.join(LABEL_NOISE)}, not {how!r}")
    if how == "keep":
        return faces, []
    groups = _conflicting(faces)
    account = [
        {
            "group": group,
            "file": faces.labels["file"][row],
            "age": str(faces.labels["age"][row]),
            "ages": " ".join(str(faces.labels["age"][other]) for other in rows),
        }
        for group, rows in groups.items()
        for row in rows
    ]
    concerned = [row for rows in groups.values() for row in rows]
    if how == "drop":
        return _without(faces, concerned), account
    ages = np.full((len(faces), max(map(len, groups.values()), default=1)), -1, np.int32)
    ages[:, 0] = faces.labels["age"]
    for rows in groups.values():
        ages[rows, : len(rows)] = faces.labels["age"][rows]
    return replace(faces, labels=faces.labels | {"ages": ages}), account


def _conflicting(faces: Faces) -> dict[str, list[int]]:
    """The rows of this split in each group of copies that have more than one age here."""
    path = Path(faces.folder) / "conflicts.csv"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing, which tells the copies whose ages disagree: prepare the data again"
        )
    with path.open(newline="", encoding="utf-8") as lines:
        group_of = {row["file"]: row["group"] for row in csv.DictReader(lines)}
    groups: dict[str, list[int]] = {}
    for row, file in enumerate(faces.labels["file"]):
        if file in group_of:
            groups.setdefault(group_of[file], []).append(row)
    ages = faces.labels["age"]
    return {group: rows for group, rows in groups.items() if len(set(ages[rows].tolist())) > 1}


def _without(faces: Faces, rows: list[int]) -> Faces:
    kept = np.delete(np.arange(len(faces)), rows)
    if not len(kept):
        raise ValueError(f"every face of the split {faces.split} has a copy of another age")
    return faces.take(kept)


def write_account(path: Path, account: list[dict[str, str]], how: str) -> None:
    """Writes the rows of `settle_conflicts` as a CSV, with what was done to the face."""
    done = {"drop": "dropped", "widen": "widened"}[how]
    with Path(path).open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, ("group", "file", "age", "ages", "done"), lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, "done": done} for row in account)

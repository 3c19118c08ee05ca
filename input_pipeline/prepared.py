"""What a prepared folder holds, read back."""

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

LABEL_COLUMNS = (
    "file", "age", "gender", "race", "identity", "pixel_hash", "perceptual_hash", "height", "width"
)  # fmt: skip
_TEXT = {"file", "identity", "pixel_hash", "perceptual_hash"}


def read_labels(folder: str | Path) -> dict[str, list]:
    """Returns the columns of labels.csv as lists, in record order; numbers are ints.

    Raises FileNotFoundError when the folder was not prepared, ValueError when by another version.
    """
    path = _labels_file(folder)
    try:
        with path.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is damaged ({error}): prepare the data again") from None
    if rows and (missing := set(LABEL_COLUMNS) - rows[0].keys()):
        raise ValueError(
            f"{folder} was prepared by another version (no {', '.join(sorted(missing))} in "
            "labels.csv): prepare it again"
        )
    try:
        return {c: [row[c] if c in _TEXT else int(row[c]) for row in rows] for c in LABEL_COLUMNS}
    except (TypeError, ValueError):  # of a row that was cut off
        raise ValueError(
            f"{path} is damaged, a row lacks its end: prepare the data again"
        ) from None


def build_id(folder: str | Path) -> str:
    """Returns a digest of labels.csv, which tells what is in which record of a prepared folder."""
    with _labels_file(folder).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_transform_id(folder: str | Path) -> str:
    """Returns what was done to the pictures of a prepared folder ('' for nothing)."""
    return read_account(folder).get("transform_id", "")


def read_account(folder: str | Path) -> dict[str, Any]:
    """Returns what `prepare` told of a folder; raises ValueError where that is gone or damaged."""
    path = Path(folder) / "prepare.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): prepare the data again") from None


def _labels_file(folder: str | Path) -> Path:
    path = Path(folder) / "labels.csv"
    if not path.is_file():
        raise _unprepared(folder, path.name)
    return path


def records_folder(folder: str | Path) -> Path:
    """Returns the folder of TFDS files inside a prepared folder; raises FileNotFoundError."""
    found = sorted(Path(folder).glob("tfds/*/*/dataset_info.json"))
    if not found:
        raise _unprepared(folder, "tfds/")
    return found[-1].parent


def _unprepared(folder: str | Path, lacks: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"{folder} holds no prepared data ({lacks}): prepare it first, as in "
        "coatnet-jax prepare UTKFace.zip, or say where it was built with --root (in a training "
        "--config.data.root)"
    )

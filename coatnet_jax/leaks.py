"""What a run was trained on, and whether any of it is among the faces it is judged by."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from coatnet_jax.config import read_json
from input_pipeline.pipeline import Faces, open_split


def training_splits(run_dir: Path, folder: Path, splits: str) -> str:
    """The table of splits in `folder` which the run was trained on: `splits`, as its config says.

    Where that table is another now than at the training (its fingerprint says so: the data were
    prepared again), the one that is the same under another name. Raises ValueError where there is
    none, FileNotFoundError where the data set is not there.
    """
    wanted = _trained_fingerprint(run_dir)
    if not (folder / "labels.csv").is_file():
        raise FileNotFoundError(
            f"{folder} is missing, which {run_dir} was trained on: without its training faces "
            "nothing can be said of overlap; prepare it, or name its folder with --root"
        )
    found = open_split(folder, "train", splits=splits).fingerprint
    if wanted in ("", found):
        return splits
    for path in sorted((folder / "splits").glob("*.csv")):
        if open_split(folder, "train", splits=path.stem).fingerprint == wanted:
            return path.stem
    raise ValueError(
        f"{run_dir} was trained on data of fingerprint {wanted[:16]}, but the splits {splits!r} of "
        f"{folder} have {found[:16]} and no other table there fits: prepare the data as they were, "
        "giving the old table with --splits old=CSV"
    )


def trained_on(faces: Faces, train: Faces) -> Bool[np.ndarray, " n"]:
    """Which of `faces` have the pixels of a face in `train`."""
    return np.isin(faces.labels["pixel_hash"], train.labels["pixel_hash"])


def check_no_leak(faces: Faces, train: Faces, *, run_dir: Path) -> dict[str, Any]:
    """Counts of the comparison, by pixel hash; raises ValueError where a face was trained on.

    Some published protocols put one of two identical files into training and the other into the
    test. Where both splits are of the same table and share no file, such copies are `identical` in
    the counts and no error: the protocol is evaluated as it is, and the score without them beside.
    """
    trained = trained_on(faces, train)
    shared = np.isin(faces.labels["file"], train.labels["file"])
    torn = faces.fingerprint == train.fingerprint and not shared.any()
    if trained.any() and not torn:
        raise ValueError(
            f"{int(trained.sum()):,} of the {len(faces):,} faces of {faces.folder} "
            f"({faces.split}) were in the training split of {run_dir}: evaluate it on a split that "
            "it was not trained on"
        )
    return {
        "training_faces": len(train),
        "evaluated_faces": len(faces),
        "identical": int(trained.sum()),
    }


def _trained_fingerprint(run_dir: Path) -> str:
    path = Path(run_dir) / "run.json"
    return read_json(path).get("data_fingerprint", "") if path.is_file() else ""

"""What a run was trained on, and whether any of it is among the faces it is judged by."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from jaxtyping import Bool

from coatnet_jax.config import read_json
from coatnet_jax.lineage import stages_before
from coatnet_jax.ssl.methods import METHODS
from input_pipeline.pipeline import Faces, open_split


def open_trained(run_dir: Path, folder: Path, splits: str) -> tuple[Faces, str]:
    """(the training split of the run, its table of splits in `folder`: `splits`, as its config
    says).

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
    train = open_split(folder, "train", splits=splits)
    if wanted in ("", found := train.fingerprint):
        return train, splits
    for path in sorted((folder / "splits").glob("*.csv")):
        # A table without a training split, as of a benchmark's test faces, is none to train on.
        train, other = open_stage({"splits": path.stem}, folder)
        if train and train.fingerprint == wanted:
            return train, other
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
        refuse_trained_on(int(trained.sum()), faces, run_dir=run_dir)
    return {
        "training_faces": len(train),
        "evaluated_faces": len(faces),
        "identical": int(trained.sum()),
    }


def refuse_trained_on(count: int, faces: Faces, *, run_dir: Path, by: str = "") -> NoReturn:
    """Raise the ValueError that says that `count` of the faces were trained on, `by` the run or by
    what stands in a relation to it."""
    raise ValueError(
        f"{count:,} of the {len(faces):,} faces of {faces.folder} ({faces.split}) were in the "
        f"training split of {f'{by} ' if by else ''}{run_dir}: evaluate it on a split that it was "
        "not trained on"
    )


def check_stages_before(
    faces: Faces, run_dir: Path, folder: Path, *, fingerprint: str
) -> list[dict[str, Any]] | None:
    """How many of `faces` the stages before the run saw: stage, data, splits, and `seen` of each
    that was trained on other faces than the run, whose `fingerprint` is given; sets of other names
    are looked for beside `folder`.

    `seen` is None where the faces are not there any more, the whole is None where the folder of a
    stage is gone. Raises ValueError where ages of these faces were learned: their pictures alone,
    as self-supervised methods see them, are counted.
    """
    try:
        stages = stages_before(run_dir)
    except ValueError as error:
        print(f"not known whether an earlier stage saw these faces: {error}")
        return None
    found = []
    for stage in stages:
        if "data" not in stage or stage.get("fingerprint") == fingerprint:
            continue
        train, splits = open_stage(stage, folder.with_name(stage["data"]))
        same = train and stage.get("fingerprint", "") in ("", train.fingerprint)
        seen = int(trained_on(faces, train).sum()) if same else None
        told = {"stage": stage["stage"], "data": stage["data"], "splits": splits}
        found.append(told | {"seen": seen})
        if seen and learned_ages(stage):
            raise ValueError(
                f"{seen:,} of the {len(faces):,} faces of {faces.folder} ({faces.split}) were in "
                f"the training split {splits!r} of {stage['data']}, of a {stage['stage']} stage "
                f"before {run_dir}: evaluate it on faces that no stage was trained on"
            )
    return found


def open_stage(stage: Mapping[str, Any], folder: Path) -> tuple[Faces | None, str]:
    """(the training split of a stage before, its table of splits), from the data in `folder`; None
    where those or the table are not there any more. A stage that names no table is an old one."""
    splits = stage.get("splits", "default")
    try:
        return open_split(folder, "train", splits=splits), splits
    except (FileNotFoundError, ValueError):
        return None, splits


def learned_ages(stage: Mapping[str, Any]) -> bool:
    """Whether a stage was told ages; a pre-training that names no method is an old one, SimCLR."""
    if stage["stage"] == "pretrain":
        return METHODS[stage.get("method", "simclr")].labelled
    return stage["stage"] == "finetune"


def _trained_fingerprint(run_dir: Path) -> str:
    return read_json(Path(run_dir) / "run.json", optional=True).get("data_fingerprint", "")

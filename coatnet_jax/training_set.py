"""What a run was trained on, to hold a test against: prepared data, or what a release keeps of it.

A released model is often judged where its training faces are not. Beside its weights lie 64 bits of
the pixel hash of every training face, which tell whether a picture is that very one and nothing
else about it, and how many faces had each age, gender and race.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from jaxtyping import Bool, Int, UInt64

from coatnet_jax.ages import N_AGES
from coatnet_jax.config import read_config, read_json
from coatnet_jax.heads import N_GENDERS, N_RACES
from coatnet_jax.leaks import (
    check_no_leak,
    check_stages_before,
    learned_ages,
    open_stage,
    open_trained,
    refuse_trained_on,
    trained_on,
)
from coatnet_jax.lineage import folders_behind, stages_before, stages_behind
from coatnet_jax.weight_files import read_weights, write_weights
from input_pipeline.pipeline import Faces, open_split

FILE = "training_faces.safetensors"
LABELS = {"age": N_AGES, "gender": N_GENDERS, "race": N_RACES}


@dataclass(frozen=True)
class TrainingSet:
    """The table of splits, its fingerprint, and age, gender and race int [n] (-1: unknown) of the
    training faces; `train` and `validation` where the data are here, else `hashes` of a release."""

    splits: str
    fingerprint: str
    labels: Mapping[str, Int[np.ndarray, " n"]]
    train: Faces | None = None
    validation: Faces | None = None
    hashes: UInt64[np.ndarray, " m"] | None = None

    def check(self, faces: Faces, *, run_dir: Path, folder: Path) -> dict[str, Any]:
        """Counts of the comparison with `faces`, as `check_no_leak` gives them, and under `before`
        those of `check_stages_before`. Raises ValueError where faces were trained on."""
        if self.train is not None:
            counts = check_no_leak(faces, self.train, run_dir=run_dir)
            before = check_stages_before(faces, run_dir, folder, fingerprint=self.fingerprint)
            released = kept_by_releases(faces, read_config(run_dir / "config.json"))
            if seen := int((released & ~trained_on(faces, self.train)).sum()):
                refuse_trained_on(seen, faces, run_dir=run_dir, by="a released model behind")
            return counts | {"before": before}
        seen = int(np.isin(short_hashes(faces.labels["pixel_hash"]), self.hashes).sum())
        if seen:
            refuse_trained_on(seen, faces, run_dir=run_dir)
        return {
            "training_faces": len(self.labels["age"]),
            "evaluated_faces": len(faces),
            "identical": 0,
            "before": [],  # their faces are among the hashes
        }


def open_training_set(run_dir: Path, folder: Path, splits: str) -> TrainingSet:
    """What the run was trained on, from the data in `folder`; where those are missing or others,
    from what a released model keeps. `splits` is the table that the run's config names.

    Raises as `open_trained` does where neither is there.
    """
    try:
        train, splits = open_trained(run_dir, folder, splits)
    except (FileNotFoundError, ValueError):
        if not (run_dir / FILE).is_file():
            raise
        told = read_json(run_dir / "run.json", wants=("data_fingerprint",))
        labels, hashes = read_record(run_dir)
        return TrainingSet(splits, told["data_fingerprint"], labels, hashes=hashes)
    validation = open_split(folder, "validation", splits=splits)
    told = told_before(validation, read_config(run_dir / "config.json"), run_dir, folder)
    if told.any():
        print(
            f"{told.sum():,} of the {len(told):,} validation faces calibrate no intervals: an "
            "earlier stage was told their ages"
        )
        validation = validation.take(~told)
    return TrainingSet(splits, train.fingerprint, train.labels, train, validation)


def told_before(
    faces: Faces, config: ml_collections.ConfigDict, run_dir: Path, folder: Path
) -> Bool[np.ndarray, " n"]:
    """Of which of `faces`, of the run's own table of splits in `folder`, the stages before a run of
    this config, or its teachers, were told the ages.

    By pixel hash, from the tables of those stages as far as they are here and from what released
    models keep. Faces of the run's own training split are its own affair (`check_no_leak`).
    """
    told = kept_by_releases(faces, config)
    for data, splits, print_ in labelled_before(config, run_dir):
        if print_ == faces.fingerprint:
            continue
        train, _ = open_stage({"splits": splits}, folder.with_name(data))
        if train and print_ in ("", train.fingerprint):
            told |= trained_on(faces, train)
    return told


def labelled_before(config: ml_collections.ConfigDict, run_dir: Path) -> set[tuple[str, str, str]]:
    """(data, table of splits, fingerprint) of the stages before a run of this config, and of its
    teachers, that were told ages; none where the folder of one is gone and `run_dir` does not tell.
    """
    try:
        begun = (run_dir / "run.json").is_file()
        stages = stages_before(run_dir) if begun else stages_behind(config)
    except ValueError:
        return set()
    return {
        (stage["data"], stage.get("splits", "default"), stage.get("fingerprint", ""))
        for stage in stages
        if learned_ages(stage)
    }


def kept_by_releases(faces: Faces, config: ml_collections.ConfigDict) -> Bool[np.ndarray, " n"]:
    """Which of `faces` the released models behind a run of this config say they were trained on."""
    found = np.zeros(len(faces), bool)
    for folder in folders_behind(config):
        if (folder / FILE).is_file():
            found |= np.isin(short_hashes(faces.labels["pixel_hash"]), read_record(folder)[1])
    return found


def write_record(out: Path, run_dir: Path, folder: Path, splits: str) -> None:
    """Write what `out`, the release of a run, is to keep of the training faces in `folder`, and of
    those of the stages before that were told ages.

    Raises as `open_trained` does; a stage whose faces are not here any more is named.
    """
    train, _ = open_trained(run_dir, folder, splits)
    hashes = [short_hashes(train.labels["pixel_hash"])]
    for stage in stages_before(run_dir):
        if not learned_ages(stage) or stage.get("fingerprint") == train.fingerprint:
            continue
        faces, table = open_stage(stage, folder.with_name(stage["data"]))
        if faces is None:
            where = f"{stage['data']} ({table})"
            print(f"the faces of the stage on {where} are not here: left out of {FILE}")
            continue
        hashes.append(short_hashes(faces.labels["pixel_hash"]))
    counts = {
        # The first one counts the unknown.
        name: np.bincount(train.labels[name] + 1, minlength=1 + size).astype(np.int32)
        for name, size in LABELS.items()
    }
    arrays = {"hashes": np.unique(np.concatenate(hashes)), **counts}
    write_weights(out / FILE, arrays, metadata={})


def read_record(run_dir: Path) -> tuple[dict[str, np.ndarray], UInt64[np.ndarray, " m"]]:
    """(age, gender and race of the training faces, in no order of theirs, hashes) of a release.

    Raises ValueError where the file is damaged.
    """
    arrays = read_weights(run_dir / FILE)
    if missing := sorted({"hashes", *LABELS} - arrays.keys()):
        raise ValueError(f"{run_dir / FILE} is damaged: it lacks {', '.join(missing)}")
    labels = {
        name: np.repeat(np.arange(-1, len(arrays[name]) - 1), arrays[name]) for name in LABELS
    }
    return labels, arrays["hashes"]


def short_hashes(hashes: Sequence[str]) -> UInt64[np.ndarray, " n"]:
    """The first 64 bits of pixel hashes, which are written in hexadecimal."""
    return np.array([int(text[:16], 16) for text in hashes], np.uint64)

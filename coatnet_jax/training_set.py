"""What a run was trained on, to hold a test against: prepared data, or what a release keeps of it.

A released model is often judged where its training faces are not. Beside its weights lie 64 bits of
the pixel hash of every training face, which tell whether a picture is that very one and nothing
else about it, and how many faces had each age, gender and race.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from coatnet_jax.lineage import folders_behind, own_stage, stages_before, stages_behind
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
            kept = kept_by_releases(read_config(run_dir / "config.json"))
            released = kept_among(faces.labels["pixel_hash"], kept)
            if seen := int((released & ~trained_on(faces, self.train)).sum()):
                refuse_trained_on(seen, faces, run_dir=run_dir, by="a released model behind")
            return counts | {"before": before}
        seen = int(kept_among(faces.labels["pixel_hash"], self.hashes).sum())
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
    config = read_config(run_dir / "config.json")
    told = told_before(config, run_dir, folder, own=train.fingerprint).among(validation)
    if told.any():
        print(
            f"{told.sum():,} of the {len(told):,} validation faces calibrate no intervals: an "
            "earlier stage was told their ages"
        )
        validation = validation.take(~told)
    return TrainingSet(splits, train.fingerprint, train.labels, train, validation)


@dataclass(frozen=True)
class ToldAges:
    """Whose ages were told to some stages: the pixel hashes of their training faces as far as the
    data are here, the short ones that released models keep, and the names of the tables of splits.
    """

    hashes: Sequence[str]
    released: UInt64[np.ndarray, " m"]
    splits: tuple[str, ...]

    def among(self, faces: Faces) -> Bool[np.ndarray, " n"]:
        """Which of `faces` are such."""
        pixel_hashes = faces.labels["pixel_hash"]
        return np.isin(pixel_hashes, self.hashes) | kept_among(pixel_hashes, self.released)


def told_before(
    config: ml_collections.ConfigDict, run_dir: Path, folder: Path, *, own: str | None = None
) -> ToldAges:
    """The faces of which the stages before a run of this config, or its teachers, were told ages.

    From the tables of those stages, in `folder` or beside it, and from what released models keep.
    A table with the fingerprint `own`, that of the run itself, is left out: the training split of
    that one is the run's own affair (`check_no_leak`). Where the folder of a stage is gone and
    `run_dir` does not tell of it, nothing is found.
    """
    begun = (run_dir / "run.json").is_file()
    try:
        stages = stages_before(run_dir) if begun else stages_behind(config)
    except ValueError:
        stages = []
    tables = {
        (stage["data"], stage.get("splits", "default"), stage.get("fingerprint", ""))
        for stage in stages
        if learned_ages(stage)
    }
    hashes = [
        train.labels["pixel_hash"]
        for name, splits, fingerprint in sorted(tables)
        if fingerprint != own
        and (train := open_stage({"splits": splits}, folder.with_name(name))[0])
        and fingerprint in ("", train.fingerprint)
    ]
    return ToldAges(
        np.concatenate(hashes) if hashes else (),
        kept_by_releases(config),
        tuple(sorted({splits for _, splits, _ in tables})),
    )


def told_so_far(run_dir: Path, folder: Path) -> ToldAges:
    """The faces of which the run, the stages before it or its teachers were told ages: those of
    `told_before` and, where the run learned from ages, those of its own training split.

    Raises as `open_trained` does where neither that split nor a release's record of it is here.
    """
    config = read_config(run_dir / "config.json")
    if (run_dir / FILE).is_file():
        before = told_before(config, run_dir, folder)
        return replace(before, released=np.append(before.released, read_record(run_dir)[1]))
    if not learned_ages(own_stage(run_dir)):
        return told_before(config, run_dir, folder)
    train, _ = open_trained(run_dir, folder.with_name(config.data.name), config.data.splits)
    before = told_before(config, run_dir, folder, own=train.fingerprint)
    return replace(before, hashes=[*before.hashes, *train.labels["pixel_hash"]])


def kept_by_releases(config: ml_collections.ConfigDict) -> UInt64[np.ndarray, " m"]:
    """Hashes of the faces that the released models behind a run of this config were trained on."""
    kept = [
        read_record(folder)[1] for folder in folders_behind(config) if (folder / FILE).is_file()
    ]
    return np.concatenate(kept) if kept else np.zeros(0, np.uint64)


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


def kept_among(hashes: Sequence[str], kept: UInt64[np.ndarray, " m"]) -> Bool[np.ndarray, " n"]:
    """Which pixel hashes, in full, are among the short ones that released models keep; where none
    keeps any, as behind most runs, they need not be shortened."""
    if not len(kept):
        return np.zeros(len(hashes), bool)
    return np.isin(short_hashes(hashes), kept)


def short_hashes(hashes: Sequence[str]) -> UInt64[np.ndarray, " n"]:
    """The first 64 bits of pixel hashes, which are written in hexadecimal."""
    return np.array([int(text[:16], 16) for text in hashes], np.uint64)

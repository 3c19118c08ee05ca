"""A downloaded face set made ready once: records, labels, splits, and an account of every file.

root/name/tfds/<builder>/2.0.0/   array_record files as TFDS writes them
root/name/labels.csv              a row per record, in record order
root/name/splits/<protocol>.csv   file, pixel_hash, split
root/name/skipped.csv             every file left out, and why
root/name/conflicts.csv           copies of one picture whose labels disagree
root/name/rows_without_image.csv  where a label table has such rows
root/name/prepare.json            counts, fingerprints, versions
"""

import contextlib
import csv
import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from input_pipeline.account import summary, write_account
from input_pipeline.agedb.agedb_dataset_builder import Builder as AgeDBBuilder
from input_pipeline.archive import (
    ARCHIVE_WITHIN,
    NO_IMAGE,
    OF_A_MAC,
    Source,
    count_files,
    describe,
    resolve_source,
)
from input_pipeline.face_builder import FaceBuilder
from input_pipeline.folder.folder_dataset_builder import Builder as FolderBuilder
from input_pipeline.layouts import find_layout, no_images, shown
from input_pipeline.prepared import read_labels, read_transform_id, records_folder
from input_pipeline.progress import Count, Progress
from input_pipeline.protocols import check_given
from input_pipeline.scan import Reading, Transform
from input_pipeline.splits import copy_without
from input_pipeline.utkface.utkface_dataset_builder import Builder as UTKFaceBuilder

__all__ = ["prepare", "read_labels", "read_transform_id", "records_folder", "summary"]

FORMAT = 2
_BUILDERS = {"utkface": UTKFaceBuilder, "agedb": AgeDBBuilder}
_TABLES = ("labels.csv", "skipped.csv", "conflicts.csv", "rows_without_image.csv")
_OURS = {"tfds", "splits", "prepare.json", *_TABLES}
_DESKTOP = (".DS_Store", "Thumbs.db")  # what a desktop leaves in folders that it has shown
_OLD = "-old"  # ends the name of a set that is moved aside while another takes its place


def prepare(
    source: Source,
    root: str | Path,
    *,
    name: str = "",
    layout: str = "auto",
    labels: Sequence[str | Path] = (),
    age_column: str = "",
    splits: Mapping[str, str | Path] | None = None,
    drop_conflicts: int | None = None,
    seed: int = 0,
    transform: Transform | None = None,
    transform_id: str = "",
    beam_runner: str = "",
    beam_options: Sequence[str] = (),
    progress: Progress | None = print,
) -> dict[str, Any]:
    """Builds `root/name` from the images in `source` and returns what prepare.json holds.

    `source` is a folder, a zip, a tar, a glob or a list of tars (`archive.resolve_source`);
    `layout`, `labels` and `age_column` say how their ages are given (`layouts.find_layout`), and
    `name` is the layout's unless it is given. The same source and settings prepared before are
    reused, with a line saying so; others replace it. The folder appears only when it is complete.
    `progress` gets lines of text; None is silent.

    `splits` are CSV files of protocols to add, by name, looked at before any picture is read;
    `drop_conflicts` leaves copies of a picture whose ages lie more than so many years apart out of
    all splits.

    `transform` is a picklable function from the bytes of a file to the bytes that are kept (a face
    crop, say), which raises ValueError with the reason to leave a file out. `transform_id` names it
    with its settings and version: it is part of prepare.json, of what tells whether a folder can be
    reused, and of the fingerprint.

    With `beam_runner` (such as 'DirectRunner') the records are made by Apache Beam with these
    options; they and the splits are the same.

    Raises FileNotFoundError or ValueError, with one clear line, when there is nothing to prepare.
    """
    progress = progress or (lambda line: None)
    splits = {key: Path(os.path.expanduser(path)) for key, path in (splits or {}).items()}
    _check_settings(transform, transform_id, beam_runner, drop_conflicts, splits)
    root = Path(os.path.expanduser(root))
    _check_place(root, name, source)
    found_layout = find_layout(source, layout=layout, labels=labels, age_column=age_column)
    folder = root / (name or found_layout.name)
    settings = {
        "name": folder.name,
        "layout": found_layout.name,
        "seed": seed,
        "drop_conflicts": drop_conflicts,
        "transform_id": transform_id,
    }
    files = [*labels, *splits.values()]
    source_id = _source_id(source, [FORMAT, settings, age_column, *splits], files)
    if ready := _reuse(folder, source_id, progress):
        return ready
    progress(f"reading {found_layout.about}")
    partial, lock = _partial_folder(folder)
    try:
        reading = Reading(found_layout.read_label, found_layout.short_name, transform)
        builder = _BUILDERS.get(found_layout.name, FolderBuilder)
        if beam_runner:
            skipped = _build_with_beam(
                builder, source, reading, partial, runner=beam_runner, options=beam_options
            )
        else:
            skipped = _build_records(builder, source, reading, partial, progress)
        account = write_account(
            partial,
            skipped,
            layout=found_layout,
            seed=seed,
            drop_conflicts=drop_conflicts,
            splits=splits,
            transform_id=transform_id,
        )
        info = {"format": FORMAT, **settings, **account}
        info |= {"source_id": source_id, "versions": _versions()}
        info["bytes"] = _sizes(partial, info["protocols"])
        (partial / "prepare.json").write_text(json.dumps(info, indent=2) + "\n")
        _keep_other_splits(folder, partial, info["protocols"], progress)
        _put_in_place(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)
    progress(summary(info))
    progress(f"written to {folder}")
    return info


def _check_settings(
    transform: Transform | None,
    transform_id: str,
    beam_runner: str,
    drop_conflicts: int | None,
    splits: Mapping[str, Path],
) -> None:
    if bool(transform) != bool(transform_id):
        raise ValueError("a transform and its transform_id go together: give both or neither")
    if drop_conflicts is not None and drop_conflicts < 0:
        raise ValueError(f"drop_conflicts must be 0 years or more, got {drop_conflicts}")
    if beam_runner and not importlib.util.find_spec("apache_beam"):
        raise ValueError("Apache Beam is not installed: pip install 'coatnet-jax[beam]'")
    for name in splits:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(f"splits name {name!r} must be a plain word, such as 'utkface_21_60'")
    check_given(splits)


def _check_place(root: Path, name: str, source: Source) -> None:
    folder = root / name
    if name != Path(name).name or name.startswith("."):
        raise ValueError(f"data name {name!r} must be a plain folder name, such as 'utkface'")
    if root.is_symlink() and not root.exists():
        raise ValueError(f"{root} is a link to nothing or to itself: choose another root")
    for path in resolve_source(source):
        if path.is_dir() and folder.resolve().is_relative_to(path.resolve()):
            raise ValueError(f"{folder} lies within the source {path}: choose another root")


def _source_id(source: Source, settings: Sequence[Any], files: Sequence[str | Path]) -> str:
    """Identifies a source by its files' names, sizes and times, wherever it lies, and how it is
    read: the settings and the content of the tables beside it."""
    tables = [hashlib.sha256(Path(os.path.expanduser(f)).read_bytes()).hexdigest() for f in files]
    facts = [*settings, tables, describe(source)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _reuse(folder: Path, source_id: str, progress: Progress) -> dict[str, Any] | None:
    """Returns prepare.json of a folder made from this source, or None to build it (again)."""
    if not folder.exists():
        return None
    foreign = sorted({entry.name for entry in folder.iterdir()} - _OURS - {*_DESKTOP})
    if foreign:
        raise ValueError(
            f"{folder} holds other files ({', '.join(foreign[:3])}): prepare did not make it, and "
            "leaves it alone; choose another root or name"
        )
    try:
        info = json.loads((folder / "prepare.json").read_text())
        if info["format"] != FORMAT:
            progress(f"{folder} was made by another version: building it again")
            return None
        whole = info["bytes"] == _sizes(folder, info["protocols"])
    except (OSError, ValueError, KeyError):
        whole = False
    if not whole:
        progress(f"{folder} is not complete: building it again")
        return None
    if info["source_id"] != source_id:
        progress(f"{folder} was made from another source or settings: building it again")
        return None
    progress(f"{folder} is ready: {info['kept']:,} images, fingerprint {info['fingerprint'][:16]}")
    return info


def _sizes(folder: Path, protocols: Mapping[str, Any]) -> dict[str, int]:
    """Returns the size of every file that prepare writes, but for prepare.json itself."""
    tables = [folder / name for name in _TABLES if (folder / name).exists()]
    splits = [folder / "splits" / f"{name}.csv" for name in protocols]
    files = [*folder.glob("tfds/*/*/*"), *tables, *splits]
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in sorted(files)}


def _partial_folder(folder: Path) -> tuple[Path, int]:
    """Returns a fresh folder beside the final one and its lock, a descriptor to close at the end.

    What processes that died have left is removed; a set that one of them had moved aside, and no
    other taken the place of, is put back.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    stem = f".{folder.name}.partial-"
    left = [path for path in folder.parent.glob(f"{stem}*") if not path.name.endswith(_OLD)]
    kept = {path for path in left if not _is_abandoned(path, stem)}
    for old in folder.parent.glob(f"{stem}*{_OLD}"):
        if old.with_name(old.name.removesuffix(_OLD)) in kept:
            continue
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(folder)
    for path in left:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)
    partial = folder.parent / f"{stem}{os.getpid()}-{secrets.token_hex(4)}"
    partial.mkdir()
    lock = os.open(partial, os.O_RDONLY)
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return partial, lock


def _is_abandoned(partial: Path, stem: str) -> bool:
    """Whether no process, of this machine or container or another, works in the folder."""
    try:
        lock = os.open(partial, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks, where the process tells
        pid = partial.name.removeprefix(stem).partition("-")[0]
        return pid.isdigit() and not _is_running(int(pid))
    finally:
        os.close(lock)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _build_records(
    builder_class: type[FaceBuilder],
    source: Source,
    reading: Reading,
    partial: Path,
    progress: Progress,
) -> list[tuple[str, str]]:
    """Writes the TFDS files; returns (path, reason) of the skipped ones."""
    skipped: list[tuple[str, str]] = []
    count = Count("prepared", count_files(source), "files", progress=progress)

    def on_skip(path: str, reason: str) -> None:
        skipped.append((path, reason))
        count()

    builder = builder_class(
        data_dir=partial / "tfds", source=source, reading=reading, on_skip=on_skip, on_keep=count
    )
    try:
        _download_and_prepare(builder, partial)
    except AssertionError as error:
        if count.n > len(skipped):
            raise
        # TFDS asserts that the generator yields something
        raise ValueError(_nothing_found(source, skipped)) from error
    return skipped


def _build_with_beam(
    builder_class: type[FaceBuilder],
    source: Source,
    reading: Reading,
    partial: Path,
    *,
    runner: str,
    options: Sequence[str],
) -> list[tuple[str, str]]:
    """Writes the TFDS files with Apache Beam; returns (path, reason) of the skipped files."""
    from apache_beam.options.pipeline_options import PipelineOptions

    from input_pipeline.beam_faces import read_skips

    skips = partial / "skips"
    builder = builder_class(
        data_dir=partial / "tfds", source=source, reading=reading, beam_skips=skips
    )
    try:
        _download_and_prepare(
            builder, partial, beam_runner=runner, beam_options=PipelineOptions(list(options))
        )
    except Exception as error:
        if "number of generated examples is 0" not in str(error):
            raise
        raise ValueError(
            f"{shown(source)}: none of its images can be used; prepare it without Beam to be told "
            "why"
        ) from error
    skipped = read_skips(skips)
    shutil.rmtree(skips, ignore_errors=True)
    return skipped


def _download_and_prepare(builder: FaceBuilder, partial: Path, **options) -> None:
    skip = tfds.download.ComputeStatsMode.SKIP
    tfds.disable_progress_bar()
    try:
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(compute_stats=skip, **options)
        )
    finally:
        tfds.enable_progress_bar()
    shutil.rmtree(partial / "tfds" / "downloads", ignore_errors=True)


def _nothing_found(source: Source, skipped: Sequence[tuple[str, str]]) -> str:
    """Says why no image was kept: none there, or none that could be used."""
    found = Counter(reason for _, reason in skipped)
    reasons = found.copy()
    for reason in (NO_IMAGE, OF_A_MAC, ARCHIVE_WITHIN):
        del reasons[reason]
    if not reasons:
        return no_images(source, found)
    reason, n = reasons.most_common(1)[0]
    return f"{shown(source)}: none of {reasons.total()} images can be used; {n} of them: {reason}"


def _versions() -> dict[str, str]:
    packages = ("tensorflow-datasets", "array_record", "opencv-python-headless", "numpy")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except ModuleNotFoundError:  # another build of the same library
            found[package] = "unknown"
    return found


def _keep_other_splits(
    folder: Path, partial: Path, protocols: Mapping[str, Any], progress: Progress
) -> None:
    """Copies split files that were added to the old folder, without the pictures dropped now."""
    added = [path for path in (folder / "splits").glob("*.csv") if path.stem not in protocols]
    if not added:
        return
    labels, dropped = read_labels(partial), _dropped(partial)
    shorter = [
        f"splits/{path.name}"
        for path in sorted(added)
        if copy_without(
            path, partial / "splits" / path.name, dropped, labels["file"], labels["pixel_hash"]
        )
    ]
    if shorter:
        progress(
            f"pictures dropped for their conflicting ages were left out of {', '.join(shorter)} too"
        )


def _dropped(folder: Path) -> set[str]:
    with (folder / "conflicts.csv").open(newline="", encoding="utf-8") as lines:
        return {row["file"] for row in csv.DictReader(lines) if row["kept"] == "dropped"}


def _put_in_place(partial: Path, folder: Path) -> None:
    """Renames the finished folder into place."""
    old = partial.with_name(partial.name + _OLD)
    while True:
        if folder.exists():
            folder.rename(old)
        try:
            partial.rename(folder)
            break
        except OSError as error:
            # Another process has put its own there meanwhile.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)

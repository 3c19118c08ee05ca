"""A downloaded face set made ready once: records, labels, splits, and an account of every file.

root/name/tfds/utkface/1.0.0/   array_record files as TFDS writes them
root/name/labels.csv            a row per record, in record order
root/name/splits/default.csv    file, pixel_hash, split
root/name/skipped.csv           every file left out, and why
root/name/prepare.json          counts, fingerprint, versions
"""

import csv
import hashlib
import json
import os
import platform
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from input_pipeline.archive import (
    IMAGE_SUFFIXES,
    Source,
    count_files,
    describe,
    resolve_source,
)
from input_pipeline.names import UTKFACE_PATTERN, parse_utkface_name
from input_pipeline.scan import Transform
from input_pipeline.splits import assign_splits, fingerprint, straddling_groups, write_splits
from input_pipeline.utkface.utkface_dataset_builder import Builder

FORMAT = 2
LABEL_COLUMNS = ("file", "age", "gender", "race", "pixel_hash", "height", "width")
_OURS = {"tfds", "labels.csv", "splits", "skipped.csv", "prepare.json"}
_CLASSES = (("<18", 0, 17), ("18-40", 18, 40), ("41-60", 41, 60), (">60", 61, 116))

Progress = Callable[[str], None]


def prepare(
    source: Source,
    root: str | Path,
    *,
    name: str,
    seed: int = 0,
    transform: Transform | None = None,
    transform_id: str = "",
    progress: Progress | None = print,
) -> dict[str, Any]:
    """Builds `root/name` from UTKFace images in `source` and returns what prepare.json holds.

    `source` is a folder, a zip, a tar, a glob or a list of tars (`archive.resolve_source`). The
    same source and seed prepared before is reused, with a line saying so; another source replaces
    it. The folder appears only when it is complete. `progress` gets lines of text; None is silent.

    `transform` is a picklable function from the bytes of a file to the bytes that are kept (a face
    crop, say), which raises ValueError with the reason to leave a file out. `transform_id` names it
    with its settings and version: it is part of prepare.json, of what tells whether a folder can be
    reused, and of the fingerprint.

    Raises FileNotFoundError or ValueError, with one clear line, when there is nothing to prepare.
    """
    progress = progress or (lambda line: None)
    folder = Path(root).expanduser() / name
    _check_place(folder, name, source)
    if bool(transform) != bool(transform_id):
        raise ValueError("a transform and its transform_id go together: give both or neither")
    source_id = _source_id(source, seed, transform_id)
    if ready := _reuse(folder, source_id, progress):
        return ready
    partial = _partial_folder(folder)
    try:
        found, skipped = _build_records(source, partial, progress, transform)
        info = _write_tables(
            partial,
            skipped,
            found=found,
            seed=seed,
            source_id=source_id,
            transform_id=transform_id,
        )
        _put_in_place(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    progress(summary(info))
    progress(f"written to {folder}")
    return info


def summary(info: dict[str, Any]) -> str:
    """Returns a table of what prepare.json holds: counts, reasons, duplicates, splits, classes."""
    found, kept = info["found"], info["kept"]
    lines = [f"{'found':<44}{found:>8,}", f"{'kept':<44}{kept:>8,}"]
    lines += [f"{'skipped: ' + reason:<44.43}{n:>8,}" for reason, n in info["skipped"].items()]
    lines += [
        f"{'groups of identical pictures':<44}{info['duplicate_groups']:>8,}",
        f"{'  files in them':<44}{info['duplicate_files']:>8,}",
        f"{'  groups that disagree on the age':<44}{info['conflicting_age_groups']:>8,}",
        f"{'groups in two splits':<44}{info['straddling_groups']:>8,}",
    ]
    lines += [f"{'split ' + split:<44}{n:>8,}" for split, n in info["splits"].items()]
    lines += [f"{'class ' + c:<44}{n:>8,}  {n / kept:6.1%}" for c, n in info["classes"].items()]
    lines.append(f"fingerprint {info['fingerprint'][:16]}")
    return "\n".join(lines)


def read_labels(folder: str | Path) -> dict[str, list]:
    """Returns the columns of labels.csv as lists, in record order; numbers are ints.

    Raises FileNotFoundError when the folder was not prepared.
    """
    path = Path(folder) / "labels.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no prepared data ({path.name}): prepare it first")
    with path.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    text = {"file", "pixel_hash"}
    return {c: [row[c] if c in text else int(row[c]) for row in rows] for c in LABEL_COLUMNS}


def read_transform_id(folder: str | Path) -> str:
    """Returns what was done to the pictures of a prepared folder ('' for nothing)."""
    return json.loads((Path(folder) / "prepare.json").read_text()).get("transform_id", "")


def records_folder(folder: str | Path) -> Path:
    """Returns the folder of TFDS files inside a prepared folder; raises FileNotFoundError."""
    found = sorted(Path(folder).glob("tfds/*/*/dataset_info.json"))
    if not found:
        raise FileNotFoundError(f"{folder} holds no prepared data (tfds/): prepare it first")
    return found[-1].parent


def _check_place(folder: Path, name: str, source: Source) -> None:
    if not name or name != Path(name).name or name.startswith("."):
        raise ValueError(f"data name {name!r} must be a plain folder name, such as 'utkface'")
    for path in resolve_source(source):
        if path.is_dir() and folder.resolve().is_relative_to(path.resolve()):
            raise ValueError(f"{folder} lies within the source {path}: choose another root")


def _source_id(source: Source, seed: int, transform_id: str) -> str:
    """Identifies a source by its files' names, sizes and times, wherever it lies."""
    facts = [FORMAT, seed, transform_id, describe(source)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _reuse(folder: Path, source_id: str, progress: Progress) -> dict[str, Any] | None:
    """Returns prepare.json of a folder made from this source, or None to build it (again)."""
    if not folder.exists():
        return None
    foreign = sorted({entry.name for entry in folder.iterdir()} - _OURS)
    if foreign:
        raise ValueError(
            f"{folder} holds other files ({', '.join(foreign[:3])}): prepare did not make it, and "
            "leaves it alone; choose another root or name"
        )
    try:
        info = json.loads((folder / "prepare.json").read_text())
        whole = info["bytes"] == _sizes(folder)
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


def _sizes(folder: Path) -> dict[str, int]:
    """Returns the size of every file that prepare writes, but for prepare.json itself."""
    files = [*folder.glob("tfds/*/*/*"), *folder.glob("*.csv"), folder / "splits" / "default.csv"]
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in sorted(files)}


def _partial_folder(folder: Path) -> Path:
    """Returns a fresh folder beside the final one, and removes those of processes that died."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    stem = f".{folder.name}.partial-"
    for old in folder.parent.glob(f"{stem}*"):
        pid = old.name.removeprefix(stem)
        if pid.isdigit() and (int(pid) == os.getpid() or not _is_running(int(pid))):
            shutil.rmtree(old, ignore_errors=True)
    partial = folder.parent / f"{stem}{os.getpid()}"
    partial.mkdir()
    return partial


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _build_records(
    source: Source, partial: Path, progress: Progress, transform: Transform | None
) -> tuple[int, list[tuple[str, str]]]:
    """Writes the TFDS files; returns how many files were met, and (path, reason) of the skipped."""
    skipped: list[tuple[str, str]] = []
    count = _Count(count_files(source), progress)

    def on_skip(path: str, reason: str) -> None:
        skipped.append((path, reason))
        count()

    builder = Builder(
        data_dir=partial / "tfds",
        source=source,
        on_skip=on_skip,
        on_keep=count,
        transform=transform,
    )
    config = tfds.download.DownloadConfig(compute_stats=tfds.download.ComputeStatsMode.SKIP)
    tfds.disable_progress_bar()
    try:
        builder.download_and_prepare(download_config=config)
    except AssertionError as error:
        if count.n > len(skipped):
            raise
        # TFDS asserts that the generator yields something
        raise ValueError(_nothing_found(source, skipped)) from error
    finally:
        tfds.enable_progress_bar()
    shutil.rmtree(partial / "tfds" / "downloads", ignore_errors=True)
    return count.n, skipped


class _Count:
    """Counts files and reports a line every two seconds: count, images/s, time left where known."""

    def __init__(self, total: int | None, progress: Progress):
        self.n, self.total, self.progress = 0, total, progress
        self.start = self.last = time.monotonic()

    def __call__(self) -> None:
        self.n += 1
        now = time.monotonic()
        if now - self.last < 2:
            return
        self.last = now
        speed = self.n / (now - self.start)
        of = f" of {self.total:,}" if self.total else ""
        left = f", {(self.total - self.n) / speed:.0f} s left" if self.total else ""
        self.progress(f"prepared {self.n:,}{of} files, {speed:,.0f}/s{left}")


def _nothing_found(source: Source, skipped: list[tuple[str, str]]) -> str:
    """Says why no image was kept: none there, none named as UTKFace, or none sound."""
    no_image = ("not an image file", "macOS metadata")
    images = [(path, reason) for path, reason in skipped if reason not in no_image]
    if not images:
        return f"{source} holds no images ({len(skipped)} other files)"
    misnamed = [path for path, _ in images if _is_misnamed(path)]
    if len(misnamed) == len(images):
        return (
            f"{source} has {len(misnamed)} images but none with a UTKFace name: found "
            f"{', '.join(misnamed[:3])}; expected {UTKFACE_PATTERN}"
        )
    reason, n = Counter(reason for _, reason in images).most_common(1)[0]
    return f"{source}: none of {len(images)} images can be used; {n} of them: {reason}"


def _is_misnamed(path: str) -> bool:
    try:
        parse_utkface_name(path)
    except ValueError:
        return path.lower().endswith(IMAGE_SUFFIXES)
    return False


def _write_tables(
    partial: Path,
    skipped: list[tuple[str, str]],
    *,
    found: int,
    seed: int,
    source_id: str,
    transform_id: str,
) -> dict[str, Any]:
    """Writes labels.csv, splits, skipped.csv and prepare.json; returns what the last holds."""
    labels = _labels_of_records(partial)
    if len(labels["file"]) + len(skipped) != found:
        raise RuntimeError(
            f"{found} files found, but {len(labels['file'])} kept and {len(skipped)} skipped"
        )
    with (partial / "labels.csv").open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(("index", *LABEL_COLUMNS))
        writer.writerows(zip(range(len(labels["file"])), *labels.values(), strict=True))
    with (partial / "skipped.csv").open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerows([("file", "reason"), *sorted(skipped)])
    splits = assign_splits(labels["pixel_hash"], labels["age"], seed=seed)
    (partial / "splits").mkdir()
    write_splits(
        partial / "splits" / "default.csv", labels["file"], labels["pixel_hash"], splits.tolist()
    )
    info = _account(labels, splits.tolist(), skipped, transform_id)
    info |= {"seed": seed, "transform_id": transform_id}
    info |= {"source_id": source_id, "versions": _versions()}
    info["bytes"] = _sizes(partial)
    (partial / "prepare.json").write_text(json.dumps(info, indent=2) + "\n")
    return info


def _labels_of_records(partial: Path) -> dict[str, list]:
    """Reads the labels back in record order, which TFDS chose by hashing the file names."""
    builder = tfds.builder_from_directory(records_folder(partial))
    skip = {"image": tfds.decode.SkipDecoding()}
    labels: dict[str, list] = {column: [] for column in LABEL_COLUMNS}
    for record in builder.as_data_source(split="faces", decoders=skip):
        for column, values in labels.items():
            value = record[column]
            values.append(value.decode() if isinstance(value, bytes) else int(value))
    return labels


def _account(
    labels: dict[str, list], splits: list[str], skipped: list[tuple[str, str]], transform_id: str
) -> dict:
    """Counts what was found: kept, skipped by reason, duplicates, splits, age classes."""
    hashes, ages = labels["pixel_hash"], labels["age"]
    groups = defaultdict(list)
    for key, age in zip(hashes, ages, strict=True):
        groups[key].append(age)
    copies = [found for found in groups.values() if len(found) > 1]
    reasons = Counter(reason.partition(" (")[0] for _, reason in skipped)
    sizes = Counter(splits)
    return {
        "format": FORMAT,
        "found": len(hashes) + len(skipped),
        "kept": len(hashes),
        "skipped": dict(reasons.most_common()),
        "duplicate_groups": len(copies),
        "duplicate_files": sum(map(len, copies)),
        "conflicting_age_groups": sum(len(set(found)) > 1 for found in copies),
        "straddling_groups": straddling_groups(hashes, splits),
        "splits": {split: sizes[split] for split in ("train", "validation", "test")},
        "classes": {c: sum(low <= age <= high for age in ages) for c, low, high in _CLASSES},
        "fingerprint": fingerprint(hashes, splits, transform_id=transform_id),
    }


def _versions() -> dict[str, str]:
    packages = ("tensorflow-datasets", "array_record", "opencv-python-headless", "numpy")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except ModuleNotFoundError:  # another build of the same library
            found[package] = "unknown"
    return found


def _put_in_place(partial: Path, folder: Path) -> None:
    """Renames the finished folder into place; split files added to the old one move over."""
    old = partial.with_name(partial.name + "-old")
    if folder.exists():
        for extra in (folder / "splits").glob("*.csv"):
            if extra.name != "default.csv":
                shutil.copy2(extra, partial / "splits" / extra.name)
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)

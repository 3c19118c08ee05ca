"""Ages of the faces in your own photos: a table, a CSV and annotated pictures.

With a detector every face of a photo is cut out like the crops that the model was trained on, and
gets a row. Without one each picture is taken as it is, its centre square: it should be such a crop.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from coatnet_jax import pictures
from coatnet_jax.ages import CLASS_NAMES, age_class, class_probabilities, get_decoder
from coatnet_jax.config import read_config
from coatnet_jax.conformal import conformal_interval, posterior_interval, read_constants
from coatnet_jax.inference import Run, load_run
from coatnet_jax.pages import write_csv
from coatnet_jax.release_weights import FILES
from input_pipeline.archive import walk_files
from input_pipeline.face_crops import (
    CROP,
    Face,
    Find,
    Geometry,
    alignment,
    displacement,
    encode_crop,
    misfit,
    read_photo,
    square_crop,
    too_small,
)
from input_pipeline.images import centre_square, decode_image
from input_pipeline.progress import Count

ENDINGS = {".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".tif", ".tiff", ".jfif"}
# Looked for in folders too, so that they are named as unreadable instead of passed over.
UNSUPPORTED = {".heic", ".heif", ".avif", ".gif"}
RUN_FILES = ("run.json", "checkpoints", *FILES)  # what tells the folder of a run
SHAPES = (1, 8, 32)  # sizes of a batch
ON_SHEET = 24
PART = "predictions.csv.part"  # the table while it grows
DRAWN = "drawn by coatnet-jax predict"  # a comment in annotated pictures, to know them by
LONGEST_NAME = 200  # bytes of the name of an annotated picture; most file systems take 255
CROP_SIDE = 400  # px; a square picture up to this may be a face crop in which no face is found
ENLARGED = 2.0  # a face is noted as small when its crop is enlarged by more than this


@dataclass(frozen=True, eq=False)
class Look:
    """What of a picture is shown to the model: the `number`th of `of` faces, or the whole of it."""

    path: Path
    face: Face | None = None
    geometry: Geometry | None = None  # None: the picture is taken whole
    number: int = 1
    of: int = 1
    note: str = ""  # why the age may be worse than usual

    def crop(self, image: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "s s 3"]:
        """The part of the picture, `size` px wide.

        A face comes as the crop that `prepare` would write of it, at the size of UTKFace's: cut out
        at once, it would be sharper than what was trained on.
        """
        if self.geometry is None:
            return centre_square(image, size)
        crop = square_crop(image, self.face, size=CROP, geometry=self.geometry)
        return decode_image(encode_crop(crop), size)


def split_run(paths: Sequence[str | Path]) -> tuple[Path | None, list[str | Path]]:
    """(folder of the run, pictures) of what the command line names: the first is a run if it holds
    a file of one, be others missing, else none is named."""
    first = Path(os.path.expanduser(paths[0]))
    if any((first / name).exists() for name in RUN_FILES) or _has_config(first):
        return first, list(paths[1:])
    return None, list(paths)


def _has_config(folder: Path) -> bool:
    """Whether a run's config lies there: other programs call theirs config.json too."""
    try:
        read_config(folder / "config.json")
    except (FileNotFoundError, ValueError):
        return False
    return True


def run(
    run_dir: str | Path,
    inputs: Sequence[str | Path],
    *,
    find: Find | None = None,
    out: str | Path | None = None,
    recursive: bool = True,
    annotate: bool = True,
    which: str = "best",
    batch_size: int = 32,
    programs: Path | None = None,
    true_ages: Mapping[Path, int] | None = None,
) -> list[dict[str, Any]]:
    """Predict the ages of the faces in image files and in the images of folders; a row for each.

    `find` gives the faces of a photo (`face_crops.Detector()`); None takes every picture whole.
    Prints a table and writes predictions.csv under `out` (default ./predictions), in place of what
    an earlier run wrote there; with `annotate` also annotated/*.jpg and predictions.png, a sheet of
    the first 24. What cannot be read or shows no face is listed with the reason, in skipped.csv
    too. Until it is whole the table is predictions.csv.part. `programs` is as in `inference.Run`.
    `true_ages` of files whose age is known are written on the sheet.
    Raises FileNotFoundError for a path that does not exist, ValueError when there is no row or the
    run has no age head.
    """
    out = Path(out) if out else Path("predictions")
    paths = find_images(inputs, recursive=recursive, out=out)
    # Few shapes, so that what was compiled for one number of pictures serves the next.
    batch_size = next((size for size in SHAPES if len(paths) <= size <= batch_size), batch_size)
    model = load_run(Path(run_dir), which=which, batch_size=batch_size, programs=programs)
    if model.stage != "finetune":
        raise ValueError(
            f"{run_dir} is a {model.stage} run without an age head; predict with a finetune run"
        )
    constants = read_constants(Path(run_dir), step=model.step)
    clear(out, keep=paths)
    part = out / PART

    def write(new: Sequence[Mapping[str, Any]]) -> None:
        plain = [{key: row[key] for key in row if key != "look"} for row in new]
        write_csv(part, plain, more=part.exists())

    try:
        rows, skipped = predict_files(
            model, paths, find=find, batch_size=batch_size, constants=constants, write=write
        )
    except BaseException:
        if part.exists():
            print(f"not finished: the ages so far are in {part}")
        raise
    if not rows:
        wanted = "shows a face that can be used" if find else "is a readable image"
        raise ValueError(f"none of {len(paths)} files {wanted}; {_reason(skipped)}")
    part.replace(out / "predictions.csv")
    if skipped:
        write_csv(out / "skipped.csv", skipped)
    print(table(rows, skipped))
    if not constants:
        print(
            "intervals are the model's own (posterior), not calibrated: coatnet-jax evaluate "
            f"{run_dir} calibrates them"
        )
    if model.answers_one_age:
        no_doubt = "is about as wide for every face" if constants else "measures no doubt"
        print(f"trained to give one age, not a distribution: the 90 % interval {no_doubt}")
    if annotate:
        write_pictures(out, rows, true_ages or {})
    also = ", predictions.png and annotated/" if annotate else ""
    images = len({row["file"] for row in rows})
    faces = f"{_counted(len(rows), 'face')} in " if find else ""
    print(f"answered by {run_dir}, step {model.step}")
    told = f"{faces}{images} of {_counted(len(paths), 'image')}"
    print(f"{told}; written to {out}: predictions.csv{also}")
    return rows


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


# --- files ---------------------------------------------------------------------------------------


def find_images(
    inputs: Sequence[str | Path], *, recursive: bool = True, out: str | Path | None = None
) -> list[Path]:
    """The files to read, each once: files as given, folders searched by ending and sorted, linked
    ones too.

    What an earlier run drew under `out` is not taken for input. Raises FileNotFoundError for a
    missing path, PermissionError for a folder that may not be listed, ValueError when there is
    nothing to read.
    """
    if not inputs:
        raise ValueError("no images given: name image files or folders")
    found: dict[Path, Path] = {}
    for name in inputs:
        path = Path(os.path.expanduser(name))
        if path.is_dir():
            for file in _images_in(path, recursive=recursive, out=Path(out) if out else None):
                found.setdefault(_real(file), file)
        elif path.exists():
            found.setdefault(_real(path), path)
        else:
            raise FileNotFoundError(
                f"{path} does not exist: name image files or folders, and before them the folder "
                "of a fine-tuning run if it is to be another model than the package's"
            )
    if not found:
        folders = ", ".join(str(name) for name in inputs)
        known = " ".join(sorted(ENDINGS))
        raise ValueError(f"no images in {folders} (looked for {known})")
    return list(found.values())


def _images_in(folder: Path, *, recursive: bool, out: Path | None) -> Iterator[Path]:
    ours = {_real(out / name) for name in ("annotated", "predictions.png")} if out else set()
    found = map(folder.joinpath, walk_files(folder)) if recursive else folder.iterdir()
    for file in sorted(found):
        if file.suffix.lower() not in ENDINGS | UNSUPPORTED or file.name.startswith("."):
            continue
        if not file.exists() and file.is_symlink():
            yield file  # a link to nothing or to itself: reading it says so
        elif file.is_file() and not ours & {_real(file), *_real(file).parents}:
            yield file


def _real(path: Path) -> Path:
    """The path behind all links; as `Path.resolve`, which fails on a link to itself."""
    return Path(os.path.realpath(path))


def _read(path: Path) -> UInt8[np.ndarray, "h w 3"]:
    """The file's upright RGB pixels; ValueError with the reason where there are none."""
    if path.suffix.lower() in UNSUPPORTED:
        raise ValueError(f"{path.suffix.lower()} files are not supported: save it as JPEG or PNG")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None
    if not data:
        raise ValueError("the file is empty")
    return read_photo(data)


def clear(out: Path, *, keep: Sequence[Path] = ()) -> None:
    """Remove what an earlier run wrote under `out`, but for the files to `keep`: the results of two
    runs would be taken for one's. Of annotated/ only pictures that predict has drawn."""
    written = [out / name for name in ("predictions.csv", PART, "skipped.csv", "predictions.png")]
    written += [path for path in (out / "annotated").glob("*.jpg") if _is_drawn(path)]
    kept = {_real(path) for path in keep}
    for path in written:
        if _real(path) not in kept:
            path.unlink(missing_ok=True)


def _is_drawn(path: Path) -> bool:
    """Whether the JPEG begins with our comment."""
    if not (path.is_file() and os.access(path, os.R_OK)):
        return False
    with path.open("rb") as file:
        return DRAWN.encode() in file.read(256)


# --- faces ---------------------------------------------------------------------------------------


def looks_at(
    path: Path, image: UInt8[np.ndarray, "h w 3"], faces: Sequence[Face], *, model: Run
) -> tuple[list[Look], list[str]]:
    """(what to show to the model of a photo's faces, why the photo or a face is left out).

    A picture whose landmarks stand as near to the model's geometry as those of 99 of 100 training
    crops is a crop already, and is taken whole.
    """
    geometry = model.geometry
    if not faces:
        return [], [_no_face(image)]
    looks, reasons = [], []
    for number, face in enumerate(faces, 1):
        if reason := too_small(face):
            reasons.append(f"face {number} of {len(faces)}: {reason}")
            continue
        whole = (
            len(faces) == 1 and displacement(face, image, geometry) <= geometry.usual_displacement
        )
        note = unlike_training(face, geometry, model.source_size)
        looks.append(Look(path, face, None if whole else geometry, number, len(faces), note))
    return looks, reasons


def unlike_training(face: Face, geometry: Geometry, size: int) -> str:
    """What tells a crop from those trained on, '' for nothing.

    The aligned landmarks lie further from the geometry's than for 99 of 100 of the training set's
    own faces, or the crop is enlarged more than twice.
    """
    notes = []
    if misfit(face, geometry) > geometry.usual_misfit:
        notes.append("head turned or face hidden")
    matrix = alignment(face.landmarks, size * geometry.landmarks)
    if (scale := float(np.hypot(*matrix[:, 0]))) > ENLARGED:
        notes.append(f"small face, enlarged {scale:.1f} times")
    return "unlike the training pictures: " + ", ".join(notes) if notes else ""


def _no_face(image: UInt8[np.ndarray, "h w 3"]) -> str:
    h, w, _ = image.shape
    if max(h, w) <= min(CROP_SIDE, 1.1 * min(h, w)):
        return "no face found; if it is a face crop already, --no-detect takes it as it is"
    return "no face found"


# --- predictions ---------------------------------------------------------------------------------


def predict_files(
    model: Run,
    paths: Sequence[Path],
    *,
    find: Find | None = None,
    batch_size: int = 32,
    constants: Mapping[str, Any] | None = None,
    write: Callable[[Sequence[Mapping[str, Any]]], None] = lambda rows: None,
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """(rows as in `prediction_row`, skipped as {'file', 'reason'}), a batch at a time; `write` is
    given the rows of each."""
    rows, skipped = [], []
    waiting: list[tuple[Look, np.ndarray]] = []

    def flush(count: int) -> None:
        if batch := waiting[:count]:
            p = model.probabilities(np.stack([crop for _, crop in batch]))
            options = {"decode": model.decode, "constants": constants}
            named = zip(batch, p, strict=True)
            new = [prediction_row(look, q, **options) for (look, _), q in named]
            write(new)
            rows.extend(new)
            del waiting[:count]

    count = Count("read", len(paths), "files")
    for path in paths:
        looks, reasons = [Look(path)], []
        try:
            image = _read(path)
            if find:
                looks, reasons = looks_at(path, image, find(image), model=model)
        except ValueError as error:
            looks, reasons = [], [str(error)]
        waiting += [(look, look.crop(image, model.source_size)) for look in looks]
        skipped += [{"file": _printable(path), "reason": reason} for reason in reasons]
        while len(waiting) >= batch_size:
            flush(batch_size)
        count()
    flush(batch_size)
    return rows, skipped


def prediction_row(
    look: Look,
    p: Float[np.ndarray, " 117"],
    *,
    decode: str = "median",
    constants: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What `p` says: age (read by `decode`) and its 90 % interval in years, class, probabilities.

    `interval` says whose interval it is: 'conformal' with the constants of an evaluation, else
    'posterior', the 5 and 95 % quantiles as the model believes them. `probability` is that of the
    class that holds the age, so age and class never disagree. The box is in pixels of the upright
    photo, None where the picture was taken whole. Raises ValueError when `p` holds NaN.
    """
    p = np.asarray(p, np.float64)
    if not np.isfinite(p).all():
        raise ValueError("the predictions hold NaN: the run diverged, take another run")
    age, classes = float(get_decoder(decode)(p)), class_probabilities(p)
    chosen = int(age_class(np.float64(age)))
    ends = (
        conformal_interval(p, constants["years"], decode=decode)
        if constants
        else posterior_interval(p)
    )
    low, high = map(float, ends)
    box = look.face.box.round(1).tolist() if look.face else [None] * 4
    return {
        "file": _printable(look.path),
        "face": look.number,
        "faces": look.of,
        "age": round(age, 2),
        "low": round(low, 2),
        "high": round(high, 2),
        "interval": "conformal" if constants else "posterior",
        "class": CLASS_NAMES[chosen],
        "probability": round(float(classes[chosen]), 4),
        **{f"p_{name}": round(float(v), 4) for name, v in zip(CLASS_NAMES, classes, strict=True)},
        **dict(zip(("x1", "y1", "x2", "y2"), box, strict=True)),
        "note": look.note,
        "look": look,
    }


def _printable(path: Path) -> str:
    """The path in characters that can be written as UTF-8, whatever bytes name the file."""
    return str(path).encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _in_one_line(name: str) -> str:
    """The name without line breaks and control characters: they would break a table, and Pillow
    refuses to measure a text of two lines."""
    return "".join(
        c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in name
    )


def table(rows: Sequence[Mapping[str, Any]], skipped: Sequence[Mapping[str, str]] = ()) -> str:
    """The rows as text: file, age, 90 % interval and its kind, class, its probability, note; then
    the skipped, with '–' for the age and the reason for a note."""
    lines = [("file", "age", f"90 % {rows[0]['interval']}", "class", "p", "")]
    for row in rows:
        of = f" ({row['face']} of {row['faces']})" if row["faces"] > 1 else ""
        lines.append(
            (
                _in_one_line(row["file"]) + of,
                f"{np.floor(row['age'] + 0.5):.0f}",
                f"{row['low']:.0f}–{row['high']:.0f}",
                row["class"],
                f"{100 * row['probability']:.0f} %",
                row["note"],
            )
        )
    for row in skipped:
        name = _in_one_line(row["file"])
        lines.append((name, "–", "–", "–", "–", f"skipped: {row['reason']}"))
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:5], widths[1:]), line[5]])
        for line in lines
    )


def _reason(skipped: Sequence[Mapping[str, str]]) -> str:
    first = skipped[0]
    return f"{_in_one_line(first['file'])}: {first['reason']}" + (" …" if len(skipped) > 1 else "")


# --- pictures ------------------------------------------------------------------------------------


def write_pictures(
    out: Path, rows: Sequence[Mapping[str, Any]], true_ages: Mapping[Path, int]
) -> None:
    """Write out/annotated/<name>.jpg for every file and out/predictions.png for the first 24 rows.

    On the sheet the files of `true_ages` have theirs beside the predicted one. A picture that was
    taken whole gets a band below it; a photo gets a box around each face.
    """
    by_file: dict[Path, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_file.setdefault(row["look"].path, []).append(row)
    tiles, count = [], Count("drew", len(by_file), "pictures")
    for (path, found), name in zip(by_file.items(), _names(list(by_file)), strict=True):
        image = read_photo(path)
        if found[0]["look"].geometry:
            picture = pictures.boxed(image, [_box(row) for row in found])
        else:
            side = int(np.clip(min(image.shape[:2]), 256, 640))
            picture = _annotated(centre_square(image, side), found[0])
        pictures.save_image(out / "annotated" / f"{name}.jpg", picture, comment=DRAWN)
        for row in found[: ON_SHEET - len(tiles)]:
            number = f" ({row['face']} of {row['faces']})" if row["faces"] > 1 else ""
            options = {"caption": _in_one_line(path.name) + number, "true_age": true_ages.get(path)}
            tiles.append(_annotated(row["look"].crop(image, 256), row, **options))
        count()
    pictures.contact_sheet(out / "predictions.png", tiles)


def _box(row: Mapping[str, Any]) -> tuple[np.ndarray, str, int]:
    """The face's box, what is written at it, and its class."""
    text = f"{np.floor(row['age'] + 0.5):.0f} years, {row['class']}"
    number = f"{row['face']}: " if row["faces"] > 1 else ""
    return row["look"].face.box, number + text, CLASS_NAMES.index(row["class"])


def _annotated(image: UInt8[np.ndarray, "s s 3"], row: Mapping[str, Any], **options):
    return pictures.annotated(
        image,
        age=row["age"],
        low=row["low"],
        high=row["high"],
        probabilities=[row[f"p_{name}"] for name in CLASS_NAMES],
        chosen=CLASS_NAMES.index(row["class"]),
        **options,
    )


def _names(paths: Sequence[Path]) -> list[str]:
    """A name for each annotated picture: the path below the folder all share, made one word."""
    base = os.path.commonpath([_real(path).parent for path in paths])
    names: list[str] = []
    taken: set[str] = set()
    for path in paths:
        name = "_".join(_real(path).relative_to(base).parts).removesuffix(path.suffix)
        # a.jpg and a.png, or folder/a.jpg and folder_a.jpg, must not overwrite each other
        while (short := _short(name)).lower() in taken:
            name += path.suffix.replace(".", "_") or "_"
        taken.add(short.lower())
        names.append(short)
    return names


def _short(name: str) -> str:
    """The name, of a long one the beginning and a hash that tells it from others."""
    data = os.fsencode(name)
    if len(data) <= LONGEST_NAME:
        return name
    return f"{data[:LONGEST_NAME].decode(errors='ignore')}_{hashlib.sha256(data).hexdigest()[:8]}"

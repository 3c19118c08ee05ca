"""Ages of your own face crops: a table, a CSV and annotated pictures.

The picture is taken as it is: it should be a crop around one face, as in the training data. Only
its centre square is looked at.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from coatnet_jax import plots
from coatnet_jax.ages import CLASS_NAMES, N_AGES, age_class, class_probabilities, get_decoder
from coatnet_jax.inference import Run, load_run
from coatnet_jax.pages import write_csv
from input_pipeline.images import decode_checked
from input_pipeline.pipeline import decode_image

ENDINGS = {".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".tif", ".tiff", ".jfif"}
# Looked for in folders too, so that they are named as unreadable instead of passed over.
UNSUPPORTED = {".heic", ".heif", ".avif", ".gif"}
INTERVAL = (0.05, 0.95)
ON_SHEET = 24


def run(
    run_dir: str | Path,
    inputs: Sequence[str | Path],
    *,
    out: str | Path | None = None,
    recursive: bool = True,
    annotate: bool = True,
    which: str = "best",
    batch_size: int = 32,
) -> list[dict[str, Any]]:
    """Predict the ages of image files and of the images in folders; one row for each readable one.

    Prints a table and writes predictions.csv under `out` (default ./predictions); with `annotate`
    also annotated/*.jpg and predictions.png, a sheet of the first 24. What cannot be read is
    listed with the reason, in skipped.csv too. Raises FileNotFoundError for a path that does not
    exist, ValueError when nothing is readable or the run has no age head.
    """
    out = Path(out) if out else Path("predictions")
    paths = find_images(inputs, recursive=recursive, out=out)
    model = load_run(Path(run_dir), which=which, batch_size=min(batch_size, len(paths)))
    if model.stage != "finetune":
        raise ValueError(
            f"{run_dir} is a {model.stage} run without an age head; predict with a finetune run"
        )
    rows, skipped = predict_files(model, paths, batch_size=batch_size)
    for row in skipped:
        print(f"skipped {row['file']}: {row['reason']}")
    if not rows:
        raise ValueError(f"none of {len(paths)} files is a readable image; {_reason(skipped)}")
    write_csv(out / "predictions.csv", [{k: row[k] for k in row if k != "path"} for row in rows])
    if skipped:
        write_csv(out / "skipped.csv", skipped)
    elif (out / "skipped.csv").exists():
        (out / "skipped.csv").unlink()  # of an earlier run into the same folder
    print(table(rows))
    if model.answers_one_age:
        print("trained to give one age, not a distribution: the 90 % interval measures no doubt")
    if annotate:
        write_pictures(out, rows)
    also = ", predictions.png and annotated/" if annotate else ""
    print(f"{len(rows)} of {len(paths)} images; written to {out}: predictions.csv{also}")
    return rows


# --- files ---------------------------------------------------------------------------------------


def find_images(
    inputs: Sequence[str | Path], *, recursive: bool = True, out: str | Path | None = None
) -> list[Path]:
    """The files to read, each once: files as given, folders searched by ending and sorted.

    What an earlier run drew under `out` is not taken for input. Raises FileNotFoundError for a
    missing path, ValueError when there is nothing to read.
    """
    if not inputs:
        raise ValueError("no images given: name image files or folders")
    found: dict[Path, Path] = {}
    for name in inputs:
        path = Path(name).expanduser()
        if path.is_dir():
            for file in _images_in(path, recursive=recursive, out=Path(out) if out else None):
                found.setdefault(file.resolve(), file)
        elif path.exists():
            found.setdefault(path.resolve(), path)
        else:
            raise FileNotFoundError(f"{path} does not exist: name image files or folders")
    if not found:
        folders = ", ".join(str(name) for name in inputs)
        known = " ".join(sorted(ENDINGS))
        raise ValueError(f"no images in {folders} (looked for {known})")
    return list(found.values())


def _images_in(folder: Path, *, recursive: bool, out: Path | None) -> Iterator[Path]:
    ours = {(out / name).resolve() for name in ("annotated", "predictions.png")} if out else set()
    for file in sorted(folder.rglob("*") if recursive else folder.glob("*")):
        if file.suffix.lower() not in ENDINGS | UNSUPPORTED or file.name.startswith("."):
            continue
        if file.is_file() and not ours & {file.resolve(), *file.resolve().parents}:
            yield file


def _read(path: Path) -> bytes:
    """The file's bytes once they are known to decode; ValueError with the reason otherwise."""
    if path.suffix.lower() in UNSUPPORTED:
        raise ValueError(f"{path.suffix.lower()} files are not supported: save it as JPEG or PNG")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None
    if not data:
        raise ValueError("the file is empty")
    decode_checked(data)
    return data


# --- predictions ---------------------------------------------------------------------------------


def predict_files(
    model: Run, paths: Sequence[Path], *, batch_size: int = 32
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """(rows as in `prediction_row`, skipped as {'file', 'reason'}), a batch at a time."""
    rows, skipped = [], []
    readable: list[tuple[Path, np.ndarray]] = []

    def flush() -> None:
        if readable:
            p = model.probabilities(np.stack([image for _, image in readable]))
            named = zip((path for path, _ in readable), p, strict=True)
            rows.extend(prediction_row(path, q, decode=model.decode) for path, q in named)
            readable.clear()

    for path in paths:
        try:
            readable.append((path, decode_image(_read(path), model.source_size)))
        except ValueError as error:
            skipped.append({"file": str(path), "reason": str(error)})
        if len(readable) == batch_size:
            flush()
    flush()
    return rows, skipped


def prediction_row(
    path: Path, p: Float[np.ndarray, " 117"], *, decode: str = "median"
) -> dict[str, Any]:
    """What `p` says: age (read by `decode`) and 5-95 % quantiles in years, class, probabilities.

    `probability` is that of the class that holds the age, so age and class never disagree.
    Raises ValueError when `p` holds NaN.
    """
    p = np.asarray(p, np.float64)
    if not np.isfinite(p).all():
        raise ValueError("the predictions hold NaN: the run diverged, take an earlier checkpoint")
    age, classes = float(get_decoder(decode)(p)), class_probabilities(p)
    chosen = int(age_class(np.float64(age)))
    low, high = (float(age_quantile(p, q)) for q in INTERVAL)
    return {
        "file": str(path),
        "age": round(age, 2),
        "low": round(low, 2),
        "high": round(high, 2),
        "class": CLASS_NAMES[chosen],
        "probability": round(float(classes[chosen]), 4),
        **{f"p_{name}": round(float(v), 4) for name, v in zip(CLASS_NAMES, classes, strict=True)},
        "path": path,
    }


def age_quantile(p: Float[np.ndarray, "... 117"], q: float) -> Float[np.ndarray, "..."]:
    """The q-quantile of the age in years; a year's probability is spread evenly over [a-.5, a+.5).

    Held to 0-116, as `median_age` is. `p` need not sum to one.
    """
    p = np.asarray(p, np.float64)
    cumulative = np.cumsum(p, axis=-1)
    target = q * cumulative[..., -1:]
    year = np.argmax(cumulative >= target, axis=-1)[..., None]
    mass = np.take_along_axis(p, year, axis=-1)
    before = np.take_along_axis(cumulative, year, axis=-1) - mass
    inside = np.clip((target - before) / np.maximum(mass, np.finfo(np.float64).tiny), 0, 1)
    return np.clip(year - 0.5 + inside, 0, N_AGES - 1)[..., 0]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as text: file, age, 90 % interval, class and its probability."""
    head = ("file", "age", "90 %", "class", "p")
    lines = [head] + [
        (
            row["file"],
            f"{np.floor(row['age'] + 0.5):.0f}",
            f"{row['low']:.0f}–{row['high']:.0f}",
            row["class"],
            f"{100 * row['probability']:.0f} %",
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    )


def _reason(skipped: Sequence[Mapping[str, str]]) -> str:
    first = skipped[0]
    return f"{first['file']}: {first['reason']}" + (" …" if len(skipped) > 1 else "")


# --- pictures ------------------------------------------------------------------------------------


def write_pictures(out: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write out/annotated/<name>.jpg for every row and out/predictions.png for the first 24."""
    tiles = []
    for row, name in zip(rows, _names([row["path"] for row in rows]), strict=True):
        data = row["path"].read_bytes()
        side = int(np.clip(min(decode_checked(data).shape[:2]), 256, 640))
        picture = _annotated(decode_image(data, side), row)
        plots.save_image(out / "annotated" / f"{name}.jpg", picture)
        if len(tiles) < ON_SHEET:
            tiles.append(_annotated(decode_image(data, 256), row, caption=row["path"].name))
    plots.contact_sheet(out / "predictions.png", tiles)


def _annotated(image: UInt8[np.ndarray, "s s 3"], row: Mapping[str, Any], caption: str = ""):
    return plots.annotated(
        image,
        age=row["age"],
        low=row["low"],
        high=row["high"],
        probabilities=[row[f"p_{name}"] for name in CLASS_NAMES],
        chosen=CLASS_NAMES.index(row["class"]),
        caption=caption,
    )


def _names(paths: Sequence[Path]) -> list[str]:
    """A name for each annotated picture: the path below the folder all share, made one word."""
    base = os.path.commonpath([path.resolve().parent for path in paths])
    names: list[str] = []
    for path in paths:
        name = "_".join(path.resolve().relative_to(base).parts).removesuffix(path.suffix)
        # a.jpg and a.png, or folder/a.jpg and folder_a.jpg, must not overwrite each other
        while name.lower() in {taken.lower() for taken in names}:
            name += path.suffix.replace(".", "_")
        names.append(name)
    return names

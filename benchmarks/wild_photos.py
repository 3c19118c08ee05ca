r"""Photos as people take them, from finding the face to the age: ours against the dlib package.

    python benchmarks/wild_photos.py [RUN] --photos all-age-faces-wild.tar \
        --labels all-age-faces-wild.csv

RUN is a fine-tuning run or a released folder (default: the model of the package). Both see the same
pixels in one run. A photo holds one person; where a model finds more faces the largest counts.
Printed are the share of photos with a face, the errors on what each model found, and on the photos
where both found exactly one, with the paired bootstrap interval of the difference. The peer is left
out with a word where it is not installed (`dlib_package.py` says how).
"""

import argparse
import csv
import sys
import tarfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import numpy as np
from dlib_package import INSTALL, load

from coatnet_jax.ages import age_class
from coatnet_jax.bootstrap import paired_difference
from coatnet_jax.conformal import read_constants
from coatnet_jax.inference import load_run
from coatnet_jax.logs import environment
from coatnet_jax.metrics import accuracy, balanced_accuracy, cumulative_score, mae
from coatnet_jax.pages import markdown_table, write_json
from coatnet_jax.predict import looks_at, prediction_row
from coatnet_jax.release_weights import PACKAGED
from coatnet_jax.runtime import set_up
from input_pipeline.face_crops import Detector, read_photo
from input_pipeline.pipeline import evenly_spread
from input_pipeline.progress import Count

Found = dict[str, np.ndarray]  # per photo: faces, age (NaN: none), low, high


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", nargs="?", type=Path, default=PACKAGED, metavar="RUN")
    parser.add_argument("--photos", type=Path, required=True, help="tar of photos")
    parser.add_argument("--labels", type=Path, required=True, help="CSV with file and age")
    parser.add_argument("--limit", type=int, default=10**9, help="photos, evenly picked")
    parser.add_argument("--constant", type=float, default=29, help="median age that was trained on")
    parser.add_argument("--out", type=Path, help="JSON to write")
    arguments = parser.parse_args()
    set_up()
    photos, age = labelled_photos(arguments.photos, arguments.labels, arguments.limit)
    print(f"{len(photos)} photos with ages {age.min()}-{age.max()}", flush=True)
    found = {"ours": ours(photos, arguments.run_dir)}
    try:
        found["dlib"] = theirs(photos, load()[0])
    except ImportError as error:
        print(f"the dlib package is left out ({error}): {INSTALL}", file=sys.stderr)
    constant = np.full(len(age), arguments.constant)
    rows = [finding(name, side) for name, side in found.items()]
    print(markdown_table(rows))
    scores = [scored(name, side, age, ~np.isnan(side["age"])) for name, side in found.items()]
    print("\neach on the photos in which it found a face\n" + markdown_table(scores))
    result = {"finding": rows, "each": scores, "environment": environment()}
    if len(found) == 2:
        # One face that is too small for an age has none.
        one = [(side["faces"] == 1) & ~np.isnan(side["age"]) for side in found.values()]
        both = np.logical_and(*one)
        same = [scored(name, side, age, both) for name, side in found.items()]
        same.append(scored("constant", {"age": constant}, age, both))
        first, second = (np.abs(found[name]["age"] - age)[both] for name in ("dlib", "ours"))
        difference = paired_difference(first, second)
        low, high = difference["interval"]
        print(f"\n{both.sum()} photos in which both found exactly one\n" + markdown_table(same))
        print(
            f"\nours less dlib's: {difference['difference']:+.2f} years "
            f"(95 % paired bootstrap {low:+.2f} to {high:+.2f})"
        )
        result |= {"same_photos": same, "difference": difference}
    if arguments.out:
        write_json(arguments.out, result)


def labelled_photos(tar: Path, labels: Path, limit: int) -> tuple[list[bytes], np.ndarray]:
    """(the files of the photos with an age, their ages)."""
    with labels.open(newline="", encoding="utf-8") as lines:
        ages = {row["file"]: int(row["age"]) for row in csv.DictReader(lines)}
    found = picked_photos(tar, limit, among=ages)
    return [data for _, data in found], np.array([ages[name] for name, _ in found])


def picked_photos(
    tar: Path, limit: int, *, among: Collection[str] | None = None
) -> list[tuple[str, bytes]]:
    """(name, file) of at most `limit` photos of a tar, evenly picked."""
    with tarfile.open(tar) as archive:
        members = sorted((m for m in archive if m.isfile()), key=lambda m: m.name)
        members = [m for m in members if among is None or Path(m.name).name in among]
        members = [members[row] for row in evenly_spread(len(members), limit)]
        return [(Path(m.name).name, archive.extractfile(m).read()) for m in members]


def ours(photos: list[bytes], run_dir: Path) -> Found:
    """What `coatnet-jax predict` says of the largest usable face of each photo."""
    model = load_run(run_dir, batch_size=32)
    constants = read_constants(run_dir, step=model.step)
    find = Detector()
    looks, crops, faces, rows = [], [], np.zeros(len(photos), int), []

    def look(number: int, image: np.ndarray) -> None:
        there = find(image)
        usable, _ = looks_at(Path(str(number)), image, there, model=model)
        faces[number] = len(there)
        if usable:
            largest = max(usable, key=lambda look: look.face.side)
            looks.append(largest)
            crops.append(largest.crop(image, model.source_size))
            rows.append(number)

    through(photos, look, "ours")
    p = model.probabilities(np.stack(crops))
    options = {"decode": model.decode, "constants": constants}
    told = [prediction_row(look, q, **options) for look, q in zip(looks, p, strict=True)]
    found = {"faces": faces}
    for key in ("age", "low", "high"):
        found[key] = np.full(len(photos), np.nan)
        found[key][rows] = [row[key] for row in told]
    return found


def theirs(photos: list[bytes], predict: Callable) -> Found:
    """What the dlib package says of the largest face of each photo."""
    found = {"faces": np.zeros(len(photos), int), "age": np.full(len(photos), np.nan)}

    def look(number: int, image: np.ndarray) -> None:
        if there := predict(image):
            found["faces"][number] = len(there)
            found["age"][number] = max(there, key=lambda face: face[1])[0]

    through(photos, look, "dlib")
    return found


def through(photos: list[bytes], look: Callable[[int, np.ndarray], None], name: str) -> None:
    """`look(number, pixels)` for every photo, with progress."""
    count = Count(f"{name}: looked at", len(photos), "photos")
    for number, data in enumerate(photos):
        look(number, read_photo(data))
        count()


def finding(name: str, found: Found) -> dict[str, str]:
    faces = found["faces"]
    return {
        "model": name,
        "face found": f"{100 * np.mean(faces > 0):.1f} %",
        "exactly one": f"{100 * np.mean(faces == 1):.1f} %",
        "answered": f"{100 * np.mean(~np.isnan(found['age'])):.1f} %",
    }


def scored(
    name: str, found: Mapping[str, np.ndarray], age: np.ndarray, rows: np.ndarray
) -> dict[str, str]:
    """Errors and, where there are intervals, how many ages they hold, on some photos."""
    true, predicted = age[rows], found["age"][rows]
    classes = age_class(true), age_class(predicted)
    row = {
        "model": name,
        "faces": str(len(true)),
        "MAE, years": f"{mae(true, predicted):.2f}",
        "median error": f"{np.median(np.abs(predicted - true)):.2f}",
        "within 5": f"{100 * cumulative_score(predicted - true):.1f} %",
        "4 classes": f"{100 * accuracy(*classes):.1f} %",
        "balanced": f"{100 * balanced_accuracy(*classes):.1f} %",
        "in the 90 % interval": "–",
    }
    if "low" in found:
        low, high = found["low"][rows], found["high"][rows]
        inside = 100 * np.mean((low <= true) & (true <= high))
        row["in the 90 % interval"] = f"{inside:.1f} % ({np.mean(high - low):.1f} years wide)"
    return row


if __name__ == "__main__":
    main()

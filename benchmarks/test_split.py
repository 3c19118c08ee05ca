"""The test split of UTKFace: one of our models against the dlib package, on the same crops.

    coatnet-jax evaluate && python benchmarks/test_split.py evaluation/test
    coatnet-jax evaluate runs/a && python benchmarks/test_split.py runs/a/evaluate/test

Ours are the ages of the evaluation's predictions.csv. The peer looks for the face in each crop,
as it would in a photo, and takes the whole crop where it finds none; what it was trained on is not
told, so some of these faces may have been among that. `dlib_package.py` says how it is installed.
"""

import argparse
import csv
import json
from pathlib import Path

import numpy as np
from dlib_package import load
from wild_photos import scored

from coatnet_jax.bootstrap import paired_difference, persons_of
from coatnet_jax.logs import environment
from coatnet_jax.pages import markdown_table, write_json
from coatnet_jax.paths import data_folder
from input_pipeline.pipeline import decode_once, evenly_spread, open_split
from input_pipeline.progress import Count

SIDE = 200  # px of UTKFace's crops


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("evaluated", type=Path, help="folder that coatnet-jax evaluate wrote")
    parser.add_argument("--root", default="", help="folder for built data")
    parser.add_argument("--name", default="utkface", help="prepared data set")
    parser.add_argument("--limit", type=int, default=10**9, help="faces, evenly picked")
    parser.add_argument("--out", type=Path, help="JSON to write")
    arguments = parser.parse_args()
    told = json.loads((arguments.evaluated / "metrics.json").read_text())
    constant = told["baseline"]["median_age"]
    with (arguments.evaluated / "predictions.csv").open(newline="", encoding="utf-8") as lines:
        ours = {row["file"]: row for row in csv.DictReader(lines)}
    folder = data_folder(arguments.name, arguments.root)
    faces = open_split(folder, "test", splits=told["splits"])
    pixels = decode_once(faces, SIDE).pixels
    rows = evenly_spread(len(faces), arguments.limit)
    photo, crop = load()
    theirs, unfound = [], 0
    count = Count("dlib: looked at", len(rows), "faces")
    for row in rows:
        found = photo(pixels[row])
        unfound += not found
        theirs.append(max(found, key=lambda face: face[1])[0] if found else crop(pixels[row]))
        count()
    age = faces.labels["age"][rows]
    mine = [ours[file] for file in faces.labels["file"][rows]]
    sides = {
        "ours": {"age": np.array([float(row["predicted"]) for row in mine])},
        "dlib": {"age": np.array(theirs, float)},
        "constant": {"age": np.full(len(rows), constant)},
    }
    sides["ours"] |= {end: np.array([float(row[end]) for row in mine]) for end in ("low", "high")}
    every = np.ones(len(rows), bool)
    table = [scored(name, side, age, every) for name, side in sides.items()]
    errors = [np.abs(sides[name]["age"] - age) for name in ("dlib", "ours")]
    persons = persons_of(faces.labels["identity"][rows])
    difference = paired_difference(*errors, groups=persons)
    low, high = difference["interval"]
    print(markdown_table(table))
    print(
        f"\nours less dlib's: {difference['difference']:+.2f} years (95 % paired bootstrap "
        f"{low:+.2f} to {high:+.2f}); dlib found no face in {unfound} crops"
    )
    if arguments.out:
        result = {"scores": table, "difference": difference, "unfound": unfound}
        write_json(arguments.out, result | {"environment": environment()})


if __name__ == "__main__":
    main()

"""Where the landmarks of UTKFace's crops lie: python benchmarks/crop_geometry.py ROOT/utkface

Runs the detector on faces of a prepared set, evenly picked, and prints the numbers that stand in
input_pipeline/face_crops.py: the median place of each landmark in parts of the crop's side, and how
far the single faces stray from it. Needs the extra `faces`.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from input_pipeline.face_crops import Detector, Geometry, displacement, misfit
from input_pipeline.images import decode_checked
from input_pipeline.pipeline import open_split


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="a prepared set of aligned crops")
    parser.add_argument("--most", type=int, default=1000, help="faces to take (default: 1000)")
    arguments = parser.parse_args()
    data = open_split(arguments.folder, "train")
    rows = np.linspace(0, len(data) - 1, min(arguments.most, len(data))).astype(int)
    find, found, several = Detector(), [], 0
    for row in rows:
        image = decode_checked(data[row]["image"])
        faces = find(image)
        several += len(faces) > 1
        if faces:
            found.append((faces[0], image))
    print(f"{len(rows)} crops: a face in {len(found) / len(rows):.1%}, more in {several}")
    sides = np.array([image.shape[1::-1] for _, image in found])[:, None]
    places = np.array([face.landmarks for face, _ in found]) / sides
    middle = np.median(places, axis=0).round(4)
    print("landmarks, median:", middle.tolist())
    print("landmarks, quartile distance:", np.ptp(np.quantile(places, [0.25, 0.75], 0), 0).tolist())
    geometry = Geometry("measured", middle, usual_misfit=0, usual_displacement=0)
    for name, values in (
        ("misfit after alignment", [misfit(face, geometry) for face, _ in found]),
        ("displacement as it is", [displacement(face, image, geometry) for face, image in found]),
    ):
        low, half, high, top = np.quantile(values, [0.05, 0.5, 0.95, 0.99])
        print(f"{name}: median {half:.4f}, 5-95 % {low:.4f}-{high:.4f}, 99 % {top:.4f}")


if __name__ == "__main__":
    main()

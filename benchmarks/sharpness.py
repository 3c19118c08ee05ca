"""How much an age depends on how sharp a picture is: errors on blurred and sharpened faces.

    python benchmarks/sharpness.py coatnet_jax/released runs/finetune

The faces are those of a run's validation split at 200 px, blurred by a Gaussian or sharpened by an
unsharp mask of 1 px before they are shrunk for the model. Photos differ in sharpness, by camera and
by compression, of which the error on a set's own crops tells nothing. Give runs of one table of
splits to compare them; the shift is the mean change of the age against the faces as they are.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from coatnet_jax.ages import get_decoder
from coatnet_jax.inference import load_run
from coatnet_jax.metrics import mae
from coatnet_jax.pages import markdown_table
from coatnet_jax.paths import data_folder
from coatnet_jax.runtime import set_up
from input_pipeline.face_crops import CROP
from input_pipeline.images import centre_square
from input_pipeline.pipeline import decode_once, evenly_spread, open_split
from input_pipeline.preprocess import Pixels, unsharp

CHANGES: dict[str, Callable[[Pixels], Pixels]] = {
    "blur 2 px": partial(cv2.GaussianBlur, ksize=(0, 0), sigmaX=2.0),
    "blur 1 px": partial(cv2.GaussianBlur, ksize=(0, 0), sigmaX=1.0),
    "as it is": lambda picture: picture,
    "sharpened by 0.5": unsharp,
    "sharpened by 1": partial(unsharp, share=1.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN", help="fine-tuning runs")
    parser.add_argument("--limit", type=int, default=10**9, help="faces, evenly picked")
    arguments = parser.parse_args()
    set_up()
    rows = [{"validation faces": name} for name in (*CHANGES, "mean of the five")]
    for run_dir in arguments.run_dirs:
        run = load_run(run_dir, batch_size=64)
        data = run.config.data
        faces = open_split(data_folder(data.name, data.root), "validation", splits=data.splits)
        faces = decode_once(faces.take(evenly_spread(len(faces), arguments.limit)), CROP)
        ages, errors = {}, []
        for name, change in CHANGES.items():
            seen = [centre_square(change(picture), run.source_size) for picture in faces.pixels]
            ages[name] = get_decoder(run.decode)(run.probabilities(np.stack(seen)))
            errors.append(mae(faces.labels["age"], ages[name]))
            print(f"{run_dir}, {name}: {errors[-1]:.2f} years", flush=True)
        for row, error in zip(rows, (*errors, np.mean(errors)), strict=True):
            row[f"{run_dir}, MAE"] = f"{error:.2f}"
        for row, of in zip(rows, ages.values(), strict=False):
            row[f"{run_dir}, shift"] = f"{np.mean(of - ages['as it is']):+.2f}"
        rows[-1][f"{run_dir}, shift"] = ""
    print(f"\n{len(faces)} faces, years:\n")
    print(markdown_table(rows))


if __name__ == "__main__":
    main()

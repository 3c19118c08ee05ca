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
from jaxtyping import UInt8

from coatnet_jax.ages import get_decoder
from coatnet_jax.allocator import keep_freed_memory
from coatnet_jax.inference import Run, load_run
from coatnet_jax.metrics import mae
from coatnet_jax.pages import markdown_table
from coatnet_jax.paths import data_folder
from input_pipeline.face_crops import CROP
from input_pipeline.images import centre_square
from input_pipeline.pipeline import Faces, eval_loader, open_split

Picture = UInt8[np.ndarray, "s s 3"]


def blurred(picture: Picture, sigma: float) -> Picture:
    """After a Gaussian blur of `sigma` pixels."""
    return cv2.GaussianBlur(picture, (0, 0), sigma)


def sharpened(picture: Picture, share: float) -> Picture:
    """After an unsharp mask: `share` of what a blur of 1 px takes away is added."""
    return cv2.addWeighted(picture, 1 + share, blurred(picture, 1.0), -share, 0)


CHANGES: dict[str, Callable[[Picture], Picture]] = {
    "blur 2 px": partial(blurred, sigma=2.0),
    "blur 1 px": partial(blurred, sigma=1.0),
    "as it is": lambda picture: picture,
    "sharpened by 0.5": partial(sharpened, share=0.5),
    "sharpened by 1": partial(sharpened, share=1.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN", help="fine-tuning runs")
    parser.add_argument("--limit", type=int, default=10**9, help="faces, evenly picked")
    arguments = parser.parse_args()
    keep_freed_memory()
    rows = [{"validation faces": name} for name in (*CHANGES, "mean of the five")]
    for run_dir in arguments.run_dirs:
        run = load_run(run_dir, batch_size=64)
        data = run.config.data
        faces = open_split(data_folder(data.name, data.root), "validation", splits=data.splits)
        picked = np.linspace(0, len(faces) - 1, min(len(faces), arguments.limit))
        faces = faces.take(picked.round().astype(int))
        ages = {}
        for name, change in CHANGES.items():
            ages[name] = predicted(run, faces, change)
            print(
                f"{run_dir}, {name}: {mae(faces.labels['age'], ages[name]):.2f} years", flush=True
            )
        errors = [mae(faces.labels["age"], of) for of in ages.values()]
        for row, error in zip(rows, (*errors, np.mean(errors)), strict=True):
            row[f"{run_dir}, MAE"] = f"{error:.2f}"
        for row, of in zip(rows, ages.values(), strict=False):
            row[f"{run_dir}, shift"] = f"{np.mean(of - ages['as it is']):+.2f}"
        rows[-1][f"{run_dir}, shift"] = ""
    print(f"\n{len(faces)} faces, years:\n")
    print(markdown_table(rows))


def predicted(run: Run, faces: Faces, change: Callable[[Picture], Picture]) -> np.ndarray:
    """The ages that a run gives the changed faces."""
    p = []
    for batch in eval_loader(faces, batch_size=run.batch_size, image_size=CROP):
        pictures = batch["image"][batch["weight"] > 0]
        seen = [centre_square(change(picture), run.source_size) for picture in pictures]
        p.append(run.probabilities(np.stack(seen)))
    return get_decoder(run.decode)(np.concatenate(p))


if __name__ == "__main__":
    main()

"""Underfitted or overfitted? A run's error on faces it was trained on, beside validation's.

    python benchmarks/fit_gap.py runs/finetune --limit 1600

All in the view of evaluation: no crop, no jitter, the pictures and their mirror images, the
centres that the run averages. Faces are evenly picked, as many of either split. A large error with
a small gap asks for longer training, larger views or a larger model; a small training error with a
large gap for more faces or more augmentation. The training score says nothing of how good a run is.
"""

import argparse
from pathlib import Path

import numpy as np

from coatnet_jax.evaluate import score
from coatnet_jax.inference import load_run, predict_split
from coatnet_jax.pages import markdown_table, percent
from coatnet_jax.paths import data_folder
from coatnet_jax.runtime import set_up
from input_pipeline.pipeline import open_split


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="workdir of a fine-tuning run")
    parser.add_argument("--limit", type=int, default=10**9, help="faces of each split")
    arguments = parser.parse_args()
    set_up()
    run = load_run(arguments.run_dir)
    data = run.config.data
    folder = data_folder(data.name, data.root)
    validation, train = (
        open_split(folder, split, splits=data.splits) for split in ("validation", "train")
    )
    faces = min(len(validation), arguments.limit)
    rows = []
    for split, of in (("train", train), ("validation", validation)):
        some = of.take(np.linspace(0, len(of) - 1, faces).round().astype(int))
        p, labels = predict_split(run, some, run.probabilities)
        scores = score(p, labels["age"], train_age=train.labels["age"], decode=run.decode)
        rows.append(
            {
                "split": split,
                "faces": faces,
                "MAE, years": f"{scores['mae']:.2f}",
                "within 5": percent(scores["cs5"]),
                "4 classes": percent(scores["accuracy"]),
            }
        )
        print(f"{split}: {rows[-1]['MAE, years']} years", flush=True)
    print(f"\n{arguments.run_dir}, step {run.step}, centres {run.sides}:\n")
    print(markdown_table(rows))


if __name__ == "__main__":
    main()

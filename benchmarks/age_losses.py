r"""The age losses under one short budget: error in years and accuracy of four classes, over seeds.

    python benchmarks/age_losses.py                                  # all of them on UTKFace
    python benchmarks/age_losses.py --losses kl_l1 coral corn --seeds 0 1 2 --epochs 10

Every run is `coatnet-jax finetune --config=finetune:MODEL,cpu` from random weights but for
`loss.name`, the seed, the flags here and what so short a training asks for: small batches, no layer
decay, a moving average over a hundred steps. Pictures are decoded once for each run and kept.
What is finished is skipped and what was stopped goes on, so the same command may be given again.
Scores are of the validation split, on which a loss may be chosen, averaged over centres and mirror
images as `evaluate` does. The table is printed after each run and written to OUT/age_losses.md.
"""

import argparse
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import jax
import ml_collections

from coatnet_jax import evaluate, finetune
from coatnet_jax.age_losses import AGE_LOSSES, get_age_loss
from coatnet_jax.config import load_config
from coatnet_jax.pages import markdown_table, spread
from coatnet_jax.paths import data_folder, home
from coatnet_jax.runtime import set_up
from coatnet_jax.stage import check_same_config


def budget(arguments: argparse.Namespace, loss: str, seed: int):
    """The config of one run."""
    config = load_config(f"finetune:{arguments.model},cpu")
    config.loss.name, config.seed, config.epochs = loss, seed, arguments.epochs
    config.data.root, config.data.name, config.data.cache = arguments.root, arguments.name, "host"
    config.model.image_size = arguments.image_size
    config.data.image_size = round(arguments.image_size * 1.25)
    config.batch_size, config.optim.lr = arguments.batch_size, arguments.lr
    config.optim.warmup_epochs, config.optim.layer_decay = arguments.epochs / 8, 1.0
    config.ema, config.mixup, config.log_every = 0.99, 0.0, 50
    config.monitor.patience = 0
    return config


def check_same_run(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Exit in one line where `workdir` holds a run of other flags, be it finished."""
    try:
        check_same_config(config, workdir)
    except ValueError as error:
        sys.exit(str(error).replace("--workdir", "--out"))


def scores(arguments: argparse.Namespace, loss: str, seed: int) -> dict | None:
    """`mae`, `accuracy` and `minutes` of one run, trained first if need be; None: was stopped."""
    setting = f"{arguments.name}-{arguments.model}-{arguments.image_size}px-{arguments.epochs:g}ep"
    workdir = Path(arguments.out) / setting / f"{loss}-{seed}"
    written = workdir / "evaluate" / "validation" / "metrics.json"
    config = budget(arguments, loss, seed)
    check_same_run(config, workdir)
    if not written.is_file():
        if not finetune.run(config, workdir):
            return None
        folder = data_folder(arguments.name, arguments.root)
        evaluate.run(workdir, folder, split="validation")
    result = json.loads(written.read_text())
    minutes = json.loads((workdir / "run.json").read_text())["wall_seconds"] / 60
    return {"mae": result["mae"], "accuracy": 100 * result["accuracy"], "minutes": minutes}


def table(found: dict[str, list[dict]]) -> list[dict[str, str]]:
    """One row for each loss, the least error first: mean ± standard deviation over the seeds."""
    rows = sorted(found.items(), key=lambda item: statistics.mean(run["mae"] for run in item[1]))
    return [
        {
            "loss": loss,
            "runs": str(len(runs)),
            "MAE, years": spread([run["mae"] for run in runs]),
            "4 classes, %": spread([run["accuracy"] for run in runs], digits=1),
            # The first run of a loss compiles, the others read that back.
            "minutes, quickest": f"{min(run['minutes'] for run in runs):.1f}",
        }
        for loss, runs in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--losses", nargs="+", default=list(AGE_LOSSES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=8)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3, help="at batch 128; scaled linearly")
    parser.add_argument("--image-size", type=int, default=64, help="of the views, in pixels")
    parser.add_argument("--model", default="micro")
    parser.add_argument("--name", default="utkface", help="prepared data set")
    parser.add_argument("--root", default="", help="folder for built data")
    parser.add_argument("--out", default="runs/age_losses")
    arguments = parser.parse_args()
    for loss in arguments.losses:
        get_age_loss(loss)  # a misspelled one should fail before the first training
    set_up()
    jax.config.update("jax_compilation_cache_dir", str(home() / "compiled"))
    found: dict[str, list[dict]] = defaultdict(list)
    for seed in arguments.seeds:  # all losses with the first seed first: a table soon
        for loss in arguments.losses:
            result = scores(arguments, loss, seed)
            if result is None:
                print(f"{loss}, seed {seed}: stopped; the same command goes on")
                return
            found[loss].append(result)
            text = markdown_table(table(found))
            (Path(arguments.out) / "age_losses.md").write_text(text + "\n")
            print(text, flush=True)


if __name__ == "__main__":
    main()

r"""Does pre-training help? Fine-tuning with few labels, from a pre-trained backbone or scratch.

    python benchmarks/label_efficiency.py runs/pretrain
    python benchmarks/label_efficiency.py runs/pretrain --percent 1 10 --seeds 0 --steps 300

Both sides see the same labelled faces (a share of the training split, spread over the ages and
drawn by the seed), the same number of steps and the same recipe, but for the layer-wise learning
rates, which are for a trained backbone alone. The best of a few checkpoints is taken on the whole
validation split. Scores are of `--split`, averaged over centres and mirror images as `evaluate`
does. The difference pairs the two sides face by face, each face's error averaged over the seeds.

What is finished is skipped and what was stopped goes on, so the same command may be given again,
with more seeds too. The table and a picture are written after each pair of runs.
"""

import argparse
import csv
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import jax
import matplotlib
import ml_collections
import numpy as np
from age_losses import check_same_run
from matplotlib.figure import Figure

from coatnet_jax import evaluate, finetune
from coatnet_jax.bootstrap import paired_difference
from coatnet_jax.config import load_config
from coatnet_jax.pages import markdown_table, spread, write_json
from coatnet_jax.palette import BLUE, MUTED
from coatnet_jax.paths import data_folder, home
from coatnet_jax.plots import STYLE, save_figure
from coatnet_jax.runtime import set_up
from coatnet_jax.stage import Setting, make_schedule
from input_pipeline.pipeline import Faces, open_split

SIDES = {"scratch": ("from scratch", MUTED), "pretrained": ("pre-trained", BLUE)}
EVALUATIONS = 4  # of a run: as many checkpoints to take the best of


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pretrained", help="workdir of a pre-training")
    parser.add_argument("--percent", nargs="+", type=float, default=[1, 5, 10, 25, 100])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3, help="at batch 128; scaled linearly")
    parser.add_argument("--layer-decay", type=float, default=0.9, help="of the pre-trained side")
    parser.add_argument("--image-size", type=int, default=64, help="of the views, in pixels")
    parser.add_argument("--model", default="micro")
    parser.add_argument("--name", default="utkface", help="prepared data set")
    parser.add_argument("--root", default="", help="folder for built data")
    parser.add_argument("--split", default="test")
    parser.add_argument("--out", default="runs/label_efficiency")
    arguments = parser.parse_args()
    if not all(0 < percent <= 100 for percent in arguments.percent):
        parser.error("--percent: shares of the training faces, above 0 and up to 100")
    set_up()
    jax.config.update("jax_compilation_cache_dir", str(home() / "compiled"))
    errors: dict[tuple[str, float], dict[int, np.ndarray]] = {}
    for seed in arguments.seeds:  # all shares with the first seed first: a table soon
        for percent in arguments.percent:
            for side in SIDES:
                found = run_errors(arguments, side, percent, seed)
                if found is None:
                    print("stopped; the same command goes on")
                    return
                errors.setdefault((side, percent), {})[seed] = found
            report(arguments, errors)


def run_errors(
    arguments: argparse.Namespace, side: str, percent: float, seed: int
) -> np.ndarray | None:
    """Years by which one run misses each face of the split, trained first if need be; None: it was
    stopped."""
    setting = f"{arguments.name}-{arguments.model}-{arguments.image_size}px-{arguments.steps}steps"
    workdir = Path(arguments.out) / setting / f"{side}-{percent:g}-{seed}"
    folder = data_folder(arguments.name, arguments.root)
    config = few_labels_config(arguments, side, percent, seed)
    check_same_run(config, workdir)
    written = workdir / "evaluate" / arguments.split / "predictions.csv"
    if not written.is_file():
        if not finetune.train(few_labels(config, percent, workdir)):
            return None
        evaluate.run(workdir, folder, split=arguments.split, show_faces=False)
    with written.open(newline="", encoding="utf-8") as lines:
        rows = sorted(csv.DictReader(lines), key=lambda row: row["file"])
    return np.array([abs(float(row["predicted"]) - int(row["age"])) for row in rows])


def few_labels_config(
    arguments: argparse.Namespace, side: str, percent: float, seed: int
) -> ml_collections.ConfigDict:
    """The config of one run."""
    folder = data_folder(arguments.name, arguments.root)
    config = load_config(f"finetune:{arguments.model},cpu")
    config.seed, config.batch_size, config.optim.lr = seed, arguments.batch_size, arguments.lr
    config.data.root, config.data.name, config.data.cache = arguments.root, arguments.name, "host"
    config.model.image_size = arguments.image_size
    config.data.image_size = round(arguments.image_size * 1.25)
    config.ema, config.mixup, config.log_every, config.monitor.patience = 0.99, 0.0, 50, 0
    config.optim.layer_decay = 1.0
    if side == "pretrained":
        config.init_from, config.optim.layer_decay = arguments.pretrained, arguments.layer_decay
    count = labelled_count(open_split(folder, "train", splits=config.data.splits), percent / 100)
    config.epochs = arguments.steps * config.batch_size / count
    config.optim.warmup_epochs = config.epochs / 8
    config.monitor.every_epochs = config.epochs / EVALUATIONS
    return config


def few_labels(config: ml_collections.ConfigDict, percent: float, workdir: Path) -> Setting:
    """The setting of one run."""
    setting = finetune.open_finetuning(config, workdir)
    few = labelled_share(setting.train_faces, percent / 100, seed=config.seed)
    return replace(setting, train_faces=few, schedule=make_schedule(config, faces=len(few)))


def labelled_count(faces: Faces, share: float) -> int:
    """How many of the faces that share is, at least one."""
    return max(1, round(share * len(faces)))


def labelled_share(faces: Faces, share: float, *, seed: int) -> Faces:
    """That share of the faces, as evenly over the ages as can be, drawn by the seed."""
    rng = np.random.default_rng(seed)
    by_age = np.lexsort((rng.random(len(faces)), faces.labels["age"]))
    count = labelled_count(faces, share)
    places = (np.arange(count) + rng.random()) * len(faces) / count
    return faces.take(np.sort(by_age[places.astype(int)]))


def report(
    arguments: argparse.Namespace, errors: Mapping[tuple[str, float], Mapping[int, np.ndarray]]
) -> None:
    """Print the table so far; write it with its numbers and the picture."""
    done = [p for p in arguments.percent if all((side, p) in errors for side in SIDES)]
    rows = [compared(errors, percent) for percent in done]
    out = Path(arguments.out)
    text = markdown_table([table_row(row) for row in rows])
    (out / "label_efficiency.md").write_text(text + "\n")
    write_json(out / "label_efficiency.json", {"arguments": vars(arguments), "rows": rows})
    picture(out / "label_efficiency.png", rows)
    print(text, flush=True)


def compared(
    errors: Mapping[tuple[str, float], Mapping[int, np.ndarray]], percent: float
) -> dict[str, object]:
    """Both sides at one share: MAE of each seed, and their paired difference with its interval."""
    seeds = sorted(errors["pretrained", percent])
    sides = {side: [errors[side, percent][seed] for seed in seeds] for side in SIDES}
    means = {side: np.mean(found, axis=0) for side, found in sides.items()}
    return {
        "percent": percent,
        "seeds": seeds,
        **{side: [float(e.mean()) for e in found] for side, found in sides.items()},
        **paired_difference(means["scratch"], means["pretrained"]),
    }


def table_row(row: Mapping) -> dict[str, str]:
    low, high = row["interval"]
    return {
        "labels, %": f"{row['percent']:g}",
        "seeds": str(len(row["seeds"])),
        **{f"{name}, MAE": spread(row[side]) for side, (name, _) in SIDES.items()},
        "difference (95 %), years": f"{row['difference']:+.2f} ({low:+.2f} to {high:+.2f})",
    }


def picture(path: Path, rows: Sequence[Mapping]) -> None:
    """Error over the share of labels, both sides, every seed a dot."""
    shares = [row["percent"] for row in rows]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.4, 4.4), layout="constrained")
        ax = figure.add_subplot()
        ax.set_xscale("log")
        for side, (name, colour) in SIDES.items():
            ax.plot(shares, [np.mean(row[side]) for row in rows], color=colour, label=name)
            for row in rows:
                ax.plot([row["percent"]] * len(row[side]), row[side], "o", color=colour, ms=4)
        ax.set_xticks(shares, [f"{share:g} %" for share in shares], minor=False)
        ax.minorticks_off()
        ax.set_xlabel("share of the training labels")
        ax.set_ylabel("mean absolute error, years")
        ax.legend(frameon=False)
        save_figure(figure, path)


if __name__ == "__main__":
    main()

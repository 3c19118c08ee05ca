"""What the views and the temperature of SimCLR do for faces: one setting changed at a time.

    python benchmarks/ssl_ablation.py                           # UTKFace, micro, 48 px
    python benchmarks/ssl_ablation.py --only crop --seeds 0 --epochs 2

Every run is `coatnet-jax pretrain --config=pretrain:MODEL,cpu` but for the seed, the epochs and the
one value. Scores are the last ones of the validation split: the age error of a linear probe and of
nearest neighbours on frozen features, both fitted on training faces alone, and RankMe. What is
finished is skipped and what was stopped goes on, so the same command may be given again. The table
is printed after each run and written to OUT/ssl_ablation.md.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import ml_collections

from coatnet_jax import pretrain
from coatnet_jax.config import load_config
from coatnet_jax.logs import MetricsLog
from coatnet_jax.pages import markdown_table, spread
from coatnet_jax.paths import home
from coatnet_jax.runtime import set_up

# What is changed from the config's own value, which is among them for each.
ABLATIONS = {
    "crop": ("augment.crop", ((0.08, 1.0), (0.3, 1.0), (0.6, 1.0))),
    "blur": ("augment.blur_prob", (0.0, 0.2, 0.5)),
    "colour": ("augment.jitter", (0.0, 0.5, 1.0)),
    "temperature": ("loss.temperature", (0.07, 0.2, 0.5)),
}
SCORES = {"probe_mae": "linear probe, years", "knn_mae": "kNN, years", "rank_me": "RankMe"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(ABLATIONS), default=list(ABLATIONS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--model", default="micro")
    parser.add_argument("--name", default="utkface", help="prepared data set")
    parser.add_argument("--root", default="", help="folder for built data")
    parser.add_argument("--out", default="runs/ssl_ablation")
    arguments = parser.parse_args()
    set_up()
    jax.config.update("jax_compilation_cache_dir", str(home() / "compiled"))
    found: dict[tuple[str, str], list[Mapping[str, float]]] = {}
    for seed in arguments.seeds:  # all settings with the first seed first: a table soon
        for name in arguments.only:
            key, values = ABLATIONS[name]
            for value in values:
                result = scores(arguments, key, value, seed)
                if result is None:
                    print(f"{key} {value}, seed {seed}: stopped; the same command goes on")
                    return
                found.setdefault((key, str(value)), []).append(result)
                text = markdown_table(table(found))
                (Path(arguments.out) / "ssl_ablation.md").write_text(text + "\n")
                print(text, flush=True)


def scores(arguments: argparse.Namespace, key: str, value, seed: int) -> Mapping | None:
    """The last validation scores of one run, trained first if need be; None: it was stopped."""
    config = load_config(f"pretrain:{arguments.model},cpu")
    config.data.root, config.data.name, config.data.cache = arguments.root, arguments.name, "host"
    config.seed, config.epochs = seed, arguments.epochs
    config.monitor.every_epochs = config.epochs
    config.optim.warmup_epochs = config.epochs / 10
    usual = flat_value(config, key) == value
    with config.unlocked():
        config.update_from_flattened_dict({key: value})
    setting = f"{arguments.name}-{arguments.model}-{arguments.epochs:g}ep"
    # The config's own value is one run, which every ablation shows.
    changed = "usual" if usual else f"{key}={json.dumps(value).replace(' ', '')}"
    workdir = Path(arguments.out) / setting / f"{changed}-{seed}"
    told = workdir / "run.json"
    if not told.is_file() or not json.loads(told.read_text()).get("finished"):
        if not pretrain.run(config, workdir):
            return None
    return MetricsLog(workdir).rows("validation")[-1]


def flat_value(config: ml_collections.ConfigDict, key: str):
    """The value under a dotted key."""
    for word in key.split("."):
        config = config[word]
    return config


def table(found: Mapping[tuple[str, str], Sequence[Mapping[str, float]]]) -> list[dict[str, str]]:
    """One row for each value: mean ± standard deviation over the seeds."""
    return [
        {
            "setting": key,
            "value": value,
            "runs": str(len(runs)),
            **{label: spread([run[score] for run in runs]) for score, label in SCORES.items()},
        }
        for (key, value), runs in found.items()
    ]


if __name__ == "__main__":
    main()

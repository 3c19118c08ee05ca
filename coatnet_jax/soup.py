"""Model soups: the mean of the weights of several fine-tuned runs (arXiv 2203.05482).

    coatnet-jax soup runs/a runs/b runs/c --workdir=runs/soup

Runs that started from the same weights often end in one valley of the loss. Their mean then errs
less than each of them, nearly as their ensemble does, and is one model to keep and to run. The
greedy soup takes the best run by validation and adds another, in the order of their errors, where
the mean with it errs less on validation. The test split is never looked at.

The statistics of BatchNorm are measured anew for every mean, on training faces: those of the mean's
activations are not the mean of the runs' (arXiv 1803.05407).
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from flax import linen as nn
from jaxtyping import Array, UInt8

from coatnet_jax.ages import N_AGES, get_decoder
from coatnet_jax.batchnorm import MOMENTUM
from coatnet_jax.checkpoint import check_unused, load_variables, save_variables
from coatnet_jax.config import flat, read_json
from coatnet_jax.finetune import training_view
from coatnet_jax.inference import Run, build_model, predict_split, trained_config
from coatnet_jax.leaks import open_trained
from coatnet_jax.lineage import teacher_folders
from coatnet_jax.logs import update_run_info, write_run_info
from coatnet_jax.metrics import mae
from coatnet_jax.release_weights import is_released
from coatnet_jax.sharding import check_batch_size, make_mesh, replicate, shard_batch
from coatnet_jax.terms import model_card
from coatnet_jax.training_set import told_before
from input_pipeline.pipeline import Faces, open_split, train_loader

# What has to agree for weights to mean the same; the rest of the recipe may differ.
ALIKE = ("model.name", "model.image_size", "model.mean", "model.std", "loss.name", "data.name")
FACES = 6400  # training faces that the statistics are measured on


def run(
    run_dirs: Sequence[str | Path],
    workdir: Path,
    data_folder: Path,
    *,
    uniform: bool = False,
) -> dict[str, Any]:
    """Write the mean of the runs' best checkpoints as a run of its own into `workdir`.

    Greedy by the error on the validation split of `data_folder`, or with `uniform` all of them.
    Gives back what run.json tells under `soup`: each run's error in years, whether it was taken,
    the mean's error and, to compare with, that of the mean of all runs' probabilities. Raises
    ValueError for less than two runs, runs that differ in model, loss, data or start, that were
    stopped or diverged, and where `workdir` holds a run already.
    """
    paths = [Path(path) for path in run_dirs]
    if len({path.resolve() for path in paths}) < max(2, len(paths)):
        raise ValueError("give two different runs or more to take the mean of")
    check_unused(workdir, flag="--workdir")
    configs, told = _read_alike(paths)
    weights = [load_variables(path)[0] for path in paths]
    _check_same_shapes(paths, weights)
    train, splits = open_trained(paths[0], data_folder, configs[0].data.splits)
    validation = open_split(data_folder, "validation", splits=splits)
    before = told_before(configs[0], paths[0], data_folder, own=train.fingerprint)
    validation = validation.take(~before.among(validation))
    if not len(validation):
        raise ValueError(
            f"an earlier stage of {paths[0]} was told the ages of all validation faces of "
            f"{data_folder} ({splits}): none are left to choose by"
        )

    ages = validation.labels["age"]

    def probabilities(config: ml_collections.ConfigDict, variables: Any) -> np.ndarray:
        mesh = make_mesh()
        run = Run(config, replicate(variables, mesh), mesh)
        p, _ = predict_split(run, validation, run.probabilities, done="predicted")
        return p.astype(np.float64)

    def error(config: ml_collections.ConfigDict, p: np.ndarray) -> float:
        return mae(ages, get_decoder(config.loss.get("decode", "median"))(p))

    def mix(chosen: Sequence[int]) -> tuple[Any, float]:
        # The views, and so the statistics, are those of the best run's training.
        config, mean = configs[chosen[0]], mean_variables([weights[i] for i in chosen])
        mean = with_new_statistics(config, mean, train)
        found = error(config, probabilities(config, mean))
        names = " + ".join(str(paths[i]) for i in chosen)
        print(f"[soup] {names}, new statistics: {found:.3f} years", flush=True)
        return mean, found

    errors, together = [], np.zeros((len(ages), N_AGES))
    for path, config, variables in zip(paths, configs, weights, strict=True):
        p = probabilities(config, variables)
        together += p / len(paths)
        errors.append(error(config, p))
        print(f"[soup] {path}: validation error {errors[-1]:.3f} years", flush=True)
        if not math.isfinite(errors[-1]):
            raise ValueError(f"{path} predicts no numbers: it diverged, leave it out")
    order = sorted(range(len(paths)), key=errors.__getitem__)
    ensemble = error(configs[order[0]], together)
    print(f"[soup] mean of the probabilities of all: {ensemble:.3f} years", flush=True)
    if uniform:
        chosen, (variables, found) = order, mix(order)
    else:
        # The best run gains from new statistics as well: no mean should pass for better by that.
        first = min((weights[order[0]], errors[order[0]]), mix(order[:1]), key=itemgetter(1))
        chosen, (variables, found) = greedy(order, first, mix)
    if not math.isfinite(found):
        raise ValueError("the mean of all predicts no numbers: leave --uniform out")
    config = configs[chosen[0]]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    fingerprint = told[0]["data_fingerprint"]
    write_run_info(workdir, config, data_fingerprint=fingerprint, parameters=parameters)
    save_variables(workdir, variables)
    soup = {
        "validation_mae": round(found, 4),
        "ensemble_mae": round(ensemble, 4),
        "runs": [
            {
                "run": str(paths[i]),
                "validation_mae": round(errors[i], 4),
                "taken": i in chosen,
                "seed": configs[i].seed,
                "epochs": configs[i].epochs,
                "git_revision": told[i]["git_revision"],
            }
            for i in order
        ],
    }
    seconds = sum(told[i].get("wall_seconds", 0.0) for i in chosen)
    update_run_info(
        workdir,
        **{"wall_seconds": round(seconds, 1), "finished": True, "step": 0, "soup": soup},
        averaged=sum(told[i].get("averaged", 1) for i in chosen),
        before=told[0].get("before", []),
    )
    card = model_card(config, parameters=parameters, fingerprint=fingerprint)
    (workdir / "MODEL_CARD.md").write_text(card, encoding="utf-8")
    print(
        f"[soup] the mean of {len(chosen)} of {len(paths)} runs, validation error {found:.3f} "
        f"years (the best alone: {errors[order[0]]:.3f}); written to {workdir}"
    )
    return soup


def greedy(
    order: Sequence[int], first: tuple[Any, float], mix: Callable
) -> tuple[list[int], tuple[Any, float]]:
    """(those taken, (weights, error) of their mean), the greedy soup of arXiv 2203.05482.

    `order` begins with the best, whose (weights, error) are `first`; `mix(some)` gives those of
    the mean of some. One is taken where the error with it is smaller.
    """
    chosen, best = [order[0]], first
    for i in order[1:]:
        tried = mix([*chosen, i])
        if tried[1] < best[1]:
            chosen, best = [*chosen, i], tried
    return chosen, best


def mean_variables(several: Sequence[Any]) -> Any:
    """The mean of trees of the same arrays, summed in float64."""
    return jax.tree.map(
        lambda *leaves: np.mean([np.asarray(x, np.float64) for x in leaves], axis=0).astype(
            leaves[0].dtype
        ),
        *several,
    )


def with_new_statistics(
    config: ml_collections.ConfigDict, variables: Any, faces: Faces, *, n_faces: int = FACES
) -> Any:
    """`variables` with BatchNorm's statistics measured on views of `n_faces` training faces.

    Views and batches are those of the config's training; every batch has the same weight. Stages
    that the training kept frozen keep their statistics, and so does a model without BatchNorm.
    """
    before = variables["batch_stats"]
    if not jax.tree.leaves(before):
        return variables
    mesh = make_mesh()
    check_batch_size(config.batch_size, mesh)
    step = partial(
        _statistics_step,
        model=build_model(config),
        view=training_view(config, config.model.image_size),
    )
    params, start = replicate(variables["params"], mesh), replicate(before, mesh)
    batches = train_loader(
        faces, batch_size=config.batch_size, image_size=config.data.image_size, seed=config.seed
    )
    steps = -(-n_faces // config.batch_size)
    total = jax.tree.map(np.zeros_like, before)
    for number, batch in enumerate(islice(batches, steps)):
        images = shard_batch({"image": batch["image"]}, mesh)["image"]
        key = jax.random.fold_in(jax.random.key(config.seed), number)
        after = jax.device_get(step(params, start, images, key))
        # What one batch moves the running statistics by, the other way round.
        own = jax.tree.map(lambda a, b: (a - MOMENTUM * b) / (1 - MOMENTUM), after, before)
        total = jax.tree.map(np.add, total, own)
    return {**variables, "batch_stats": jax.tree.map(lambda x: x / steps, total)}


@partial(jax.jit, static_argnames=("model", "view"))
def _statistics_step(
    params: Any,
    statistics: Any,
    images: UInt8[Array, "b h w 3"],
    key: jax.Array,
    *,
    model: nn.Module,
    view: Callable,
) -> Any:
    """The running `statistics` after one batch of training."""
    key_view, key_dropout = jax.random.split(key)
    _, mutated = model.apply(
        {"params": params, "batch_stats": statistics},
        view(key_view, images),
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": key_dropout},
    )
    return mutated["batch_stats"]


def _read_alike(paths: Sequence[Path]) -> tuple[list[ml_collections.ConfigDict], list[dict]]:
    """The configs and run.json of fine-tuned runs; ValueError where they do not fit together."""
    configs = [trained_config(path) for path in paths]
    told = [
        read_json(path / "run.json", wants=("data_fingerprint", "git_revision")) for path in paths
    ]
    for path, config, run_told in zip(paths, configs, told, strict=True):
        if config.stage != "finetune":
            raise ValueError(f"{path} is a {config.stage} run; give runs of finetune")
        if not (run_told.get("finished") or is_released(path)):
            raise ValueError(f"{path} was stopped before its end: give its command again first")
    values = [flat(config.to_dict()) for config in configs]
    for path, config, theirs, their_run in list(zip(paths, configs, values, told, strict=True))[1:]:
        differing = [
            f"{key} {theirs.get(key)} there, {values[0].get(key)} in {paths[0]}"
            for key in ALIKE
            if theirs.get(key) != values[0].get(key)
        ]
        if their_run["data_fingerprint"] != told[0]["data_fingerprint"]:
            differing.append("other training faces")
        if _origin(configs[0], told[0]) != _origin(config, their_run):
            differing.append("it started from other weights")
        if differing:
            raise ValueError(f"{path} cannot be averaged with the others: {'; '.join(differing)}")
    return configs, told


def _origin(config: ml_collections.ConfigDict, told: dict[str, Any]) -> Any:
    """What the weights of a run come from: a folder and whether the head does too, of a released
    run the stages before, else the seed of random weights; and the teachers."""
    teachers = {path.resolve() for path in teacher_folders(config)}
    if config.init_from:
        return Path(config.init_from).resolve(), config.get("init_head", False), teachers
    before = told.get("before", [])
    started = any("teacher" not in stage for stage in before)
    return before, teachers, None if started else config.seed


def _check_same_shapes(paths: Sequence[Path], weights: Sequence[Any]) -> None:
    shapes = [jax.tree.map(np.shape, variables) for variables in weights]
    for path, shape in zip(paths, shapes, strict=True):
        if shape != shapes[0]:
            raise ValueError(
                f"{path} has other weights than {paths[0]}: average runs of one config.model"
            )

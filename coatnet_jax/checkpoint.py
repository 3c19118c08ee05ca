"""Checkpoints of a run, and loading one run's weights into another model. The only orbax import.

A checkpoint holds these items: `variables` (parameters and BatchNorm statistics), `training` (step,
optimizer state, key), `iterator` (the place in the data), `ema_params` where a moving average is
kept and `extra` where a step keeps more. Evaluation reads `variables` and `ema_params` and never
needs the optimizer to be known.
"""

import logging
import math
from itertools import product
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.tree_util import keystr
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from coatnet_jax.baselines.vit import adapt_positions
from coatnet_jax.coatnet import adapt_relative_bias
from coatnet_jax.config import read_config
from coatnet_jax.release_weights import is_released, load_released
from coatnet_jax.train_state import TrainState
from input_pipeline.errors import first_line

FOLDER = "checkpoints"
# Stands for "not evaluated" in checkpoints that are saved between two evaluations, or where one
# gave no number.
NO_METRIC = 1e9
# Parameters whose shape follows the image size, with what resizes them.
RESIZABLE = {"relative_bias": adapt_relative_bias, "position_embedding": adapt_positions}

logging.getLogger("absl").setLevel(logging.ERROR)


class Checkpoints:
    """The checkpoints of one run: the latest and the one with the lowest validation `metric`."""

    def __init__(self, workdir: Path, *, metric: str):
        self.metric = metric
        policy = AnyPreservationPolicy(
            [LatestN(1), BestN(get_metric_fn=lambda m: m[metric], reverse=True, n=1)]
        )
        self.manager = _manager(
            workdir,
            preservation_policy=policy,
            best_fn=lambda m: m[metric],
            best_mode="min",
            create=True,
        )

    def save(
        self, state: TrainState, iterator_state: dict, metrics: dict[str, float] | None = None
    ) -> None:
        """Save everything under the state's step; `metrics` are those of an evaluation at it."""
        items = {
            "variables": {"params": state.params, "batch_stats": state.batch_stats},
            "training": {"step": state.step, "opt_state": state.opt_state, "rng": state.rng},
        }
        items |= _optional_items(state)
        saved = {key: ocp.args.StandardSave(value) for key, value in items.items()}
        step = int(state.step)
        if step in self.manager.all_steps():
            return
        metric = float((metrics or {}).get(self.metric, NO_METRIC))
        self.manager.save(
            step,
            args=ocp.args.Composite(iterator=ocp.args.JsonSave(iterator_state), **saved),
            # NaN is neither more nor less than another, and would be taken for the best.
            metrics={self.metric: metric if math.isfinite(metric) else NO_METRIC},
        )

    def restore_latest(self, state: TrainState) -> tuple[TrainState, dict] | None:
        """The newest (state, iterator state) in the shape and sharding of `state`, or None.

        Raises ValueError where the checkpoint was made by another model or optimizer.
        """
        step = self.manager.latest_step()
        if step is None:
            return None
        like = {
            "variables": {"params": state.params, "batch_stats": state.batch_stats},
            "training": {"step": state.step, "opt_state": state.opt_state, "rng": state.rng},
        }
        like |= _optional_items(state)
        folder = self.manager.directory / str(step)
        try:
            saved = _shapes(self.manager, step, "variables")
        except Exception as error:  # orbax raises many kinds for damaged files
            raise ValueError(
                f"the checkpoint {folder} cannot be read ({first_line(error)}); it is damaged: "
                "delete that folder to go on from the one before, or give a new --workdir"
            ) from None
        _check_same(saved, like["variables"], saved_name=str(folder), model_name="this config")
        args = {
            key: ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, value))
            for key, value in like.items()
        }
        try:
            restored = self.manager.restore(
                step, args=ocp.args.Composite(iterator=ocp.args.JsonRestore(), **args)
            )
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise ValueError(
                f"{folder} does not fit this config's optimizer or moving average "
                f"({first_line(error)}); use the config it was started with, or a new --workdir"
            ) from None
        variables, training = restored["variables"], restored["training"]
        optional = {name: restored[name] for name in _optional_items(state)}
        state = state.replace(**variables, **training, **optional)
        return state, restored["iterator"]

    def close(self) -> None:
        self.manager.close()


def best_step(run_dir: Path) -> int | None:
    """The step whose weights `load_variables` gives; None where no checkpoint was saved."""
    manager = _manager(run_dir)
    step = _best_step(manager) if manager.all_steps() else None
    manager.close()
    return step


def has_checkpoint(run_dir: Path) -> bool:
    """Whether a run has saved one: the folder of them is made before its first step."""
    return any(path.name.isdigit() for path in (Path(run_dir) / FOLDER).glob("*"))


def check_unused(folder: Path, *, flag: str) -> None:
    """Raise ValueError where `folder` holds a run or a released model, which must not be mixed
    with another, or the config.json of another program; `flag` is the one that named it."""
    for held, holds in (
        ((folder / FOLDER).is_dir(), "run"),
        (is_released(folder), "released model"),
    ):
        if held:
            raise ValueError(f"{folder} holds a {holds} already; give a new {flag}")
    if (folder / "config.json").is_file():
        try:
            read_config(folder / "config.json")
        except ValueError:
            raise ValueError(
                f"{folder} holds the config.json of something else, which this would replace; give "
                f"a new {flag}"
            ) from None


def save_variables(workdir: Path, variables: dict[str, Any]) -> None:
    """Save {'params', 'batch_stats'} that were not trained here, as the checkpoint of step 0."""
    manager = _manager(workdir, create=True)
    manager.save(0, args=ocp.args.Composite(variables=ocp.args.StandardSave(variables)))
    manager.close()


def load_variables(run_dir: Path, *, which: str = "best") -> tuple[dict[str, Any], int]:
    """({'params', 'batch_stats'} as NumPy arrays, step) of a run: 'best', 'latest' or a step.

    The moving average is taken where there is one. A folder of `coatnet-jax release` has one step
    only. Raises FileNotFoundError where the run has no checkpoint, ValueError for an unknown
    `which`.
    """
    run_dir = Path(run_dir)
    if is_released(run_dir):
        return load_released(run_dir, which=which)
    if not (run_dir / FOLDER).is_dir():
        what = f"it has no folder {FOLDER}" if run_dir.is_dir() else "there is no such folder"
        raise FileNotFoundError(
            f"no checkpoint in {run_dir}: {what}; give the --workdir of a pretrain or finetune run"
        )
    manager = _manager(run_dir)
    steps = manager.all_steps()
    if not steps:
        raise FileNotFoundError(f"no checkpoint in {run_dir / FOLDER}: the run saved none yet")
    if which == "best":
        step = _best_step(manager)
    elif which == "latest":
        step = manager.latest_step()
    elif which.isdigit() and int(which) in steps:
        step = int(which)
    else:
        raise ValueError(
            f"no checkpoint {which!r} in {run_dir}: choose best, latest or one of {steps}"
        )
    try:
        variables = _restore_numpy(manager, step, "variables")
        if (Path(manager.directory) / str(step) / "ema_params").is_dir():
            variables["params"] = _restore_numpy(manager, step, "ema_params")
    except Exception as error:  # orbax raises many kinds for damaged files
        raise ValueError(
            f"the checkpoint {manager.directory / str(step)} cannot be read "
            f"({first_line(error)}); it is damaged or not one of ours"
        ) from None
    manager.close()
    return variables, step


def load_backbone(
    run_dir: Path, variables: dict[str, Any], *, head: bool = False
) -> dict[str, Any]:
    """`variables` with the backbone's parameters and statistics taken from another run, with
    `head` its head's too.

    Strict: every name and shape must agree, but for tables of positions, which are
    interpolated to another image size. Raises ValueError naming both sides where they differ.
    """
    loaded, step = load_variables(run_dir)
    merged = {kind: dict(variables[kind]) for kind in ("params", "batch_stats")}
    for kind, part in product(merged, ("backbone", "head") if head else ("backbone",)):
        # A backbone without BatchNorm and a head have no statistics.
        source, like = (tree.get(kind, {}).get(part, {}) for tree in (loaded, variables))
        if kind == "params" and not source:
            raise ValueError(f"{run_dir} (step {step}) has no {part} in its {kind}")
        names = {"saved_name": str(run_dir), "model_name": "this model"}
        _check_same({part: source}, {part: like}, resizable=tuple(RESIZABLE), **names)
        for adapt in RESIZABLE.values():
            source = adapt(source, like)
        _check_same({part: source}, {part: like}, **names)
        if source:
            merged[kind][part] = source
    return merged


def _optional_items(state: TrainState) -> dict[str, Any]:
    items = {"ema_params": state.ema_params, "extra": state.extra}
    return {name: item for name, item in items.items() if item is not None}


def _manager(workdir: Path, **options) -> ocp.CheckpointManager:
    folder = (Path(workdir) / FOLDER).resolve()
    options = ocp.CheckpointManagerOptions(
        enable_async_checkpointing=False, create=options.pop("create", False), **options
    )
    return ocp.CheckpointManager(folder, options=options)


def _best_step(manager: ocp.CheckpointManager) -> int:
    """The step with the lowest metric; the newest where none was evaluated."""

    def metric(step: int) -> float:
        return min(dict(manager.metrics(step) or {"none": NO_METRIC}).values())

    return min(sorted(manager.all_steps(), reverse=True), key=metric)


def _restore_numpy(manager: ocp.CheckpointManager, step: int, item: str) -> Any:
    """One item as NumPy arrays, whatever devices it was saved from."""
    folder = Path(manager.directory) / str(step) / item
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(folder).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy))


def _shapes(manager: ocp.CheckpointManager, step: int, item: str) -> Any:
    with ocp.PyTreeCheckpointer() as checkpointer:
        folder = Path(manager.directory) / str(step) / item
        return checkpointer.metadata(folder).item_metadata.tree


def _check_same(
    saved, model, *, saved_name: str, model_name: str, resizable: tuple[str, ...] = ()
) -> None:
    """Raise ValueError that lists up to four differences in names and shapes, with both sides.

    Of leaves that are called `resizable` only the last dimension has to agree.
    """

    def shape(name: str, leaf) -> tuple[int, ...]:
        free = name.endswith(resizable)
        return tuple(leaf.shape)[-1:] if free else tuple(leaf.shape)

    there, here = (
        {name: shape(name, leaf) for path, leaf in leaves for name in [_leaf_name(path)]}
        for leaves in (jax.tree.leaves_with_path(saved), jax.tree.leaves_with_path(model))
    )
    differing = [
        f"{name}: {there.get(name, 'missing')} there, {here.get(name, 'missing')} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]
    if differing:
        more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise ValueError(
            f"the checkpoint {saved_name} does not fit {model_name}: "
            f"{'; '.join(differing[:4])}{more}; use the config.model it was trained with"
        )


def _leaf_name(path) -> str:
    return keystr(path, simple=True, separator="/")

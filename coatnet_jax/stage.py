"""What pre-training and fine-tuning share: data, schedule, start weights, the run's files."""

import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from coatnet_jax import loop
from coatnet_jax.checkpoint import (
    FOLDER,
    Checkpoints,
    check_unused,
    has_checkpoint,
    load_backbone,
)
from coatnet_jax.config import flat, read_config, read_json
from coatnet_jax.distributed import any_process, is_main
from coatnet_jax.inference import normalisation
from coatnet_jax.lineage import teacher_folders
from coatnet_jax.logs import MetricsLog, update_run_info, write_run_info
from coatnet_jax.optim import create_optimizer, optimizer_with_traced_rates, warmup_cosine
from coatnet_jax.paths import data_folder
from coatnet_jax.progressive import steps_before_last
from coatnet_jax.sharding import check_batch_size, make_mesh, replicate
from coatnet_jax.teachers import check_teachers
from coatnet_jax.terms import model_card
from coatnet_jax.tracking import open_trackers
from coatnet_jax.train_state import TrainState, create_train_state, init_variables
from coatnet_jax.training_plots import run_title, training_curves
from coatnet_jax.training_set import told_before
from input_pipeline.face_crops import GEOMETRIES
from input_pipeline.label_noise import settle_conflicts, write_account
from input_pipeline.pipeline import Faces, decode_once, open_split, train_loader

# Keys that may differ between the runs that make up one training: they change no result.
FREE_KEYS = (
    *("max_minutes", "log_every", "track", "distributed"),
    *("data.root", "data.workers", "data.cache", "data.crop"),
)
# Keys that older runs lack, and what they did.
LATER_KEYS = {
    **{"loss.decode": "median", "loss.balanced": False, "progressive": ()},
    **{"augment.rand_augment_ops": 0, "augment.rand_augment_magnitude": 9.0},
    **{"augment.blur_prob": 0.0, "augment.blur_sigma": (0.1, 1.5)},
    **{"augment.sharpen_prob": 0.0, "augment.sharpen": 1.0},
    **{"data.label_noise": "keep", "eval_sides": (1.0,), "init_head": False},
    **{"distill.teachers": "", "distill.weight": 0.5},
}
AT_LEAST_0 = ("at least 0", lambda x: 0 <= x < math.inf)
AT_LEAST_1 = ("at least 1", lambda x: x >= 1)
OVER_0 = ("over 0", lambda x: 0 < x < math.inf)
SHARE = ("at least 0 and at most 1", lambda x: 0 <= x <= 1)
BOUNDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "epochs": OVER_0,
    "batch_size": AT_LEAST_1,
    "log_every": AT_LEAST_1,
    "monitor.every_epochs": OVER_0,
    "monitor.patience": ("at least 0 (0: never stop early)", lambda x: x >= 0),
    "monitor.images": ("at least 5", lambda x: x >= 5),  # as many as the probe wants
    "loss.temperature": OVER_0,
    "loss.student_temperature": OVER_0,
    "loss.teacher_temperature": OVER_0,
    **dict.fromkeys(("loss.momentum", "loss.center_momentum", "loss.frozen_prototypes"), SHARE),
    **{
        f"loss.{term}": AT_LEAST_0
        for term in ("redundancy", "invariance", "variance", "covariance")
    },
    "loss.sigma": OVER_0,
    "loss.years": AT_LEAST_1,
    **{f"projection.{width}": AT_LEAST_1 for width in ("hidden", "bottleneck", "out")},
    "prediction.hidden": AT_LEAST_1,
    "ema": ("at least 0 and less than 1", lambda x: 0 <= x < 1),
    "mixup": AT_LEAST_0,
    "optim.lr": OVER_0,
    "optim.weight_decay": AT_LEAST_0,
    "optim.clip_norm": ("at least 0 (0: no clipping)", lambda x: 0 <= x < math.inf),
    "optim.warmup_epochs": AT_LEAST_0,
    "loss.gender": ("at least 0 (0: off)", lambda x: 0 <= x < math.inf),
    "loss.race": ("at least 0 (0: off)", lambda x: 0 <= x < math.inf),
    "max_minutes": ("at least 0 (0: never)", lambda x: 0 <= x < math.inf),
    "distill.weight": ("over 0 and at most 1", lambda x: 0 < x <= 1),
    "model.drop_path": ("at least 0 and less than 1", lambda x: 0 <= x < 1),
    "model.image_size": AT_LEAST_1,
    "data.image_size": AT_LEAST_1,
    "progressive": (
        "whole numbers of pixels, at least 1",
        lambda x: all(isinstance(size, int) and size >= 1 for size in x),
    ),
    "model.mean": ("three numbers", lambda x: len(x) == 3 and all(map(math.isfinite, x))),
    "model.std": ("three numbers over 0", lambda x: len(x) == 3 and min(x) > 0),
    "optim.layer_decay": ("over 0 and at most 1", lambda x: 0 < x <= 1),
    "augment.crop": (
        "two shares of the area, over 0, the larger last and at most 1",
        lambda x: len(x) == 2 and 0 < x[0] <= x[1] <= 1,
    ),
    "augment.ratio": (
        "two ratios of the sides, over 0, the larger last",
        lambda x: len(x) == 2 and 0 < x[0] <= x[1] < math.inf,
    ),
    "augment.blur_sigma": (
        "two widths in pixels, over 0, the larger last",
        lambda x: len(x) == 2 and 0 < x[0] <= x[1] < math.inf,
    ),
    "augment.sharpen": AT_LEAST_0,
    "augment.jitter": AT_LEAST_0,
    **{
        f"augment.{name}_prob": ("a probability, 0 to 1", lambda x: 0 <= x <= 1)
        for name in ("flip", "jitter", "grey", "blur", "sharpen", "erase")
    },
    "data.crop": (f"one of {', '.join(GEOMETRIES)}", lambda x: x in GEOMETRIES),
}
CACHES = ("none", "host", "device")


@dataclass(frozen=True)
class Setting:
    """What a stage works with: its config, folder, devices, faces and schedule.

    conflicts: the training faces whose copies disagree, where `data.label_noise` did something.
    """

    config: ml_collections.ConfigDict
    workdir: Path
    mesh: Mesh
    train_faces: Faces
    validation_faces: Faces
    schedule: loop.Schedule
    conflicts: tuple[dict[str, str], ...] = ()


def open_stage(config: ml_collections.ConfigDict, workdir: Path, *, patience: int = 0) -> Setting:
    """Check the config against devices, data and what already lies in `workdir`.

    Raises FileNotFoundError where the data set is not prepared; ValueError where the batch cannot
    be split over the devices or `workdir` holds a run of another config; and as `check_teachers`.
    """
    check_values(config)
    _keep_normalisation(config, workdir)
    check_teachers(config)
    _check_same_config(config, workdir)
    if config.data.cache not in CACHES:
        raise ValueError(f"data.cache must be one of {CACHES}, not {config.data.cache!r}")
    mesh = make_mesh()
    check_batch_size(config.batch_size, mesh)
    folder = data_folder(config.data.name, config.data.root)
    train_faces = open_split(folder, "train", splits=config.data.splits)
    validation_faces = _untold_validation(config, workdir, folder)
    how = config.data.get("label_noise", "keep")
    train_faces, conflicts = settle_conflicts(train_faces, how)
    if how != "keep":
        _tell_conflicts(config, conflicts)
    if config.batch_size > len(train_faces):
        print(
            f"[{config.stage}] a batch of {config.batch_size:,} holds some of the "
            f"{len(train_faces):,} training images more than once, as if they were other faces: "
            "lower --config.batch_size",
            flush=True,
        )
    if config.data.cache != "none":
        train_faces = decode_once(train_faces, config.data.image_size)
        validation_faces = decode_once(validation_faces, config.data.image_size)
    schedule = make_schedule(config, faces=len(train_faces), patience=patience)
    return Setting(
        config, Path(workdir), mesh, train_faces, validation_faces, schedule, tuple(conflicts)
    )


def _untold_validation(config: ml_collections.ConfigDict, workdir: Path, folder: Path) -> Faces:
    """The validation faces whose ages no earlier stage was told: the others would choose the
    checkpoint that has them by heart. Says how many are left out, and where test faces were told.
    """
    faces = open_split(folder, "validation", splits=config.data.splits)
    if not (config.init_from or teacher_folders(config)):
        return faces
    before = told_before(config, workdir, folder, own=faces.fingerprint)
    told = before.among(faces)
    if told.any():
        why = (
            "an earlier stage (config.init_from or a teacher) was told their ages; such stages had "
            f"the splits {', '.join(before.splits) or 'of other data'}, this one has "
            f"{config.data.splits} (config.data.splits)"
        )
        if told.all():
            raise ValueError(f"no validation face of {folder} chooses a checkpoint: {why}")
        print(
            f"[{config.stage}] {told.sum():,} of the {len(told):,} validation faces are left out: "
            f"{why}",
            flush=True,
        )
    with suppress(ValueError):  # a table without a test split
        test = open_split(folder, "test", splits=config.data.splits)
        if seen := int(before.among(test).sum()):
            print(
                f"[{config.stage}] of the {len(test):,} test faces an earlier stage was told the "
                f"ages of {seen:,}: evaluate will refuse them",
                flush=True,
            )
    return faces.take(~told) if told.any() else faces


def check_values(config: ml_collections.ConfigDict) -> None:
    """Raise ValueError, naming the key, for a value that no training can have."""
    values = flat(config.to_dict())
    for key, (wanted, holds) in BOUNDS.items():
        try:
            right = key not in values or holds(values[key])
        except TypeError:  # a word within a tuple of numbers
            right = False
        if not right:
            raise ValueError(f"config.{key} is {values[key]}, it must be {wanted}")
    if config.optim.warmup_epochs >= config.epochs:
        raise ValueError(
            f"config.optim.warmup_epochs is {config.optim.warmup_epochs:g}, it must be less than "
            f"config.epochs, {config.epochs:g}"
        )


def make_schedule(
    config: ml_collections.ConfigDict, *, faces: int, patience: int = 0
) -> loop.Schedule:
    """The config's schedule in steps, for so many training faces."""
    steps_per_epoch = faces / config.batch_size
    total_steps = max(1, round(config.epochs * steps_per_epoch))
    sizes = config.get("progressive", ())
    return loop.Schedule(
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        evaluate_every=max(1, round(config.monitor.every_epochs * steps_per_epoch)),
        log_every=config.log_every,
        batch_size=config.batch_size,
        patience=patience,
        # A size that brings nothing more is no reason to leave the larger ones out.
        patience_from=steps_before_last(sizes, total_steps=total_steps),
        max_minutes=config.max_minutes,
    )


def warmup_steps(config: ml_collections.ConfigDict, schedule: loop.Schedule) -> int:
    """Steps of the warm-up, fewer than the training has: rounded to whole steps, a few epochs can
    be as many as a few more."""
    steps = round(config.optim.warmup_epochs * schedule.steps_per_epoch)
    return min(steps, schedule.total_steps - 1)


def _tell_conflicts(config: ml_collections.ConfigDict, conflicts: list[dict[str, str]]) -> None:
    done = {"drop": "left out", "widen": "trained on with the ages of all their copies"}
    groups = len({row["group"] for row in conflicts})
    print(
        f"[{config.stage}] {len(conflicts)} training images in {groups} groups of copies whose "
        f"ages disagree: {done[config.data.label_noise]} (label_noise.csv)",
        flush=True,
    )


def _keep_normalisation(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Have images normalised as those were that the start weights saw; printed where it differs."""
    resuming = has_checkpoint(workdir)
    source = workdir if resuming else Path(config.init_from) if config.init_from else None
    if source is None or not (source / "config.json").is_file():
        return
    theirs = normalisation(read_config(source / "config.json"))
    if theirs != normalisation(config):
        print(
            f"[{config.stage}] images are normalised as for {source}: mean {theirs['mean']}, "
            f"std {theirs['std']} instead of the config's",
            flush=True,
        )
    with config.model.unlocked():
        config.model.update(theirs)


def _check_same_config(config: ml_collections.ConfigDict, workdir: Path) -> None:
    if has_checkpoint(workdir) and not (workdir / "config.json").is_file():
        raise ValueError(
            f"{workdir} holds checkpoints but no config.json that says of which training: give a "
            "new --workdir, or delete the folder"
        )
    if (workdir / FOLDER).is_dir():
        check_same_config(config, workdir)
    else:
        check_unused(workdir, flag="--workdir")


def check_same_config(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Raise ValueError where `workdir` holds a config.json that gives another result."""
    if not (workdir / "config.json").is_file():
        return
    before = read_config(workdir / "config.json")
    before.model.update(normalisation(before))
    there, here = (flat(c.to_dict()) for c in (before, config))
    differing = [
        f"{key} {there.get(key)!r} there, {here.get(key)!r} here"
        for key in sorted(there.keys() | here.keys())
        if there.get(key, LATER_KEYS.get(key)) != here.get(key) and key not in FREE_KEYS
    ]
    if differing:
        raise ValueError(
            f"{workdir} holds a run of another config ({'; '.join(differing[:4])}); give that "
            "config to go on with it, or a new --workdir"
        )


def check_same_data(workdir: Path, setting: Setting) -> None:
    """Raise ValueError where the run in `workdir` was begun on other faces than the setting's, on
    other labels of them, or with other validation faces (which older runs do not tell)."""
    faces, kept = setting.train_faces, len(setting.validation_faces)
    told = read_json(workdir / "run.json")
    before = told.get("data_fingerprint", "")
    if before not in ("", faces.fingerprint):
        raise ValueError(
            f"{workdir} was begun on data of fingerprint {before[:16]}, {faces.folder} has "
            f"{faces.fingerprint[:16]} now: prepare the data as they were, or give a new --workdir"
        )
    if told.get("label_digest", "") not in ("", faces.label_digest):
        raise ValueError(
            f"{workdir} was begun on other ages, genders or races of the pictures than "
            f"{faces.folder} has now: prepare the data as they were, or give a new --workdir"
        )
    if (there := told.get("validation_faces", kept)) != kept:
        raise ValueError(
            f"{workdir} was begun with {there:,} validation faces that no earlier stage was told "
            f"the ages of, now there are {kept:,}: put back the runs and the data that it started "
            "from, or give a new --workdir"
        )


def run_stage(
    setting: Setting,
    model,
    *,
    learning_rate: float,
    make_step: Callable,
    jitted: Any,
    make_evaluate: Callable,
    metric: str,
    ema: bool = False,
    layer_decay: float = 1.0,
    train_from: str = "full",
    make_extra: Callable | None = None,
    trackers: Sequence[Callable] = (),
    traced_rates: bool = False,
) -> bool:
    """Train `model` from the workdir's checkpoint, else config.init_from, else scratch.

    `make_step(tx)` gives the train step, a call of the function `jitted`, whose compiled programs
    are dropped in the end; `make_evaluate()` gives the evaluation of a state, and
    `make_extra(variables)` the first `TrainState.extra`; `metric` is the validation metric (smaller
    is better) that chooses the best checkpoint. `trackers` are told the metrics too (`MetricsLog`).
    With `traced_rates` runs that differ in learning rate and weight decay have the same program
    (`optimizer_with_traced_rates`), which the compilation cache on the disk keeps. Returns whether
    the run came to its end.
    """
    config, workdir, mesh = setting.config, setting.workdir, setting.mesh
    if is_main():
        trackers = [*open_trackers(config, workdir), *trackers]
    rng_init, rng_train = jax.random.split(jax.random.key(config.seed))
    variables = init_variables(rng_init, model, image_size=config.model.image_size)
    # Asked of all before any goes on, and makes the folder.
    resuming = any_process(has_checkpoint(workdir))
    if config.init_from and not resuming:
        head = config.get("init_head", False)
        variables = load_backbone(Path(config.init_from), variables, head=head)
        parts = "backbone and head" if head else "backbone"
        print(f"[{config.stage}] {parts} from {config.init_from}", flush=True)
    # Made after the backbone is loaded: a moving average starts from the loaded weights.
    schedule = setting.schedule
    warmup = warmup_steps(config, schedule)
    shape = partial(warmup_cosine, total_steps=schedule.total_steps, warmup_steps=warmup)
    create = partial(
        create_optimizer,
        variables["params"],
        name=config.optim.name,
        clip_norm=config.optim.clip_norm,
        layer_decay=layer_decay,
        train_from=train_from,
    )
    rates = {"weight_decay": config.optim.weight_decay}
    if traced_rates:
        rates |= {"learning_rate": learning_rate, "schedule": shape(1.0)}
        tx = optimizer_with_traced_rates(create, **rates)
    else:
        tx = create(learning_rate=shape(learning_rate), **rates)
    extra = make_extra(variables) if make_extra else None
    state = create_train_state(rng_train, variables, tx, ema=ema, extra=extra)
    state = replicate(state, mesh)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    known = resuming and (workdir / "run.json").is_file()
    if known:  # a damaged run.json should fail now, not after the training
        check_same_data(workdir, setting)
    if is_main() and not known:
        write_run_info(
            workdir,
            config,
            data_fingerprint=setting.train_faces.fingerprint,
            parameters=parameters,
            label_digest=setting.train_faces.label_digest,
            validation_faces=len(setting.validation_faces),
        )
        card = model_card(
            config, parameters=parameters, fingerprint=setting.train_faces.fingerprint
        )
        (workdir / "MODEL_CARD.md").write_text(card, encoding="utf-8")
        _copy_data_report(setting)
        if (how := config.data.get("label_noise", "keep")) != "keep":
            write_account(workdir / "label_noise.csv", list(setting.conflicts), how)
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    print(
        f"[{config.stage}] {config.model.name}, {parameters / 1e6:.2f} M parameters, "
        f"{config.model.image_size} px, {len(setting.train_faces)} training and "
        f"{len(setting.validation_faces)} validation images, batch {config.batch_size} on "
        f"{mesh.size} {jax.default_backend()} device(s){processes}; the first step compiles …",
        flush=True,
    )
    iterator = iter(
        train_loader(
            setting.train_faces,
            batch_size=config.batch_size // jax.process_count(),
            image_size=config.data.image_size,
            seed=config.seed,
            workers=config.data.workers,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            with_images=config.data.cache != "device",
        )
    )
    train_step = make_step(tx)
    if config.data.cache == "device":
        train_step = with_resident_images(train_step, setting.train_faces.pixels, mesh)
    checkpoints = Checkpoints(workdir, metric=metric)
    started = time.monotonic()
    try:
        state, finished = loop.train(
            state,
            iterator,
            name=config.stage,
            train_step=train_step,
            evaluate=make_evaluate(),
            mesh=mesh,
            schedule=schedule,
            checkpoints=checkpoints,
            log=MetricsLog(workdir, trackers=trackers),
        )
    except BaseException:
        with suppress(OSError):  # it holds checkpoints, which the same config goes on from
            (workdir / FOLDER).rmdir()  # else the folder may be given to another config
        raise
    finally:
        # Of no use to another run, which has an optimizer of its own. A CPU's program maps memory a
        # thousand times, and Linux ends a process of more than 65,530: `tune` comes to that.
        jitted.clear_cache()
    checkpoints.close()
    if not is_main():
        return finished
    if finished:
        curves, title = workdir / "curves.png", run_title(workdir)
        training_curves(curves, workdir / "metrics.jsonl", title=title, most_panels=9)
    _add_wall_time(workdir, time.monotonic() - started, finished=finished, step=int(state.step))
    return finished


def with_resident_images(train_step: Callable, pixels: np.ndarray, mesh: Mesh) -> Callable:
    """The step for batches without images: it takes theirs from `pixels` [n,H,W,3], kept on every
    device, by the batch's `index`.

    Raises ValueError where they would take more than half of a device's memory.
    """
    stats = mesh.local_devices[0].memory_stats() or {}
    limit = stats.get("bytes_limit", float("inf"))
    if pixels.nbytes > limit / 2:
        raise ValueError(
            f"{len(pixels):,} images take {pixels.nbytes / 1e9:.1f} GB of a device's "
            f"{limit / 1e9:.1f} GB: use --config.data.cache=host"
        )
    resident = replicate(pixels, mesh)
    take = jax.jit(lambda images, index: images[index])

    def step(state: TrainState, batch: dict[str, jax.Array]):
        return train_step(state, {**batch, "image": take(resident, batch["index"])})

    return step


def _copy_data_report(setting: Setting) -> None:
    """The data's own report beside the run, so that a result says what it was trained on."""
    config = setting.config
    source = data_folder(config.data.name, config.data.root) / "prepare.json"
    if source.is_file():
        shutil.copyfile(source, setting.workdir / "data.json")


def _add_wall_time(workdir: Path, seconds: float, *, finished: bool, step: int) -> None:
    before = read_json(workdir / "run.json").get("wall_seconds", 0.0)
    update_run_info(workdir, wall_seconds=round(before + seconds, 1), finished=finished, step=step)

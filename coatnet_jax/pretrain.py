"""Pre-training: two views of each face, one encoder, and the loss of a method of `ssl`."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from coatnet_jax.augment import denormalize, eval_view, simclr_view
from coatnet_jax.checkpoint import has_checkpoint
from coatnet_jax.distributed import is_main
from coatnet_jax.heads import SiameseModel
from coatnet_jax.inference import Run, build_model, image_format, normalisation
from coatnet_jax.metrics import knn_mae, mae
from coatnet_jax.pictures import contact_sheet
from coatnet_jax.probe import probe_age
from coatnet_jax.ssl.method import Method
from coatnet_jax.ssl.methods import create_method
from coatnet_jax.ssl.watch import (
    alignment_and_uniformity,
    collapse_warning,
    rank_me,
    spread,
)
from coatnet_jax.stage import Setting, open_stage, run_stage
from coatnet_jax.train_state import TrainState, apply_gradients
from input_pipeline.pipeline import Faces, decode_image, evenly_spread


def run(config: ml_collections.ConfigDict, workdir: Path) -> bool:
    """Pre-train into `workdir`, going on from its checkpoint; whether the run came to its end."""
    method = create_method(config)  # a misspelled one should fail before anything is loaded
    learning_rate = scaled_learning_rate(config)
    setting = open_stage(config, workdir)
    check_accumulation(config, setting.mesh.size)
    if method.labelled:
        print(f"[pretrain] {config.method} sees the training ages: a ceiling, no self-supervision")
    model = build_model(config)
    view = partial(simclr_view, **image_format(config), **config.augment.to_dict())
    views = workdir / "views.png"
    if not (views.is_file() and has_checkpoint(workdir)):  # else it may be of another config
        draw_views(views, setting, view)
    return run_stage(
        setting,
        model,
        learning_rate=learning_rate,
        make_step=lambda tx: partial(
            pretrain_train_step,
            model=model,
            tx=tx,
            method=method,
            view=view,
            total_steps=setting.schedule.total_steps,
            accumulate=config.accumulate,
        ),
        jitted=pretrain_train_step,
        make_evaluate=lambda: partial(evaluate, monitor=monitor_faces(setting), setting=setting),
        metric="knn_mae",
        ema=method.serves_target,
        make_extra=lambda variables: first_extra(method, variables, width=config.projection.out),
    )


def scaled_learning_rate(config: ml_collections.ConfigDict) -> float:
    """Peak learning rate for the config's batch; `optim.lr` is that of batch 512.

    `optim.scaling` is 'linear', 'sqrt' (SimCLR's for LARS: 0.075 sqrt(batch) is 1.7 at 512) or
    'none'; ValueError for another.
    """
    scale = config.batch_size / 512
    factors = {"linear": scale, "sqrt": scale**0.5, "none": 1.0}
    if config.optim.scaling not in factors:
        raise ValueError(
            f"optim.scaling is {config.optim.scaling!r}: choose from {', '.join(factors)}"
        )
    return config.optim.lr * factors[config.optim.scaling]


def check_accumulation(config: ml_collections.ConfigDict, devices: int) -> None:
    """Raise ValueError where the batch does not divide into `accumulate` parts for the devices, or
    a part is a single image: losses, BatchNorm and what is watched compare images."""
    parts = config.accumulate
    if parts < 1 or config.batch_size % (parts * devices):
        raise ValueError(
            f"batch_size {config.batch_size} does not divide into accumulate={parts} parts on "
            f"{devices} device(s)"
        )
    if config.batch_size == parts:
        raise ValueError(
            f"batch_size {config.batch_size} in accumulate={parts} part(s) leaves one image to "
            "compare with no other: pre-training needs at least 2 in each part; raise "
            "--config.batch_size or lower --config.accumulate"
        )


def first_extra(method: Method, variables: dict[str, Any], *, width: int) -> dict | None:
    """What `TrainState.extra` holds at step 0: BYOL's target network, DINO's centre."""
    extra = {}
    if method.has_target and not method.serves_target:
        extra["target"] = jax.tree.map(jnp.copy, variables["params"])
    if memory := method.first_memory(width):
        extra["memory"] = memory
    return extra or None


@partial(
    jax.jit,
    static_argnames=("model", "tx", "method", "view", "total_steps", "accumulate"),
    donate_argnames="state",
)
def pretrain_train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    *,
    model: SiameseModel,
    tx: optax.GradientTransformation,
    method: Method,
    view: Any,
    total_steps: int,
    accumulate: int = 1,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step on `batch['image']` [b,H,W,3] uint8 and 'age' [b]: (state, loss and monitors).

    With `accumulate` the batch passes in so many parts, whose gradients are averaged, as are the
    next memories of the loss. That saves memory, but BatchNorm and losses that compare images see
    only the b / accumulate images of a part: it is not the step of the large batch.
    """
    extra = state.extra or {}
    target = state.ema_params if method.serves_target else extra.get("target")
    progress = state.step / total_steps
    memory = extra.get("memory", {})
    gradients = partial(
        _gradients, state.params, target, memory, model=model, method=method, view=view
    )
    rng = jax.random.fold_in(state.rng, state.step)
    batch_stats = state.batch_stats
    if accumulate == 1:
        grads, batch_stats, seen = gradients(batch_stats, rng, batch["image"], batch["age"])
    else:
        # Every n-th image makes a part, so that each device has its share of every part.
        parts = jax.tree.map(
            lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1),
            (batch["image"], batch["age"]),
        )

        def add(sums, part):
            grads, batch_stats, seen = gradients(sums[1], *part)
            return (jax.tree.map(jnp.add, sums[0], grads), batch_stats), seen

        start = (jax.tree.map(jnp.zeros_like, state.params), batch_stats)
        rngs = jax.random.split(rng, accumulate)
        (grads, batch_stats), seen = jax.lax.scan(add, start, (rngs, *parts))
        grads = jax.tree.map(lambda x: x / accumulate, grads)
        seen = jax.tree.map(lambda x: x.mean(0), seen)
    metrics, memory = seen
    grads = method.masked_gradients(grads, progress)
    metrics["grad_norm"] = optax.tree.norm(grads)
    new = apply_gradients(state.replace(ema_params=None), grads, batch_stats, tx=tx)
    if memory:
        extra = {**extra, "memory": memory}
    if method.has_target:
        target = optax.incremental_update(new.params, target, 1 - method.momentum_at(progress))
        if method.serves_target:
            new = new.replace(ema_params=target)
        else:
            extra = {**extra, "target": target}
    return new.replace(extra=extra or None), metrics


def _gradients(params, target, memory, batch_stats, rng, images, age, *, model, method, view):
    """(gradients, next batch_stats, (metrics, next memory)) of some images [b,H,W,3].

    Both views pass through the encoder in one forward pass, so BatchNorm sees all 2b of them.
    """
    rng_first, rng_second, rng_dropout = jax.random.split(rng, 3)
    b = images.shape[0]
    # The two views of an image lie next to each other, [b, 2, ...], so that a batch that is split
    # over devices stays where it is.
    views = jnp.stack([view(rng_first, images), view(rng_second, images)], axis=1)
    views = views.reshape(2 * b, *views.shape[2:])

    def outputs_of(params, model=model):
        outputs, mutated = model.apply(
            {"params": params, "batch_stats": batch_stats},
            views,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": rng_dropout},
        )
        first_then_second = jax.tree.map(
            lambda x: x.reshape(b, 2, -1).swapaxes(0, 1).reshape(2 * b, -1), outputs
        )
        return first_then_second, mutated.get("batch_stats", {})

    # In training BatchNorm takes the statistics of the batch, so the networks can share the running
    # ones: they are those of the network that will be evaluated.
    targets, target_stats = None, None
    if method.has_target:
        targets, target_stats = outputs_of(target, without_drop_path(model))

    def loss_fn(params):
        online, stats = outputs_of(params)
        loss, metrics, next_memory = method.loss(online, targets, age=age, memory=memory)
        stats = target_stats if method.serves_target else stats
        metrics = {"loss": loss, **metrics, **alignment_and_uniformity(online["z"])}
        return loss, (stats, (metrics, next_memory))

    (_, (batch_stats, seen)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    return grads, batch_stats, seen


def without_drop_path(model: SiameseModel) -> SiameseModel:
    """The model as it gives targets: whole, as the teacher is in the code of DINO's authors."""
    if not getattr(model.backbone, "drop_path", 0.0):
        return model
    return model.clone(backbone=model.backbone.clone(drop_path=0.0))


def draw_views(path: Path, setting: Setting, view: Any, *, faces: int = 12) -> None:
    """A picture of some training faces as the model sees them: each whole, then two views of it."""
    config = setting.config
    rows = evenly_spread(len(setting.train_faces), faces)
    images = jnp.asarray(_decode(setting.train_faces, rows, config.data.image_size))
    pixels = partial(denormalize, **normalisation(config))
    whole = pixels(eval_view(images, **image_format(config)))
    draw = jax.jit(view)  # one program for both views
    views = [pixels(draw(rng, images)) for rng in jax.random.split(jax.random.key(config.seed))]
    tiles = np.stack([whole, *views], axis=1).reshape(-1, *whole.shape[1:])
    if is_main():
        contact_sheet(path, list(tiles), columns=6)


def monitor_faces(setting: Setting) -> dict[str, np.ndarray]:
    """Decoded training and validation images with ages for the kNN monitor, kept in memory.

    Every n-th image of each split; no test image, and none of these is trained on because of it.
    """
    faces = {"train": setting.train_faces, "validation": setting.validation_faces}
    monitor = {}
    for split, source in faces.items():
        rows = evenly_spread(len(source), setting.config.monitor.images)
        monitor[f"{split}_image"] = _decode(source, rows, setting.config.data.image_size)
        monitor[f"{split}_age"] = np.asarray(source.labels["age"])[rows]
    return monitor


def evaluate(
    state: TrainState, *, monitor: dict[str, np.ndarray], setting: Setting
) -> dict[str, float]:
    """Age errors (years) of the frozen features on validation images, and how far they spread.

    `knn_mae` is that of the nearest training images, `probe_mae` of a ridge regression on the same
    ones; `embedding_std` and `rank_me` are those of `ssl.watch`; a collapse is printed in words.
    All are NaN where a feature is no number.
    """
    run = Run(
        setting.config, state.eval_variables, setting.mesh, batch_size=setting.config.batch_size
    )
    features = {split: run.features(monitor[f"{split}_image"]) for split in ("train", "validation")}
    if not all(np.isfinite(some).all() for some in features.values()):
        # Neighbours would be found all the same, and a probe would end in a traceback.
        print("[pretrain] the features are no numbers: lower --config.optim.lr", flush=True)
        return dict.fromkeys(("knn_mae", "probe_mae", "embedding_std", "rank_me"), float("nan"))
    z, age = features["validation"], monitor["validation_age"]
    train = (features["train"], monitor["train_age"])
    errors = {
        "knn_mae": knn_mae(*train, z, age, k=min(20, len(features["train"]))),
        "probe_mae": mae(age, probe_age(*train, z)[0]),
    }
    watched = {"embedding_std": spread(z), "rank_me": rank_me(z)}
    if warning := collapse_warning(**watched):
        print(f"[pretrain] {warning}", flush=True)
    return {**errors, **watched}


def _decode(faces: Faces, rows: np.ndarray, size: int) -> np.ndarray:
    return np.stack([decode_image(faces[int(row)]["image"], size) for row in rows])

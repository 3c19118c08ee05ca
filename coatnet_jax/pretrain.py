"""SimCLR pre-training (arXiv 2002.05709): two views of each face, one encoder, NT-Xent."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from coatnet_jax.augment import simclr_view
from coatnet_jax.heads import SimCLRModel
from coatnet_jax.inference import Run, build_model, image_format
from coatnet_jax.losses import nt_xent
from coatnet_jax.metrics import knn_mae
from coatnet_jax.stage import Setting, open_stage, run_stage
from coatnet_jax.train_state import TrainState, apply_gradients
from input_pipeline.pipeline import Faces, decode_image


def run(config: ml_collections.ConfigDict, workdir: Path) -> bool:
    """Pre-train into `workdir`, going on from its checkpoint; whether the run came to its end."""
    setting = open_stage(config, workdir)
    model = build_model(config)
    return run_stage(
        setting,
        model,
        learning_rate=scaled_learning_rate(config),
        make_step=lambda tx: partial(
            pretrain_train_step,
            model=model,
            tx=tx,
            view=partial(simclr_view, **image_format(config), **config.augment.to_dict()),
            temperature=config.loss.temperature,
            decoupled=config.loss.decoupled,
        ),
        make_evaluate=lambda: partial(evaluate, monitor=monitor_faces(setting), setting=setting),
        metric="knn_mae",
    )


def scaled_learning_rate(config: ml_collections.ConfigDict) -> float:
    """Peak learning rate: linear in batch / 512, for LARS its square root, as in SimCLR."""
    scale = config.batch_size / 512
    return config.optim.lr * (scale**0.5 if config.optim.name == "lars" else scale)


@partial(
    jax.jit,
    static_argnames=("model", "tx", "view", "temperature", "decoupled"),
    donate_argnames="state",
)
def pretrain_train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    *,
    model: SimCLRModel,
    tx: optax.GradientTransformation,
    view: Any,
    temperature: float,
    decoupled: bool,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One SimCLR step on `batch['image']` [b,H,W,3] uint8: (state, loss and monitors).

    Both views pass through the encoder in one forward pass, so BatchNorm sees all 2b of them.
    """
    rng_first, rng_second, rng_dropout = jax.random.split(
        jax.random.fold_in(state.rng, state.step), 3
    )
    images = batch["image"]
    b = images.shape[0]
    # The two views of an image lie next to each other, [b, 2, ...], so that a batch that is split
    # over devices stays where it is.
    views = jnp.stack([view(rng_first, images), view(rng_second, images)], axis=1)
    views = views.reshape(2 * b, *views.shape[2:])

    def loss_fn(params):
        out, mutated = model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            views,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": rng_dropout},
        )
        z = out["z"].reshape(b, 2, -1).swapaxes(0, 1).reshape(2 * b, -1)
        loss, metrics = nt_xent(z, temperature=temperature, decoupled=decoupled)
        return loss, (metrics, mutated["batch_stats"])

    (loss, (metrics, batch_stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    metrics = {"loss": loss, **metrics, "grad_norm": optax.tree.norm(grads)}
    return apply_gradients(state, grads, batch_stats, tx=tx), metrics


def monitor_faces(setting: Setting) -> dict[str, np.ndarray]:
    """Decoded training and validation images with ages for the kNN monitor, kept in memory.

    Every n-th image of each split; no test image, and none of these is trained on because of it.
    """
    faces = {"train": setting.train_faces, "validation": setting.validation_faces}
    monitor = {}
    for split, source in faces.items():
        rows = _spread(len(source), setting.config.monitor.images)
        monitor[f"{split}_image"] = _decode(source, rows, setting.config.data.image_size)
        monitor[f"{split}_age"] = np.asarray(source.labels["age"])[rows]
    return monitor


def evaluate(
    state: TrainState, *, monitor: dict[str, np.ndarray], setting: Setting
) -> dict[str, float]:
    """kNN age error (years) of the frozen features on validation images, and how far they spread.

    `embedding_std` is the mean standard deviation of the L2-normalised features' coordinates times
    sqrt(D): near 1 for features spread over the sphere, 0 where they have collapsed.
    """
    run = Run(
        setting.config, state.eval_variables, setting.mesh, batch_size=setting.config.batch_size
    )
    features = {split: run.features(monitor[f"{split}_image"]) for split in ("train", "validation")}
    z = features["validation"]
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    return {
        "knn_mae": knn_mae(
            features["train"],
            monitor["train_age"],
            features["validation"],
            monitor["validation_age"],
            k=min(20, len(features["train"])),
        ),
        "embedding_std": float(z.std(axis=0).mean() * np.sqrt(z.shape[1])),
    }


def _spread(length: int, count: int) -> np.ndarray:
    """At most `count` row numbers, evenly spread over `length` rows."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(int))


def _decode(faces: Faces, rows: np.ndarray, size: int) -> np.ndarray:
    return np.stack([decode_image(faces[int(row)]["image"], size) for row in rows])

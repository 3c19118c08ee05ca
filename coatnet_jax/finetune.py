"""Fine-tuning for age with any of the `age_losses`, and light gender and race heads."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, Float, Int

from coatnet_jax.age_losses import age_distribution, get_age_loss
from coatnet_jax.ages import age_class, check_ages, expected_age, get_decoder
from coatnet_jax.augment import mixup, supervised_view
from coatnet_jax.checkpoint import has_checkpoint
from coatnet_jax.config import read_config
from coatnet_jax.heads import N_GENDERS, N_RACES, AgeModel
from coatnet_jax.inference import Run, build_model, image_format, predict_split, sides_of
from coatnet_jax.losses import balanced_weights, cross_entropy
from coatnet_jax.metrics import accuracy, mae
from coatnet_jax.optim import hold_frozen
from coatnet_jax.progressive import check_sizes, growing_step, params_for
from coatnet_jax.rand_augment import check_rand_augment
from coatnet_jax.sharding import replicate
from coatnet_jax.stage import Setting, open_stage, run_stage
from coatnet_jax.teachers import Teacher, open_teachers, teachers_answer
from coatnet_jax.train_state import TrainState, apply_gradients, init_variables


def run(config: ml_collections.ConfigDict, workdir: Path) -> bool:
    """Fine-tune into `workdir`, going on from its checkpoint; whether the run came to its end."""
    return train(open_finetuning(config, workdir))


def open_finetuning(config: ml_collections.ConfigDict, workdir: Path) -> Setting:
    """The checked config, the faces and the schedule of a fine-tuning; ValueError as `open_stage`,
    and for an unknown loss or an age that no loss knows."""
    # What is misspelled should fail before anything is loaded.
    get_age_loss(config.loss.name)
    get_decoder(config.loss.get("decode", "median"))
    if config.get("init_head", False) and not has_checkpoint(workdir):
        _check_head(config)
    sides_of(config)
    augment = config.augment
    check_rand_augment(
        augment.get("rand_augment_ops", 0), augment.get("rand_augment_magnitude", 9.0)
    )
    setting = open_stage(config, workdir, patience=config.monitor.patience)
    check_ages(setting.train_faces.labels["age"], "the training split")
    check_ages(setting.validation_faces.labels["age"], "the validation split")
    if config.optim.layer_decay < 1 and not (config.init_from or has_checkpoint(workdir)):
        print(
            f"[{config.stage}] optim.layer_decay is {config.optim.layer_decay}, which spares early "
            "layers that have learned something; these weights are random: 1 would suit them",
            flush=True,
        )
    return setting


def _check_head(config: ml_collections.ConfigDict) -> None:
    """Raise ValueError where the head of `init_from` is of another loss, or there is none.

    Heads of different losses can have the same shapes.
    """
    if not config.init_from:
        raise ValueError("config.init_head takes the head of a run: config.init_from must name it")
    theirs = read_config(Path(config.init_from) / "config.json")
    loss = theirs.loss.name if theirs.stage == "finetune" else None
    if loss != config.loss.name:
        found = f"a fine-tuning with {loss}" if loss else f"of stage {theirs.stage}"
        raise ValueError(
            f"config.init_head wants a fine-tuning with loss {config.loss.name}, "
            f"{config.init_from} is {found}; leave init_head out to take its backbone alone"
        )


def train(setting: Setting, *, trackers: Sequence[Callable] = (), traced_rates=False) -> bool:
    """Fine-tune as `setting` says; the options are those of `run_stage`, and so is the answer."""
    config, labels = setting.config, setting.train_faces.labels
    sizes = tuple(config.get("progressive", ()))
    steps = setting.schedule.total_steps
    check_sizes(sizes, config.model.image_size, total_steps=steps)
    model = build_model(config)
    for size in sizes:  # what the model cannot take should fail before anything is trained
        jax.eval_shape(partial(init_variables, model=model, image_size=size), jax.random.key(0))

    teachers, weights = open_teachers(config)
    taught = {"teachers": teachers, "teacher_variables": replicate(weights, setting.mesh)}

    def make_step(tx: optax.GradientTransformation) -> Any:
        step = partial(_make_step, config, labels, model=model, tx=tx, **taught)
        if not sizes:
            return step(config.model.image_size)
        return growing_step(step, sizes, total_steps=steps, name=config.stage)

    return run_stage(
        setting,
        model,
        learning_rate=config.optim.lr * config.batch_size / 128,
        make_step=make_step,
        jitted=finetune_train_step,
        make_evaluate=lambda: partial(evaluate, setting=setting),
        metric="mae",
        ema=config.ema > 0,
        layer_decay=config.optim.layer_decay,
        train_from=config.optim.train_from,
        trackers=trackers,
        traced_rates=traced_rates,
    )


def _make_step(
    config: ml_collections.ConfigDict,
    labels: dict[str, Any],
    size: int,
    *,
    model: AgeModel,
    tx: optax.GradientTransformation,
    teachers: tuple[Teacher, ...],
    teacher_variables: tuple,
) -> Any:
    """The train step of a config for views of `size` pixels; `labels` are the training split's."""
    balanced = config.loss.get("balanced", False)
    return partial(
        finetune_train_step,
        model=model,
        tx=tx,
        view=training_view(config, size),
        loss_name=config.loss.name,
        sigma=config.loss.sigma,
        gender_weight=config.loss.gender,
        race_weight=config.loss.race,
        gender_classes=balanced_weights(labels["gender"], N_GENDERS) if balanced else None,
        race_classes=balanced_weights(labels["race"], N_RACES) if balanced else None,
        mixup_alpha=config.mixup,
        teachers=teachers,
        teacher_variables=teacher_variables,
        teacher_weight=config.distill.weight if teachers else 0.0,
        train_from=config.optim.train_from,
        ema=config.ema,
        smaller=size != config.model.image_size,
    )


def training_view(config: ml_collections.ConfigDict, size: int) -> Callable:
    """`(key, images) -> views` of `size` pixels, augmented as the config says."""
    return partial(
        supervised_view, **{**image_format(config), **config.augment.to_dict(), "size": size}
    )


@partial(
    jax.jit,
    static_argnames=(
        "model tx view loss_name sigma gender_weight race_weight "
        "gender_classes race_classes mixup_alpha teachers teacher_weight train_from ema "
        "smaller".split()
    ),
    donate_argnames="state",
)
def finetune_train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    *,
    model: AgeModel,
    tx: optax.GradientTransformation,
    view: Any,
    loss_name: str,
    sigma: float,
    gender_weight: float,
    race_weight: float,
    mixup_alpha: float,
    ema: float,
    gender_classes: tuple[float, ...] | None = None,
    race_classes: tuple[float, ...] | None = None,
    teachers: tuple[Teacher, ...] = (),
    teacher_variables: tuple = (),
    teacher_weight: float = 0.0,
    train_from: str = "full",
    smaller: bool = False,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One supervised step on a batch of `image`, `age`, `gender`, `race`: (state, metrics).

    Where the batch has `ages` [b, k], the label is the mean of those of all these ages (-1: none).
    `gender_classes` and `race_classes` weigh the classes (`balanced_weights`; None: all 1). Of the
    age's label `teacher_weight` is what `teachers` say of the view. `mae` is that of the expected
    age against the (mixed) label's without them, in years, on the augmented views.
    With `smaller` the views are smaller than the images that the parameters belong to.
    """
    rng_view, rng_mixup, rng_dropout = jax.random.split(
        jax.random.fold_in(state.rng, state.step), 3
    )
    age_loss = get_age_loss(loss_name)
    ages = batch.get("ages", batch["age"][:, None])
    targets = {
        "age": mean_label(ages, partial(age_loss.label, sigma=sigma)),
        "gender": class_labels(batch["gender"], N_GENDERS, weights=gender_classes),
        "race": class_labels(batch["race"], N_RACES, weights=race_classes),
        "years": mean_label(ages, partial(age_distribution, sigma=0)),
    }
    images, targets = mixup(rng_mixup, view(rng_view, batch["image"]), targets, alpha=mixup_alpha)
    if teachers:
        answer = teachers_answer(teachers, teacher_variables, images)
        targets["age"] += teacher_weight * (answer - targets["age"])

    def loss_fn(params):
        params = hold_frozen(params, train_from)
        seen = params_for(params, images, model=model) if smaller else params
        out, mutated = model.apply(
            {"params": seen, "batch_stats": state.batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": rng_dropout},
        )
        loss = jnp.mean(age_loss.loss(out["age"], targets["age"]))
        total = loss + gender_weight * jnp.mean(cross_entropy(out["gender"], targets["gender"]))
        total = total + race_weight * jnp.mean(cross_entropy(out["race"], targets["race"]))
        return total, (loss, out["age"], mutated["batch_stats"])

    grads, (loss, outputs, batch_stats) = jax.grad(loss_fn, has_aux=True)(state.params)
    off = expected_age(age_loss.probabilities(outputs)) - expected_age(targets["years"])
    metrics = {
        "loss": loss,
        "mae": jnp.mean(jnp.abs(off)),
        "grad_norm": optax.tree.norm(grads),
    }
    return apply_gradients(state, grads, batch_stats, tx=tx, ema=ema), metrics


def mean_label(ages: Int[Array, "b k"], label: Callable) -> Float[Array, "b 117"]:
    """The mean of `label` [b, 117] over each row's ages that are not -1: where copies of a photo
    disagree, every age they were given has an equal share."""
    known = (ages >= 0).astype(jnp.float32)
    labels = jnp.stack([label(column) for column in ages.T], axis=1)
    return jnp.einsum("bk,bka->ba", known, labels, precision="highest") / known.sum(1)[:, None]


def class_labels(
    label: Int[Array, "b"], classes: int, *, weights: tuple[float, ...] | None = None
) -> Float[Array, "b k"]:
    """One-hot rows, each times its class's weight; zeros, which add no loss, where it is -1."""
    one_hot = jax.nn.one_hot(label, classes)
    return one_hot if weights is None else one_hot * jnp.asarray(weights)


def evaluate(state: TrainState, *, setting: Setting) -> dict[str, float]:
    """MAE (years) and 4-class accuracy of the decoded ages on the whole validation split."""
    run = Run(
        setting.config, state.eval_variables, setting.mesh, batch_size=setting.config.batch_size
    )
    probabilities, labels = predict_split(
        run, setting.validation_faces, partial(run.probabilities, flip=False)
    )
    predicted = get_decoder(run.decode)(probabilities)
    return {
        "mae": mae(labels["age"], predicted),
        "accuracy": accuracy(age_class(labels["age"]), age_class(predicted)),
    }

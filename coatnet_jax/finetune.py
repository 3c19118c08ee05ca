"""Fine-tuning for age: a distribution over 0-116 years, with light gender and race heads."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from coatnet_jax.ages import N_AGES, age_class, expected_age, median_age
from coatnet_jax.augment import mixup, supervised_view
from coatnet_jax.heads import N_GENDERS, N_RACES, AgeModel
from coatnet_jax.inference import Run, build_model, image_format, predict_split
from coatnet_jax.losses import age_distribution, cross_entropy, get_age_loss
from coatnet_jax.metrics import accuracy, mae
from coatnet_jax.stage import Setting, open_stage, run_stage
from coatnet_jax.train_state import TrainState, apply_gradients


def run(config: ml_collections.ConfigDict, workdir: Path) -> bool:
    """Fine-tune into `workdir`, going on from its checkpoint; whether the run came to its end."""
    get_age_loss(config.loss.name)  # a misspelled loss should fail before anything is loaded
    setting = open_stage(config, workdir, patience=config.monitor.patience)
    model = build_model(config)
    return run_stage(
        setting,
        model,
        learning_rate=config.optim.lr * config.batch_size / 128,
        make_step=lambda tx: partial(
            finetune_train_step,
            model=model,
            tx=tx,
            view=partial(supervised_view, **image_format(config), **config.augment.to_dict()),
            loss_name=config.loss.name,
            sigma=config.loss.sigma,
            gender_weight=config.loss.gender,
            race_weight=config.loss.race,
            mixup_alpha=config.mixup,
            ema=config.ema,
        ),
        make_evaluate=lambda: partial(evaluate, setting=setting),
        metric="mae",
        ema=config.ema > 0,
        layer_decay=config.optim.layer_decay,
        train_from=config.optim.train_from,
    )


@partial(
    jax.jit,
    static_argnames=(
        "model tx view loss_name sigma gender_weight race_weight mixup_alpha ema".split()
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
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One supervised step on a batch of `image`, `age`, `gender`, `race`: (state, metrics).

    `mae` is that of the expected age against the (mixed) label's, in years, on the augmented views.
    """
    rng_view, rng_mixup, rng_dropout = jax.random.split(
        jax.random.fold_in(state.rng, state.step), 3
    )
    targets = {
        "age": age_distribution(batch["age"], sigma=sigma),
        # An unknown label (-1) gives a row of zeros, which adds nothing to the loss.
        "gender": jax.nn.one_hot(batch["gender"], N_GENDERS),
        "race": jax.nn.one_hot(batch["race"], N_RACES),
        "years": jax.nn.one_hot(batch["age"], N_AGES),
    }
    images, targets = mixup(rng_mixup, view(rng_view, batch["image"]), targets, alpha=mixup_alpha)
    age_loss = get_age_loss(loss_name)

    def loss_fn(params):
        out, mutated = model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": rng_dropout},
        )
        loss = jnp.mean(age_loss(out["age"], targets["age"]))
        total = loss + gender_weight * jnp.mean(cross_entropy(out["gender"], targets["gender"]))
        total = total + race_weight * jnp.mean(cross_entropy(out["race"], targets["race"]))
        return total, (loss, out["age"], mutated["batch_stats"])

    grads, (loss, logits, batch_stats) = jax.grad(loss_fn, has_aux=True)(state.params)
    off = expected_age(jax.nn.softmax(logits)) - expected_age(targets["years"])
    metrics = {
        "loss": loss,
        "mae": jnp.mean(jnp.abs(off)),
        "grad_norm": optax.tree.norm(grads),
    }
    return apply_gradients(state, grads, batch_stats, tx=tx, ema=ema), metrics


def evaluate(state: TrainState, *, setting: Setting) -> dict[str, float]:
    """MAE (years) of the posterior median and 4-class accuracy on the whole validation split."""
    run = Run(
        setting.config, state.eval_variables, setting.mesh, batch_size=setting.config.batch_size
    )
    probabilities, labels = predict_split(
        run, setting.validation_faces, partial(run.probabilities, flip=False), run.batch_size
    )
    predicted = median_age(probabilities)
    return {
        "mae": mae(labels["age"], predicted),
        "accuracy": accuracy(age_class(labels["age"]), age_class(predicted)),
    }

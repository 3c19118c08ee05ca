"""Two checks of a training before its rates are tuned: the first loss, and a few faces by heart.

An untrained model answers uniformly, so its loss is known beforehand; and a model that cannot learn
a few dozen faces by heart will not learn from thousands. Where one of the two fails there is an
error in labels, loss or learning rate, and tuning would only hide it.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jaxtyping import Int

from coatnet_jax.age_losses import get_age_loss
from coatnet_jax.ages import N_AGES
from coatnet_jax.augment import eval_view
from coatnet_jax.checkpoint import load_backbone
from coatnet_jax.inference import build_model, image_format
from coatnet_jax.stage import Setting, make_schedule
from coatnet_jax.train_state import init_variables
from input_pipeline.pipeline import Faces, train_loader

# The loss of a uniform answer (of a regression: of 58 years), as a mean over the faces.
FORMULAS = {
    "cross_entropy": "ln 117",
    "dldl": "ln 117 - entropy of the label",
    "kl_l1": "ln 117 - entropy of the label + |58 - mean of the label|",
    "sord": "ln 117",
    "sord_squared": "ln 117",
    "mean_variance": "ln 117 + 0.1 (58 - age)² + 0.05 (117² - 1) / 12",
    "mean_residue": "ln 117 + 0.1 (58 - age)²",
    "or_cnn": "the 116 cross-entropies of P(age > k) = (116 - k) / 117",
    "coral": "the 116 cross-entropies of P(age > k) = (116 - k) / 117",
    "corn": "the cross-entropies of P(age > k | age ≥ k) = (116 - k) / (117 - k), per term",
    "l1": "|58 - age|",
    "mse": "(58 - age)²",
    "classes_4": "ln 4",
    "bins_9": "ln 9",
}
# The head starts near zero, not at it. A regression's output stands for 58 years each unit, so
# that the same small output moves it further.
TOLERANCE, POINT_TOLERANCE = 0.1, 0.5
LEARNED = 0.9  # share of the way from the uniform answer's loss to the least one
FEW_YEARS = 0.1  # of a constant answer's error on the same faces


def uniform_loss(name: str, ages: Int[np.ndarray, "n"], *, sigma: float) -> float:
    """The mean loss of a head that says nothing yet, for faces of these ages."""
    loss = get_age_loss(name)
    start = jnp.zeros(loss.outputs) if loss.bias is None else jnp.array(loss.bias)
    outputs = jnp.tile(start, (len(ages), 1))
    return float(jnp.mean(loss.loss(outputs, loss.label(ages, sigma=sigma))))


def least_loss(name: str, ages: Int[np.ndarray, "n"], *, sigma: float) -> float:
    """The mean loss of perfect answers: the entropy of SORD's soft labels, for the others zero."""
    if not name.startswith("sord"):
        return 0.0
    label = get_age_loss(name).label(ages, sigma=sigma)
    return float(jnp.mean(jnp.sum(jax.scipy.special.entr(label), axis=-1)))


def untrained_loss(setting: Setting) -> dict[str, Any]:
    """{'measured', 'theory', 'formula', 'faces', 'agrees'} of the first batch before any training.

    The pictures are whole, as nothing is augmented; BatchNorm uses the batch, as in training.
    """
    config = without_regularisation(setting.config)
    model = build_model(config)
    # The weights that training starts from; the head is a new one, of which theory speaks.
    rng = jax.random.split(jax.random.key(config.seed))[0]
    variables = init_variables(rng, model, image_size=config.model.image_size)
    if config.init_from:
        variables = load_backbone(Path(config.init_from), variables)
    batch = next(
        iter(
            train_loader(
                setting.train_faces,
                batch_size=config.batch_size,
                image_size=config.data.image_size,
                seed=config.seed,
            )
        )
    )
    loss, sigma = get_age_loss(config.loss.name), config.loss.sigma

    @jax.jit
    def measure(variables, images, age):
        views = eval_view(images, **image_format(config))
        out, _ = model.apply(variables, views, train=True, mutable=["batch_stats"])
        return jnp.mean(loss.loss(out["age"], loss.label(age, sigma=sigma)))

    measured = float(measure(variables, batch["image"], batch["age"]))
    theory = uniform_loss(loss.name, batch["age"], sigma=sigma)
    tolerance = POINT_TOLERANCE if loss.point else TOLERANCE
    return {
        "loss_name": loss.name,
        "measured": measured,
        "theory": theory,
        "formula": FORMULAS.get(loss.name, ""),
        "faces": len(batch["age"]),
        "tolerance": tolerance,
        "agrees": abs(measured - theory) <= tolerance * theory,
    }


def without_regularisation(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The same config with nothing that keeps a model from learning its pictures by heart."""
    config = config.copy_and_resolve_references()
    if "distill" in config:
        config.distill.teachers = ""
    config.update_from_flattened_dict(
        {
            "augment.crop": (1.0, 1.0),
            "augment.ratio": (1.0, 1.0),
            "augment.flip_prob": 0.0,
            "augment.jitter_prob": 0.0,
            "augment.erase_prob": 0.0,
            "augment.rand_augment_ops": 0,
            "augment.blur_prob": 0.0,
            "augment.sharpen_prob": 0.0,
            "progressive": (),
            "mixup": 0.0,
            "model.drop_path": 0.0,
            "optim.weight_decay": 0.0,
            "optim.layer_decay": 1.0,
            "ema": 0.0,
            "loss.gender": 0.0,
            "loss.race": 0.0,
        }
    )
    return config


def by_heart(setting: Setting, *, faces: int, steps: int, warmup: float) -> Setting:
    """The setting of a training on a few faces alone, which are its validation faces too.

    The faces are spread over the ages. The learning rate of a step stays that of the config,
    whatever becomes of the batch. `warmup` is the share of the steps.
    """
    few = spread_over_ages(setting.train_faces, min(faces, len(setting.train_faces)))
    config = without_regularisation(setting.config)
    batch = min(config.batch_size, len(few)) // setting.mesh.size * setting.mesh.size
    if not batch:
        raise ValueError(
            f"{len(few)} faces to learn by heart cannot be split over {setting.mesh.size} devices"
        )
    config.optim.lr *= config.batch_size / batch
    config.batch_size = batch
    config.epochs = steps * batch / len(few)
    config.optim.warmup_epochs = warmup * config.epochs
    config.monitor.every_epochs = config.epochs
    config.log_every = max(1, steps // 20)
    schedule = make_schedule(config, faces=len(few))
    return replace(setting, config=config, train_faces=few, validation_faces=few, schedule=schedule)


def spread_over_ages(faces: Faces, count: int) -> Faces:
    """`count` of the faces, evenly spaced in the order of their ages."""
    order = np.argsort(faces.labels["age"], kind="stable")
    rows = np.sort(order[np.linspace(0, len(order) - 1, count).round().astype(int)])
    return faces.take(rows)


def by_heart_verdict(
    config: ml_collections.ConfigDict,
    ages: Int[np.ndarray, "n"],
    rows: Sequence[dict[str, float]],
    mae: float | None,
) -> dict[str, Any]:
    """What the training on these ages came to: numbers, `learned`, and the same in a sentence.

    `rows` are its logged training metrics, `mae` the error of the trained model as it is used
    (BatchNorm with running statistics); without rows and `mae` it diverged.
    """
    name, sigma = config.loss.name, config.loss.sigma
    first, least = (f(name, ages, sigma=sigma) for f in (uniform_loss, least_loss))
    constant = float(np.mean(np.abs(ages - np.median(ages))))
    found = {"faces": len(ages), "uniform_loss": first, "least_loss": least}
    found |= {"constant_mae": constant, "mae": mae}
    if not rows or mae is None:
        text = "The training diverged: lower --config.optim.lr before anything else is tuned."
        return found | {"learned": False, "in_words": text}
    last = rows[-1]
    share = (first - last["loss"]) / (first - least)
    found |= {"loss": last["loss"], "train_mae": last["mae"], "share_learned": share}
    found["steps"] = last["step"]
    # Bins tell no years, so the years are asked of the other losses only.
    in_years = get_age_loss(name).outputs in (1, N_AGES - 1, N_AGES)
    by_loss = share >= LEARNED
    by_error = not in_years or last["mae"] <= FEW_YEARS * constant
    learned = by_loss and by_error
    numbers = (
        f"{len(ages)} faces, {last['step']} steps: the loss fell to {last['loss']:.3g} "
        f"(uniform answer {first:.3g}, least possible {least:.3g}), the error to "
        f"{last['mae']:.2f} years (constant answer {constant:.2f})"
    )
    if learned:
        text = f"Yes: {numbers}."
        if in_years and mae > 2 * FEW_YEARS * constant:
            text += (
                f" But as it is used, with running statistics, the model errs by {mae:.2f} years "
                "on the same faces: more steps, or look at BatchNorm."
            )
    else:
        text = (
            f"No: {numbers}. Give it more steps (--overfit-steps); if that does not help, try "
            "other learning rates, then look for an error in labels or loss."
        )
    return found | {"learned": learned, "in_words": text}

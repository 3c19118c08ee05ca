"""Distillation: what other fine-tunings say of a training view is mixed into its label.

Teachers see the very view that the student sees, cropped, mirrored and blended as it is
(arXiv 2106.05237), and answer as in evaluation: no path is dropped, BatchNorm has its statistics.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Float

from coatnet_jax.age_losses import get_age_loss
from coatnet_jax.checkpoint import load_variables
from coatnet_jax.config import read_config
from coatnet_jax.inference import build_model, image_format, trained_config
from coatnet_jax.lineage import teacher_folders

if TYPE_CHECKING:
    from coatnet_jax.heads import AgeModel


@dataclass(frozen=True)
class Teacher:
    """A fine-tuning's model, and the age loss that says how its outputs are read."""

    model: "AgeModel"
    loss_name: str


def check_teachers(config: ml_collections.ConfigDict) -> None:
    """Raise FileNotFoundError or ValueError where a run of `config.distill.teachers` cannot teach
    a run of this config: it is not there, tells no ages, or wants other views."""
    folders = teacher_folders(config)
    if folders and config.get("progressive", ()):
        raise ValueError(
            "config.distill.teachers answer at one size, so config.progressive must be empty"
        )
    ours = image_format(config)
    for folder in folders:
        theirs = read_config(folder / "config.json")
        if theirs.stage != "finetune":
            raise ValueError(
                f"config.distill.teachers: {folder} is of stage {theirs.stage}, which tells no "
                "ages; name a fine-tuning"
            )
        differing = [
            f"model.{key.replace('size', 'image_size')} {value} there, {ours[key]} here"
            for key, value in image_format(theirs).items()
            if value != ours[key]
        ]
        if differing:
            raise ValueError(
                f"config.distill.teachers: {folder} was trained on other views "
                f"({'; '.join(differing)}); give those to this run, or another teacher"
            )


def open_teachers(config: ml_collections.ConfigDict) -> tuple[tuple[Teacher, ...], tuple]:
    """(the teachers of a config, the best weights of each); they compute in the config's dtype."""
    teachers, weights = [], []
    for folder in teacher_folders(config):
        theirs = trained_config(folder)
        theirs.model.dtype = config.model.dtype
        teachers.append(Teacher(build_model(theirs), theirs.loss.name))
        weights.append(load_variables(folder)[0])
    return tuple(teachers), tuple(weights)


def teachers_answer(
    teachers: Sequence[Teacher], weights: Sequence[Any], images: Float[Array, "b h w 3"]
) -> Float[Array, "b 117"]:
    """Probabilities of the ages 0-116 of normalised views, the mean over the teachers."""
    answers = [
        get_age_loss(teacher.loss_name).probabilities(
            teacher.model.apply(variables, images, train=False)["age"]
        )
        for teacher, variables in zip(teachers, weights, strict=True)
    ]
    return jnp.mean(jnp.stack(answers), axis=0)

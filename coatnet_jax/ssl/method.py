"""What a self-supervised method is: a model, a loss, and what it keeps beside the parameters."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Real

from coatnet_jax.heads import ProjectionHead, SiameseModel

Outputs = dict[str, jax.Array]


@dataclass(frozen=True)
class Method:
    """A method with its hyperparameters as fields, the keys of `config.loss`.

    It holds no arrays, so it is a static argument of the step. Rows i and i + b of all outputs are
    the two views of one image.
    """

    # A second network gives the targets: a moving average of the first one's parameters.
    has_target: ClassVar[bool] = False
    # Evaluation and fine-tuning take that second network (DINO's teacher) and not the first.
    serves_target: ClassVar[bool] = False
    # The loss sees ages: no self-supervision, but a ceiling to compare it with.
    labelled: ClassVar[bool] = False

    def model(
        self, backbone: nn.Module, *, projection: Mapping[str, Any], prediction: Mapping[str, Any]
    ) -> SiameseModel:
        """The backbone with this method's heads; arguments are parts of the config."""
        return SiameseModel(backbone, ProjectionHead(**projection))

    def first_memory(self, width: int) -> dict[str, jax.Array]:
        """Arrays that the loss carries from step to step; `width` is that of the projections."""
        return {}

    def loss(
        self,
        online: Outputs,
        target: Outputs | None,
        *,
        age: Real[Array, "b"],
        memory: dict[str, jax.Array],
    ) -> tuple[Float[Array, ""], dict[str, jax.Array], dict[str, jax.Array]]:
        """(loss, metrics, next memory) of the outputs `features`, `z` and maybe `p` of 2b views.

        `target` holds the outputs of the target network, where there is one. Only labelled
        methods read `age`.
        """
        raise NotImplementedError

    def momentum_at(self, progress: Float[Array, ""]) -> Float[Array, ""]:
        """How much of the target network stays, rising from `momentum` to 1 by a cosine over the
        training's `progress` 0-1 (BYOL, arXiv 2006.07733, section 3.2)."""
        return 1 - (1 - self.momentum) * (jnp.cos(jnp.pi * progress) + 1) / 2

    def masked_gradients(self, grads: Any, progress: Float[Array, ""]) -> Any:
        """The gradients that the optimizer gets."""
        return grads


def other_views(x: Float[Array, "2b d"]) -> Float[Array, "2b d"]:
    """For each row that of the image's other view."""
    return jnp.roll(x, x.shape[0] // 2, axis=0)

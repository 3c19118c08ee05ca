"""DINO (arXiv 2104.14294): a student learns the soft classes of a teacher that follows it slowly.

The two views are the paper's global crops; its smaller local crops are left out.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from coatnet_jax.heads import SiameseModel
from coatnet_jax.ssl.method import Method, other_views
from coatnet_jax.ssl.nt_xent import unit_length


@dataclass(frozen=True)
class DINO(Method):
    """Centring and a sharp teacher keep the classes from collapsing into one, or into none.

    `momentum` is the teacher's first one, `center_momentum` that of the mean logits. The prototypes
    stay as they are for the first `frozen_prototypes` of the training (the paper: one epoch).
    """

    has_target: ClassVar[bool] = True
    serves_target: ClassVar[bool] = True

    student_temperature: float = 0.1
    teacher_temperature: float = 0.04
    center_momentum: float = 0.9
    momentum: float = 0.996
    frozen_prototypes: float = 0.01

    def model(self, backbone, *, projection, prediction):
        """The backbone and a `DINOHead`; no prediction head."""
        return SiameseModel(backbone, DINOHead(**projection))

    def first_memory(self, width):
        """The centre: the running mean of the teacher's logits."""
        return {"center": jnp.zeros(width)}

    def loss(self, online, target, *, age, memory):
        """The cross-entropy of the student on one view to the teacher on the other."""
        teacher_logits = jax.lax.stop_gradient(target["z"])
        teacher = jax.nn.softmax((teacher_logits - memory["center"]) / self.teacher_temperature)
        student = jax.nn.log_softmax(online["z"] / self.student_temperature)
        loss = -jnp.mean(jnp.sum(other_views(teacher) * student, axis=-1))
        center = self.center_momentum * memory["center"]
        center = center + (1 - self.center_momentum) * jnp.mean(teacher_logits, axis=0)
        entropy = jnp.mean(jnp.sum(jax.scipy.special.entr(teacher), axis=-1))
        return loss, {"teacher_entropy": entropy}, {"center": center}

    def masked_gradients(self, grads: Any, progress):
        """No gradient for the prototypes at the start."""
        trained = progress >= self.frozen_prototypes
        projection = dict(grads["projection"])
        projection["prototypes"] = jnp.where(trained, projection["prototypes"], 0)
        return {**grads, "projection": projection}


class DINOHead(nn.Module):
    """An MLP with GELU, unit length, and the cosine to `out` prototypes (65,536 in the paper)."""

    layers: int = 3
    hidden: int = 2048
    bottleneck: int = 256
    out: int = 4096

    @nn.compact
    def __call__(self, features: Float[Array, "b d"], *, train: bool) -> Float[Array, "b out"]:
        """Returns float32 logits between -1 and 1."""
        x = features.astype(jnp.float32)
        init = nn.initializers.truncated_normal(0.02)
        for n in range(1, self.layers + 1):
            last = n == self.layers
            width = self.bottleneck if last else self.hidden
            x = nn.Dense(width, kernel_init=init, name=f"dense{n}")(x)
            x = x if last else nn.gelu(x, approximate=False)
        prototypes = self.param("prototypes", init, (self.bottleneck, self.out))
        # The losses divide the cosines by temperatures of a few hundredths.
        return jnp.matmul(
            unit_length(x), unit_length(prototypes.T).T, precision=jax.lax.Precision.HIGHEST
        )

"""What sits on a backbone: classifier, age/gender/race heads, projections of pre-training.

The classifier is CoAtNet's (a hidden tanh layer: arXiv 2106.04803, the only reading that meets
its parameter counts); the projection is SimCLR's (arXiv 2002.05709, 2006.10029).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from coatnet_jax.ages import N_AGES

N_GENDERS = 2
N_RACES = 5
# Near zero: the first predictions are near uniform, whatever the hidden layer says.
logits_init = nn.initializers.normal(0.01)


class ClassifierHead(nn.Module):
    """CoAtNet's head: Dense(D) and tanh, left out without `hidden`, then Dense(classes)."""

    classes: int
    hidden: bool = True

    @nn.compact
    def __call__(self, features: Float[Array, "b d"]) -> Float[Array, "b classes"]:
        """Returns float32 logits."""
        x = features
        if self.hidden:
            x = jnp.tanh(nn.Dense(features.shape[-1], name="hidden")(x))
        return nn.Dense(self.classes, kernel_init=logits_init, name="logits")(x)


class ClassifierModel(nn.Module):
    """A backbone and a `ClassifierHead`; parameters under `backbone` and `head`."""

    backbone: nn.Module
    classes: int
    hidden: bool = True

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"], *, train: bool) -> dict[str, jax.Array]:
        """Returns `features` [b, D] of the backbone and `logits` [b, classes], both float32."""
        features = self.backbone(images, train=train)
        logits = ClassifierHead(self.classes, self.hidden, name="head")(features)
        return {"features": features, "logits": logits}


class SharedWeights(nn.Module):
    """One weight vector for all outputs and a bias for each: CORAL's layer (arXiv 1901.07884)."""

    outputs: int
    bias_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b outputs"]:
        """Returns w x + bias in float32."""
        kernel = self.param("kernel", logits_init, (x.shape[-1], 1))
        return x @ kernel + self.param("bias", self.bias_init, (self.outputs,))


class AgeHead(nn.Module):
    """One hidden tanh layer, shared, and a linear layer each for age, gender and race.

    The layer for age is made as the loss needs it (`age_losses.AgeLoss.head`): `age_outputs` of
    them, with one weight vector for all where `shared_weights`, their biases starting at
    `age_bias` (None: zeros).
    """

    age_outputs: int = N_AGES
    dropout: float = 0.0
    shared_weights: bool = False
    age_bias: tuple[float, ...] | None = None

    @nn.compact
    def __call__(self, features: Float[Array, "b d"], *, train: bool) -> dict[str, jax.Array]:
        """Returns float32 outputs: age [b, age_outputs], gender [b, 2], race [b, 5]."""
        x = jnp.tanh(nn.Dense(features.shape[-1], name="hidden")(features))
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        return {
            "age": self._age_layer()(x),
            "gender": nn.Dense(N_GENDERS, kernel_init=logits_init, name="gender")(x),
            "race": nn.Dense(N_RACES, kernel_init=logits_init, name="race")(x),
        }

    def _age_layer(self) -> nn.Module:
        start = nn.initializers.zeros
        if self.age_bias is not None:
            start = lambda _, shape, dtype=jnp.float32: jnp.array(self.age_bias, dtype)  # noqa: E731
        if self.shared_weights:
            return SharedWeights(self.age_outputs, start, name="age")
        return nn.Dense(self.age_outputs, kernel_init=logits_init, bias_init=start, name="age")


class AgeModel(nn.Module):
    """A backbone and an `AgeHead`; parameters under `backbone` and `head`."""

    backbone: nn.Module
    age_outputs: int = N_AGES
    dropout: float = 0.0
    shared_weights: bool = False
    age_bias: tuple[float, ...] | None = None

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"], *, train: bool) -> dict[str, jax.Array]:
        """Returns the head's outputs and the backbone's `features` [b, D], all float32.

        Training with dropout or drop path needs an rng named 'dropout'.
        """
        features = self.backbone(images, train=train)
        head = AgeHead(
            self.age_outputs, self.dropout, self.shared_weights, self.age_bias, name="head"
        )
        return {"features": features, **head(features, train=train)}


class ProjectionHead(nn.Module):
    """SimCLR's MLP: Dense, BN and ReLU, with a last Dense and BN; BYOL's without that last BN.

    No Dense has a bias: BN follows it, or a loss that does not need it. The last BN has neither
    scale nor bias (MoCo v3, arXiv 2104.02057; SimCLR's own keeps the scale): the loss normalises
    its output anyway.
    """

    layers: int = 3
    hidden: int = 2048
    out: int = 256
    last_norm: bool = True

    @nn.compact
    def __call__(self, features: Float[Array, "b d"], *, train: bool) -> Float[Array, "b out"]:
        """Returns float32 projections, not normalised to length one (the loss does that)."""
        if self.layers < 1:
            raise ValueError(f"a projection head needs at least one layer, not {self.layers}")
        x = features.astype(jnp.float32)
        for n in range(1, self.layers + 1):
            last = n == self.layers
            x = nn.Dense(self.out if last else self.hidden, use_bias=False, name=f"dense{n}")(x)
            if last and not self.last_norm:
                return x
            x = nn.BatchNorm(
                use_running_average=not train,
                momentum=0.9,
                epsilon=1e-5,
                use_scale=not last,
                use_bias=not last,
                name=f"norm{n}",
            )(x)
            x = x if last else nn.relu(x)
        return x


class SiameseModel(nn.Module):
    """A backbone and the heads of pre-training, which sees every image as two views.

    Parameters under `backbone`, `projection` and, for the methods that have one, `prediction`.
    Without a projection the features themselves are projected.
    """

    backbone: nn.Module
    projection: nn.Module | None
    prediction: nn.Module | None = None

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"], *, train: bool) -> dict[str, jax.Array]:
        """Returns `features` [b, D] of the backbone, `z` [b, out] of the projection, and `p`
        [b, out] of the prediction from z."""
        features = self.backbone(images, train=train)
        z = features if self.projection is None else self.projection(features, train=train)
        outputs = {"features": features, "z": z}
        if self.prediction is not None:
            outputs["p"] = self.prediction(z, train=train)
        return outputs

"""What sits on a backbone: classifier, age/gender/race heads, projections of pre-training.

The classifier is CoAtNet's (a hidden tanh layer: arXiv 2106.04803, the only reading that meets
its parameter counts); the projection is SimCLR's (arXiv 2002.05709, 2006.10029).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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


class AgeHead(nn.Module):
    """One hidden tanh layer, shared, and a linear layer each for age, gender and race."""

    n_ages: int = 117
    dropout: float = 0.0

    @nn.compact
    def __call__(self, features: Float[Array, "b d"], *, train: bool) -> dict[str, jax.Array]:
        """Returns float32 logits: age [b, n_ages], gender [b, 2], race [b, 5]."""
        x = jnp.tanh(nn.Dense(features.shape[-1], name="hidden")(features))
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        sizes = {"age": self.n_ages, "gender": N_GENDERS, "race": N_RACES}
        return {
            name: nn.Dense(size, kernel_init=logits_init, name=name)(x)
            for name, size in sizes.items()
        }


class AgeModel(nn.Module):
    """A backbone and an `AgeHead`; parameters under `backbone` and `head`."""

    backbone: nn.Module
    n_ages: int = 117
    dropout: float = 0.0

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"], *, train: bool) -> dict[str, jax.Array]:
        """Returns the head's logits and the backbone's `features` [b, D], all float32.

        Training with dropout or drop path needs an rng named 'dropout'.
        """
        features = self.backbone(images, train=train)
        logits = AgeHead(self.n_ages, self.dropout, name="head")(features, train=train)
        return {"features": features, **logits}


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

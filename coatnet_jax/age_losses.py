"""Ways to learn an age: what the head gives out, the loss on it, the probabilities read from it.

`config.loss.name` picks one `AgeLoss`. Whatever its head gives out, the rest of the program gets a
probability for each age 0-116. Labels are distributions over those ages too, so that mixup may
blend them; each loss reads from a blended label what it needs: an ordinal loss P(age > k), a
regression the mean, a classification the share of each bin. For an unblended label every loss is
the one of its paper. Losses give one value a face.

Every head starts at a uniform answer (for a regression: at the middle of the ages), so that short
trainings compare the losses and not their first biases; the papers leave the start open.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Real

from coatnet_jax.ages import CLASS_STARTS, N_AGES, expected_age
from coatnet_jax.losses import cross_entropy

CLASS_EDGES = (0, *CLASS_STARTS, N_AGES)
# The nine age groups of FairFace (arXiv 1908.04913): 0-2, 3-9, 10-19, …, 60-69, 70 and over.
BIN_EDGES = (0, 3, 10, 20, 30, 40, 50, 60, 70, N_AGES)
MIDDLE = (N_AGES - 1) / 2  # years; a regression's output of 0 stands for it, -1 for 0, 1 for 116

# --- labels --------------------------------------------------------------------------------------


def age_distribution(age: Real[Array, "b"], *, sigma: float) -> Float[Array, "b 117"]:
    """Labels as a Gaussian of `sigma` years around each age, summing to one over ages 0-116.

    `sigma` 0 gives one-hot rows. Near age 0 the Gaussian is cut off and renormalised (as in
    DLDL-v2), so such a label lies above the age: mean 1.8, median 1.6 at age 1 with sigma 2.
    """
    if sigma < 0:
        raise ValueError(f"sigma is {sigma} years, it must be 0 (one-hot) or more")
    age = jnp.asarray(age)
    if sigma == 0:
        return jax.nn.one_hot(jnp.round(age).astype(jnp.int32), N_AGES)
    years = jnp.arange(N_AGES, dtype=jnp.float32)
    return jax.nn.softmax(-0.5 * ((years - age[:, None]) / sigma) ** 2, axis=-1)


def one_age(age: Real[Array, "b"], *, sigma: float) -> Float[Array, "b 117"]:
    """The age itself, one-hot; `sigma` plays no part."""
    del sigma
    return age_distribution(age, sigma=0)


def sord_distribution(
    age: Real[Array, "b"], *, sigma: float, power: int = 1
) -> Float[Array, "b 117"]:
    """Soft ordinal labels, SORD (Diaz & Marathe, CVPR 2019): softmax over ages of -|a - age|^power.

    `power` is 1 or 2, distances are in years; `sigma` plays no part.
    """
    del sigma
    years = jnp.arange(N_AGES, dtype=jnp.float32)
    return jax.nn.softmax(-(jnp.abs(years - jnp.asarray(age)[:, None]) ** power), axis=-1)


# --- distributions: one logit for each age -------------------------------------------------------


def kl(logits: Float[Array, "b 117"], target: Float[Array, "b 117"]) -> Float[Array, "b"]:
    """KL(target || p) = sum target log(target / p), DLDL (arXiv 1611.01731)."""
    return cross_entropy(logits, target) - jnp.sum(jax.scipy.special.entr(target), axis=-1)


def kl_l1(logits: Float[Array, "b 117"], target: Float[Array, "b 117"]) -> Float[Array, "b"]:
    """KL(target || p) + |mean of p - mean of target| in years: DLDL-v2 (IJCAI 2018), weight 1."""
    logits = logits.astype(jnp.float32)
    years_off = expected_age(jax.nn.softmax(logits)) - expected_age(target)
    return kl(logits, target) + jnp.abs(years_off)


def mean_variance(
    logits: Float[Array, "b 117"], target: Float[Array, "b 117"]
) -> Float[Array, "b"]:
    """Cross-entropy + 0.2 (mean error)^2 / 2 + 0.05 variance, Pan et al., CVPR 2018.

    The mean error is against the target's mean; the variance (years^2) is the prediction's own.
    """
    logits = logits.astype(jnp.float32)
    p = jax.nn.softmax(logits)
    mean = expected_age(p)
    years = jnp.arange(N_AGES, dtype=jnp.float32)
    variance = jnp.sum(p * (years - mean[:, None]) ** 2, axis=-1)
    squared = 0.5 * (mean - expected_age(target)) ** 2
    return cross_entropy(logits, target) + 0.2 * squared + 0.05 * variance


def mean_residue(logits: Float[Array, "b 117"], target: Float[Array, "b 117"]) -> Float[Array, "b"]:
    """Cross-entropy + 0.2 (mean error)^2 / 2 + 0.05 residue, arXiv 2203.17156 (ICME 2022).

    The residue is -sum p log p over the ages less likely than the true one: those outside the
    top K, where K adapts to each face. A blended label takes the residues of its ages by share.
    """
    logits = logits.astype(jnp.float32)
    p = jax.nn.softmax(logits)
    entropy = -p * jax.nn.log_softmax(logits)  # not from p alone: log has no slope at 0
    less_likely = p[:, None, :] < p[:, :, None]  # [b, true age, age]
    residues = jnp.sum(less_likely * entropy[:, None, :], axis=-1)
    squared = 0.5 * (expected_age(p) - expected_age(target)) ** 2
    residue = jnp.sum(target * residues, axis=-1)
    return cross_entropy(logits, target) + 0.2 * squared + 0.05 * residue


# --- ordinal: output k asks whether the age lies above k = 0-115 ---------------------------------


def tails(p: Float[Array, "b 117"]) -> Float[Array, "b 116"]:
    """P(age > k) for k = 0-115."""
    return jnp.cumsum(p[:, ::-1], axis=-1)[:, ::-1][:, 1:]


def ordinal(outputs: Float[Array, "b 116"], target: Float[Array, "b 117"]) -> Float[Array, "b"]:
    """The sum over k of the binary cross-entropy of "age > k", all of weight 1.

    With a weight vector for each k it is OR-CNN (Niu et al., CVPR 2016), with one that all k share
    and a bias for each it is CORAL (arXiv 1901.07884).
    """
    # Imported here: only trainings need Optax, which takes longer to import than a face to find.
    from optax.losses import sigmoid_binary_cross_entropy

    outputs = outputs.astype(jnp.float32)
    return jnp.sum(sigmoid_binary_cross_entropy(outputs, tails(target)), axis=-1)


def ordinal_probabilities(outputs: Float[Array, "b 116"]) -> Float[Array, "b 117"]:
    """Age probabilities as differences of P(age > k) = sigmoid(output k), made to fall with k.

    Where they do not fall they are sorted (rearrangement, Chernozhukov et al., Econometrica 2010).
    Their sum, which is the mean age, stays; so does the number above one half, which is OR-CNN's
    and CORAL's own answer and the rounded median here.
    """
    above = jnp.sort(jax.nn.sigmoid(outputs.astype(jnp.float32)), axis=-1, descending=True)
    return -jnp.diff(above, axis=-1, prepend=1, append=0)


def corn(outputs: Float[Array, "b 116"], target: Float[Array, "b 117"]) -> Float[Array, "b"]:
    """CORN (arXiv 2111.08851): the binary cross-entropies of f_k = P(age > k | age > k - 1).

    Task k counts only the faces above k - 1 (a blended label its share above), and the whole is
    divided by the number of terms in the batch: the mean over the batch is the paper's loss.
    """
    outputs = outputs.astype(jnp.float32)
    above = tails(target)
    reached = jnp.concatenate([jnp.ones_like(above[:, :1]), above[:, :-1]], axis=-1)
    yes, no = jax.nn.log_sigmoid(outputs), jax.nn.log_sigmoid(-outputs)
    terms = above * yes + (reached - above) * no
    return -jnp.sum(terms, axis=-1) / jnp.mean(jnp.sum(reached, axis=-1))


def corn_probabilities(outputs: Float[Array, "b 116"]) -> Float[Array, "b 117"]:
    """P(age = a) = f_0 … f_(a-1) (1 - f_a): cumulative products, so they fall by themselves."""
    outputs = outputs.astype(jnp.float32)
    above = jnp.exp(jnp.cumsum(jax.nn.log_sigmoid(outputs), axis=-1))
    reached = jnp.concatenate([jnp.ones_like(above[:, :1]), above], axis=-1)
    stops = jnp.concatenate([jax.nn.sigmoid(-outputs), jnp.ones_like(above[:, :1])], axis=-1)
    return reached * stops


# --- regression: one output, the age -------------------------------------------------------------


def regressed_years(outputs: Float[Array, "b 1"]) -> Float[Array, "b"]:
    """The age in years that a regression's output stands for; it may leave 0-116."""
    return MIDDLE * (1 + outputs[:, 0].astype(jnp.float32))


def l1(outputs: Float[Array, "b 1"], target: Float[Array, "b 117"]) -> Float[Array, "b"]:
    """|age - mean of the target|, in years."""
    return jnp.abs(regressed_years(outputs) - expected_age(target))


def mse(outputs: Float[Array, "b 1"], target: Float[Array, "b 117"]) -> Float[Array, "b"]:
    """(age - mean of the target)^2, in years^2."""
    return (regressed_years(outputs) - expected_age(target)) ** 2


def point_probabilities(outputs: Float[Array, "b 1"]) -> Float[Array, "b 117"]:
    """The age, held to 0-116, shared between its two neighbours so that the mean is exact.

    The median is then less than 0.1 years off. The width says nothing of how sure the model is.
    """
    age = jnp.clip(regressed_years(outputs), 0, N_AGES - 1)
    years = jnp.arange(N_AGES, dtype=jnp.float32)
    return jnp.maximum(0, 1 - jnp.abs(years - age[:, None]))


# --- classification: one logit for each bin of ages ----------------------------------------------


def bin_cross_entropy(
    logits: Float[Array, "b k"], target: Float[Array, "b 117"], *, edges: tuple[int, ...]
) -> Float[Array, "b"]:
    """Cross-entropy against the target's share of each bin; bin i is edges[i] … edges[i+1] - 1."""
    pairs = zip(edges[:-1], edges[1:], strict=True)
    shares = jnp.stack([jnp.sum(target[:, a:b], axis=-1) for a, b in pairs], axis=-1)
    return cross_entropy(logits, shares)


def bin_probabilities(
    logits: Float[Array, "b k"], *, edges: tuple[int, ...]
) -> Float[Array, "b 117"]:
    """A bin's probability spread evenly over its ages, the last bin's up to 116.

    The median of a face that is surely above 60 is thus 88 years: such a model tells classes, and
    years only as far as its bins are narrow.
    """
    widths = np.diff(edges)
    share = jax.nn.softmax(logits.astype(jnp.float32))
    return jnp.repeat(share / widths, widths, axis=-1, total_repeat_length=N_AGES)


# --- the choice ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class AgeLoss:
    """One way to learn an age: the head's outputs, their loss, and how to read them.

    `label(age, sigma=)` gives label distributions [b, 117], `loss(outputs, label)` one value a
    face, `probabilities(outputs)` those of the ages 0-116 [b, 117].
    """

    name: str
    outputs: int
    loss_fn: Callable
    read: Callable
    label: Callable = one_age
    shared_weights: bool = False  # one weight vector for all outputs, and a bias for each
    bias: tuple[float, ...] | None = None  # at the start; None: zeros
    point: bool = False  # the answer is one age: its probabilities say nothing of doubt

    def loss(
        self, outputs: Float[Array, "b k"], target: Float[Array, "b 117"]
    ) -> Float[Array, "b"]:
        """The loss of each face; ValueError where the head has another number of outputs."""
        self._check(outputs)
        return self.loss_fn(outputs, target)

    def probabilities(self, outputs: Float[Array, "b k"]) -> Float[Array, "b 117"]:
        """Probabilities of the ages 0-116; ValueError where the head has other outputs."""
        self._check(outputs)
        return self.read(outputs)

    @property
    def head(self) -> dict[str, Any]:
        """What `AgeModel` has to be made with."""
        return {
            "age_outputs": self.outputs,
            "shared_weights": self.shared_weights,
            "age_bias": self.bias,
        }

    def _check(self, outputs: Array) -> None:
        if outputs.shape[-1] != self.outputs:
            raise ValueError(
                f"the age loss '{self.name}' needs a head with {self.outputs} outputs for age, "
                f"this one has {outputs.shape[-1]}: make the model for the same config.loss.name"
            )


def _softmax(name: str, loss: Callable, label: Callable = one_age) -> AgeLoss:
    return AgeLoss(name, N_AGES, loss, jax.nn.softmax, label)


def _bins(name: str, edges: tuple[int, ...]) -> AgeLoss:
    loss, read = partial(bin_cross_entropy, edges=edges), partial(bin_probabilities, edges=edges)
    return AgeLoss(name, len(edges) - 1, loss, read)


_TASKS = np.arange(N_AGES - 1)
# The biases that make every age equally likely.
_UNIFORM = tuple(np.log((N_AGES - 1 - _TASKS) / (_TASKS + 1)).tolist())
_UNIFORM_CORN = tuple(np.log(N_AGES - 1 - _TASKS).tolist())
_ordinal = partial(
    AgeLoss, outputs=N_AGES - 1, loss_fn=ordinal, read=ordinal_probabilities, bias=_UNIFORM
)

AGE_LOSSES: dict[str, AgeLoss] = {
    loss.name: loss
    for loss in (
        _softmax("cross_entropy", cross_entropy),
        _softmax("dldl", kl, age_distribution),
        _softmax("kl_l1", kl_l1, age_distribution),
        _softmax("sord", cross_entropy, sord_distribution),
        _softmax("sord_squared", cross_entropy, partial(sord_distribution, power=2)),
        _softmax("mean_variance", mean_variance),
        _softmax("mean_residue", mean_residue),
        _ordinal("or_cnn"),
        _ordinal("coral", shared_weights=True),
        AgeLoss("corn", N_AGES - 1, corn, corn_probabilities, bias=_UNIFORM_CORN),
        AgeLoss("l1", 1, l1, point_probabilities, point=True),
        AgeLoss("mse", 1, mse, point_probabilities, point=True),
        _bins("classes_4", CLASS_EDGES),
        _bins("bins_9", BIN_EDGES),
    )
}


def get_age_loss(name: str) -> AgeLoss:
    """The age loss of that name; ValueError with the nearest names for any other."""
    if name in AGE_LOSSES:
        return AGE_LOSSES[name]
    near = difflib.get_close_matches(name, AGE_LOSSES)
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(AGE_LOSSES)}"
    raise ValueError(f"unknown age loss '{name}': {hint}")

"""Heads and the models made of a backbone and a head: shapes, names, starting values."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coatnet_jax.age_losses import get_age_loss
from coatnet_jax.heads import AgeModel, ClassifierHead, ProjectionHead, SiameseModel

D = 12


class Backbone(nn.Module):
    """The mean colour, widened: something that has features, for the heads."""

    @nn.compact
    def __call__(self, images, *, train):
        return nn.Dense(D, name="widen")(images.mean((1, 2)))


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(0), (8, 6, 6, 3))


def test_classifier_head_is_hidden_tanh_then_linear():
    features = jax.random.normal(jax.random.key(0), (4, D))
    variables = ClassifierHead(7).init(jax.random.key(1), features)
    hidden, logits = variables["params"]["hidden"], variables["params"]["logits"]
    expected = np.tanh(features @ hidden["kernel"] + hidden["bias"]) @ logits["kernel"]
    np.testing.assert_allclose(ClassifierHead(7).apply(variables, features), expected, atol=1e-6)
    assert hidden["kernel"].shape == (D, D) and logits["kernel"].shape == (D, 7)


def test_age_model_gives_three_logits_and_features_in_float32(images):
    model = AgeModel(Backbone())
    out, variables = model.init_with_output(jax.random.key(0), images, train=False)
    assert {k: v.shape for k, v in out.items()} == {
        "features": (8, D),
        "age": (8, 117),
        "gender": (8, 2),
        "race": (8, 5),
    }
    assert {v.dtype.name for v in out.values()} == {"float32"}
    assert set(variables["params"]) == {"backbone", "head"}
    assert set(variables["params"]["head"]) == {"hidden", "age", "gender", "race"}


def test_age_model_starts_near_uniform(images):
    out, _ = AgeModel(Backbone()).init_with_output(jax.random.key(0), images, train=False)
    np.testing.assert_allclose(jax.nn.softmax(out["age"]), 1 / 117, rtol=0.2)


class HeadBeforeOtherLosses(nn.Module):
    """The age head as it was when a softmax over ages was the only one."""

    @nn.compact
    def __call__(self, features):
        x = jnp.tanh(nn.Dense(D, name="hidden")(features))
        sizes = {"age": 117, "gender": 2, "race": 5}
        init = nn.initializers.normal(0.01)
        return {k: nn.Dense(n, kernel_init=init, name=k)(x) for k, n in sizes.items()}


class ModelBeforeOtherLosses(nn.Module):
    @nn.compact
    def __call__(self, images):
        return HeadBeforeOtherLosses(name="head")(Backbone(name="backbone")(images, train=False))


def test_default_loss_has_the_parameters_it_always_had(images):
    model = AgeModel(Backbone(), **get_age_loss("kl_l1").head)
    now = model.init(jax.random.key(3), images, train=False)
    before = ModelBeforeOtherLosses().init(jax.random.key(3), images)
    assert jax.tree.structure(now) == jax.tree.structure(before)
    jax.tree.map(np.testing.assert_array_equal, now, before)


def test_coral_shares_one_weight_vector(images):
    model = AgeModel(Backbone(), **get_age_loss("coral").head)
    out, variables = model.init_with_output(jax.random.key(0), images, train=False)
    age = variables["params"]["head"]["age"]
    assert {name: leaf.shape for name, leaf in age.items()} == {"kernel": (D, 1), "bias": (116,)}
    np.testing.assert_allclose(age["bias"], np.log((116 - np.arange(116)) / np.arange(1, 117)))
    score = out["age"] - age["bias"]  # w x, the same for every k
    np.testing.assert_allclose(score, np.broadcast_to(score[:, :1], (8, 116)), atol=1e-5)
    assert np.ptp(score[:, 0]) > 1e-4


def test_dropout_acts_in_training_only(images):
    model = AgeModel(Backbone(), dropout=0.5)
    variables = model.init(jax.random.key(0), images, train=False)

    def age(seed, train):
        rngs = {"dropout": jax.random.key(seed)}
        return model.apply(variables, images, train=train, rngs=rngs)["age"]

    np.testing.assert_array_equal(age(1, False), age(2, False))
    assert jnp.abs(age(1, True) - age(2, True)).max() > 1e-3


@pytest.mark.parametrize("layers", [2, 3])
def test_projection_matches_numpy(images, layers):
    features = jax.random.normal(jax.random.key(0), (8, D))
    head = ProjectionHead(layers=layers, hidden=10, out=4)
    variables = head.init(jax.random.key(1), features, train=False)
    z, _ = head.apply(variables, features, train=True, mutable=["batch_stats"])
    x = np.asarray(features, np.float64)
    for n in range(1, layers + 1):
        x = x @ np.asarray(variables["params"][f"dense{n}"]["kernel"], np.float64)
        x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
        x = x if n == layers else np.maximum(x, 0)
    np.testing.assert_allclose(z, x, atol=1e-4)


def test_last_norm_of_the_projection_has_no_parameters():
    head = ProjectionHead(layers=3, hidden=10, out=4)
    variables = head.init(jax.random.key(1), jnp.ones((2, D)), train=False)
    assert set(variables["params"]) == {"dense1", "dense2", "dense3", "norm1", "norm2"}
    assert set(variables["params"]["dense1"]) == {"kernel"}
    assert set(variables["batch_stats"]) == {"norm1", "norm2", "norm3"}


def test_projection_without_layers_raises():
    with pytest.raises(ValueError, match="at least one layer, not 0"):
        ProjectionHead(layers=0).init(jax.random.key(1), jnp.ones((2, D)), train=False)


def test_siamese_model_gives_features_and_z(images):
    model = SiameseModel(Backbone(), ProjectionHead(hidden=10, out=4))
    out, variables = model.init_with_output(jax.random.key(0), images, train=False)
    assert {k: v.shape for k, v in out.items()} == {"features": (8, D), "z": (8, 4)}
    assert set(variables["params"]) == {"backbone", "projection"}
    assert set(variables["batch_stats"]) == {"projection"}

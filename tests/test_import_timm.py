"""timm's coatnet_0_224, weights copied, against ours: logits, gradients, running statistics."""

import sys
from types import ModuleType
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coatnet_jax.heads import ClassifierHead
from coatnet_jax.import_timm import import_timm
from coatnet_jax.models import create_backbone


class Classifier(nn.Module):
    """A backbone with the paper's head."""

    backbone: nn.Module

    @nn.compact
    def __call__(self, images, *, train):
        features = self.backbone(images, train=train)
        return ClassifierHead(1000, name="head")(features)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def timm_model(torch):
    """timm's coatnet_0_224 with every array random; torchvision, unused here, may be missing."""
    names = ["", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".datasets"]
    names += [".models", ".models.feature_extraction"]
    stubs = {f"torchvision{name}": mock.MagicMock(__path__=[], __spec__=None) for name in names}
    stubs["torchvision.ops.misc"].FrozenBatchNorm2d = type("FrozenBatchNorm2d", (), {})
    try:
        import torchvision

        stubs = {"torchvision": torchvision}
    except ImportError:
        pass
    with mock.patch.dict(sys.modules, stubs):
        timm: ModuleType = pytest.importorskip("timm")
        torch.manual_seed(0)
        model = timm.create_model("coatnet_0_224")
    for name, value in model.state_dict().items():
        if value.ndim == 1 and name.endswith(("weight", "running_var")):
            value.uniform_(0.5, 1.5)
        elif value.ndim == 1 or "table" in name or name == "head.fc.weight":
            value.normal_(0, 0.1)
    return model


@pytest.fixture(scope="module")
def variables(timm_model):
    return import_timm({name: value.numpy() for name, value in timm_model.state_dict().items()})


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(size=(2, 224, 224, 3)).astype(np.float32)


def timm_outputs(torch, model, images, train):
    """timm's logits and the gradient of their weighted sum by the images, channels last."""
    x = torch.tensor(images.transpose(0, 3, 1, 2)).requires_grad_()
    logits = model.train(train)(x)
    (logits * torch.cos(torch.arange(1000.0))).sum().backward()
    return logits.detach().numpy(), x.grad.numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize("train", [False, True])
def test_logits_and_gradients_are_timms(torch, timm_model, variables, images, train):
    def loss(x):
        logits, new = Classifier(create_backbone("coatnet_0")).apply(
            variables, x, train=train, mutable=["batch_stats"]
        )
        return (logits * jnp.cos(jnp.arange(1000.0))).sum(), (logits, new["batch_stats"])

    gradient, (logits, stats) = jax.jit(jax.grad(loss, has_aux=True))(jnp.asarray(images))
    expected, expected_gradient = timm_outputs(torch, timm_model, images, train)
    print(f"train={train}: logits std {expected.std():.3f}", end=" ")
    print(f"max |Δ| {np.abs(logits - expected).max():.2e}", end=" ")
    scale = np.abs(expected_gradient).max()
    print(
        f"gradient max |Δ| {np.abs(gradient - expected_gradient).max() / scale:.2e} of {scale:.2e}"
    )
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    np.testing.assert_allclose(gradient / scale, expected_gradient / scale, atol=1e-3)
    if train:  # timm has now moved its means as we have (its variances are the unbiased ones)
        new = import_timm({name: v.numpy() for name, v in timm_model.state_dict().items()})
        for ours, theirs in zip(
            jax.tree.leaves(means(stats)), jax.tree.leaves(means(new["batch_stats"])), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)


def means(tree):
    return {
        key: means(value) if isinstance(value, dict) else value
        for key, value in tree.items()
        if key != "var"
    }


def test_imported_variables_have_the_models_shapes(variables):
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    made = jax.eval_shape(
        lambda x: Classifier(create_backbone("coatnet_0")).init(jax.random.key(0), x, train=False),
        images,
    )
    assert jax.tree.map(lambda a: a.shape, made) == jax.tree.map(lambda a: a.shape, variables)


def test_other_weights_raise():
    with pytest.raises(ValueError, match="stages.0.blocks.0.ls1.gamma is no weight of timm's"):
        import_timm({"stages.0.blocks.0.ls1.gamma": np.ones(3)})

"""timm's CoAtNets, weights copied, against ours: names, shapes, logits, gradients, statistics.

Without torch the logits come from a file that `make_timm_fixtures.py` wrote; with the extra
`parity` timm itself answers, for whole models.
"""

import dataclasses
import json

import jax
import make_timm_fixtures as made
import numpy as np
import pytest

from coatnet_jax import coatnet, coatnet_rw
from coatnet_jax.import_timm import classifier, expected_weights, import_timm

FIXTURES = json.loads(made.FILE.read_text())
# Every detail of the blocks is in one of these.
QUICK = ("coatnet_0", "coatnet_nano_rw", "coatnet_0_rw", "coatnet_bn_0_rw", "coatnet_rmlp_1_rw")
QUICK = tuple(f"{name}_224" for name in (*QUICK, "coatnet_rmlp_2_rw"))


def others_slow(names, quick=QUICK):
    return [pytest.param(n, marks=() if n in quick else pytest.mark.slow, id=n) for n in names]


def ours(timm_name):
    return timm_name.rsplit("_", 1)[0]


def shapes(name, **options):
    return {weight.name: weight.shape for weight in expected_weights(name, **options)}


@pytest.fixture
def shallow(monkeypatch):
    """Makes a variant as shallow as those of the fixtures."""

    def set_depths(name):
        variants = coatnet.VARIANTS if name in coatnet.VARIANTS else coatnet_rw.RW_VARIANTS
        small = dataclasses.replace(variants[name], depths=(2, *made.DEPTHS))
        monkeypatch.setitem(variants, name, small)

    return set_depths


@pytest.mark.parametrize("timm_name", others_slow(made.MODELS + made.NAMES_ONLY))
def test_names_and_shapes_are_timms(timm_name):
    expected = shapes(ours(timm_name))
    assert len(expected) == FIXTURES[timm_name]["weights"]
    assert made.shapes_digest(expected) == FIXTURES[timm_name]["shapes_sha256"]


@pytest.mark.parametrize("timm_name", others_slow(made.MODELS))
def test_logits_are_those_timm_gave(timm_name, shallow):
    name, fixture = ours(timm_name), FIXTURES[timm_name]
    shallow(name)
    state = made.state_dict(shapes(name, image_size=made.SIZE))
    assert made.digest(state) == fixture["shallow_sha256"]
    variables = import_timm(state, name)
    logits = np.asarray(forward(name, variables, made.made_up_image())[0])
    np.testing.assert_allclose(logits[:16], fixture["logits"], atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(logits), fixture["norm"], rtol=1e-5)


def forward(name, variables, images, train=False):
    model = classifier(name, classes=1000)

    def apply(variables, images):
        out, new = model.apply(variables, images, train=train, mutable=["batch_stats"])
        return (out["logits"], new["batch_stats"]) if train else out["logits"]

    return jax.jit(apply)(variables, images)


def test_other_weights_raise_with_both_sides(shallow):
    shallow("coatnet_nano_rw")
    state = made.state_dict(shapes("coatnet_nano_rw", image_size=32, classes=7))
    bias = state.pop("stem.norm1.bias")
    state["stem.norm1.offset"] = bias
    state["head.fc.bias"] = bias
    state["stem.norm1.num_batches_tracked"] = np.array(3)
    with pytest.raises(ValueError) as error:
        import_timm(state, "coatnet_nano_rw")
    assert str(error.value) == (
        "these are not the weights of timm's coatnet_nano_rw: "
        "head.fc.bias: (32,) there, (7,) in coatnet_nano_rw; "
        "stem.norm1.bias: missing there, (32,) in coatnet_nano_rw; "
        "stem.norm1.offset: (32,) there, unknown in coatnet_nano_rw"
    )
    with pytest.raises(ValueError, match=r"; .*; .*; .* and \d+ more$"):
        import_timm(state, "coatnet_0")


# --- timm itself ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch(timm):
    return pytest.importorskip("torch")


def both(torch, timm_name, size):
    """timm's model and our variables, both of the made-up weights; nothing in it is random."""
    model = made.timm_model(timm_name, img_size=size)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model, import_timm(made.arrays(model), ours(timm_name))


def to_torch(torch, images):
    return torch.tensor(images.transpose(0, 3, 1, 2))


def biased_variances(torch, model, before):
    """The model's arrays after a step, running variances as if from biased batch variances.

    torch averages n/(n-1) of what we (and Flax) do, n values behind each of a layer's variances.
    """
    after = made.arrays(model)
    for name, n in model.counts.items():
        key = f"{name}.running_var"
        old = 0.9 * before[key]
        after[key] = old + (after[key] - old) * (n - 1) / n
    return after


def count_values(torch, model):
    """Has `model.counts` tell, after a forward pass, how many values each BatchNorm averaged."""
    model.counts = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(
                lambda module, inputs, _, name=name: model.counts.update(
                    {name: inputs[0].numel() // inputs[0].shape[1]}
                )
            )


def gap(a, b):
    """Greatest difference of two trees' leaves."""
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max()), a, b)))


@pytest.mark.parametrize(
    "timm_name", others_slow((*made.MODELS, "coatnet_rmlp_2_rw_384"), ["coatnet_nano_rw_224"])
)
def test_whole_models_are_timms_in_evaluation_and_training(torch, timm_name):
    size = 224 if timm_name == "coatnet_0_224" else 64
    model, variables = both(torch, timm_name, size)
    images = made.made_up_image(size, size, batch=2)
    count_values(torch, model)
    with torch.no_grad():
        expected = model(to_torch(torch, images)).numpy()
        before = {name: value.copy() for name, value in made.arrays(model).items()}
        trained = model.train()(to_torch(torch, images)).numpy()
    name = ours(timm_name)
    stats = import_timm(biased_variances(torch, model, before), name)["batch_stats"]
    logits = forward(name, variables, images)
    train_logits, new_stats = forward(name, variables, images, train=True)
    gaps = gap(logits, expected), gap(train_logits, trained), gap(new_stats, stats)
    print(f"{timm_name} {size} px: logits {gaps[0]:.1e}, training {gaps[1]:.1e}", end=" ")
    print(f"statistics {gaps[2]:.1e}; std {expected.std():.2f}, {trained.std():.2f}")
    assert max(gaps) < 1e-4


@pytest.mark.parametrize(
    "timm_name, size",
    [("coatnet_nano_rw_224", 64), pytest.param("coatnet_0_224", 64, marks=pytest.mark.slow)],
)
def test_gradients_are_timms(torch, timm_name, size):
    model, variables = both(torch, timm_name, size)
    name, images = ours(timm_name), made.made_up_image(size, size, batch=2)
    weights = np.cos(np.arange(1000, dtype=np.float32))
    x = to_torch(torch, images).requires_grad_()
    (model.train()(x) * torch.tensor(weights)).sum().backward()
    theirs = {key: 0 * value for key, value in made.arrays(model).items()}
    theirs |= {key: value.grad.numpy() for key, value in model.named_parameters()}

    def loss(params, images):
        out, _ = classifier(name, classes=1000).apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        return (out["logits"] * weights).sum()

    of_params, of_images = jax.jit(jax.grad(loss, (0, 1)))(variables["params"], images)
    expected = import_timm(theirs, name)["params"]
    # Relative to each array's greatest gradient; some (a key's bias) are zero but for rounding.
    floor = 1e-2 * np.median([np.abs(b).max() for b in jax.tree.leaves(expected)])
    relative = jax.tree.map(
        lambda a, b: np.abs(a - b).max() / max(np.abs(b).max(), floor), of_params, expected
    )
    worst = max(jax.tree.leaves(relative))
    expected = x.grad.numpy().transpose(0, 2, 3, 1)
    of_images = gap(of_images, expected) / np.abs(expected).max()
    print(f"{timm_name}: gradients of parameters {worst:.1e}, of images {of_images:.1e} relative")
    assert worst < 1e-3 and of_images < 1e-3


@pytest.mark.parametrize("height, width", [(64, 96)])
def test_rectangles_are_timms(torch, height, width):
    model, variables = both(torch, "coatnet_rmlp_nano_rw_224", (height, width))
    images = made.made_up_image(height, width)
    with torch.no_grad():
        expected = model(to_torch(torch, images)).numpy()
    logits = forward("coatnet_rmlp_nano_rw", variables, images)
    np.testing.assert_allclose(logits, expected, atol=1e-4)

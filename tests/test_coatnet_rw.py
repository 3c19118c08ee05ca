"""timm's variety of CoAtNet: what training needs of it, and any image size. Logits: see
test_import_timm."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coatnet_jax.coatnet import CoAtNet, adapt_relative_bias
from coatnet_jax.coatnet_rw import RW_VARIANTS, RWConfig, log_offsets
from coatnet_jax.models import create_backbone

SIZES = {"widths": (6, 6, 8, 12, 16), "depths": (2, 1, 1, 1, 1), "head_dim": 4, "stem_width": 4}
# Between them every detail.
TABLE = RWConfig(**SIZES | {"widths": (6, 6, 8, 12, 12)}, early_pool=True, conv_bias=True)
NETWORK = RWConfig(
    **SIZES,
    pool="max",
    se_early=True,
    shortcut_bias=False,
    norm="batch",
    layer_scale=True,
    position_mlp=8,
)


def shapes(model, h=32, w=None):
    images = jax.ShapeDtypeStruct((1, h, w or h, 3), jnp.float32)
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)


def filled(shapes):
    """Random arrays of these shapes, so that no layer scale hides its branch."""
    rng = np.random.default_rng(0)

    def fill(leaf):
        vector = leaf.ndim == 1
        values = rng.uniform(0.5, 1.5, leaf.shape) if vector else rng.normal(0, 0.2, leaf.shape)
        return jnp.asarray(values, jnp.float32)

    return jax.tree.map(fill, shapes)


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(0), (3, 48, 32, 3))


@pytest.fixture(scope="module")
def variables():
    return filled(shapes(CoAtNet(NETWORK)))


@pytest.fixture(scope="module")
def evaluated(images, variables):
    return jax.jit(lambda v, x: CoAtNet(NETWORK).apply(v, x, train=False))(variables, images)


def test_names_of_blocks_are_those_of_the_paper_variants():
    ours, papers = (
        set(shapes(create_backbone(name))["params"]) for name in ("coatnet_nano_rw", "coatnet_0")
    )
    assert papers < ours | {"stage3_block4"} and {"stem", "norm", "stage4_block2"} < ours


def test_features_are_the_mean_of_the_normed_map(images):
    model = CoAtNet(TABLE)
    variables = filled(shapes(model, 48, 32))
    features, last = jax.jit(lambda v, x: model.apply(v, x, train=False, return_map=True))(
        variables, images
    )
    assert last.shape == (3, 2, 1, 12)
    last, norm = np.asarray(last), variables["params"]["norm"]
    normed = (last - last.mean(-1, keepdims=True)) / np.sqrt(last.var(-1, keepdims=True) + 1e-6)
    expected = (normed * norm["scale"] + norm["bias"]).mean((1, 2))
    np.testing.assert_allclose(features, expected, atol=1e-4)


def test_remat_recomputes_every_block(images, variables):
    def gradient(params):
        model = CoAtNet(NETWORK, remat=True)
        out = lambda p: model.apply({**variables, "params": p}, images, train=False).sum()  # noqa: E731
        return jax.grad(out)(params)

    recomputed = [
        equation
        for equation in jax.make_jaxpr(gradient)(variables["params"]).eqns
        if "remat" in equation.primitive.name
    ]
    assert len(recomputed) == sum(NETWORK.depths[1:])


def test_a_network_of_positions_takes_any_size(variables):
    odd = jnp.ones((1, 100, 76, 3))
    last = jax.eval_shape(
        lambda v: CoAtNet(NETWORK).apply(v, odd, train=False, return_map=True)[1], variables
    )
    assert last.shape == (1, 4, 3, 16)
    with pytest.raises(ValueError, match="an image of 100x31 is too small"):
        jax.eval_shape(lambda v: CoAtNet(NETWORK).apply(v, odd[:, :, :31], train=False), variables)


def test_bfloat16_is_near_and_keeps_float32_parameters(images, variables, evaluated):
    model = CoAtNet(NETWORK, dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(shapes(model))} == {"float32"}
    near = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images)
    assert near.dtype == jnp.float32
    assert 0 < jnp.abs(evaluated - near).max() < 0.03 * jnp.abs(evaluated).max()


def train(model, variables, images, seeds):
    """Features for each seed of drop path, and the names of what keeps its statistics."""

    def run(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return model.apply(variables, images, train=True, mutable=["batch_stats"], rngs=rngs)

    outs = [jax.jit(run)(seed) for seed in seeds]
    before, after = variables["batch_stats"], outs[0][1]["batch_stats"]
    same = jax.tree.map(lambda a, b: bool((a == b).all()), before, after)
    return [out for out, _ in outs], {name for name in same if any(jax.tree.leaves(same[name]))}


def test_drop_path_and_batch_statistics_move_in_training(images, variables):
    (first, again, other), kept = train(
        CoAtNet(NETWORK, drop_path=0.9, frozen_below=1), variables, images, (0, 0, 1)
    )
    assert (first == again).all() and (first != other).any()
    assert kept == {"stem"}


def test_a_frozen_backbone_is_as_in_evaluation(images, variables, evaluated):
    (out,), kept = train(CoAtNet(NETWORK, drop_path=0.9, frozen_below=5), variables, images, (0,))
    np.testing.assert_allclose(out, evaluated, rtol=1e-5, atol=1e-5)
    assert kept == set(variables["batch_stats"])


def test_log_offsets_are_in_the_order_of_a_table():
    offsets = log_offsets(3, 2)
    assert offsets.shape == (15, 2)
    for row, (i, j) in enumerate((i, j) for i in range(-2, 3) for j in range(-1, 2)):
        np.testing.assert_allclose(offsets[row], np.sign([i, j]) * np.log1p(np.abs([i, j])))


@pytest.mark.parametrize("size", [(224, 224), (100, 76)])
def test_weights_for_128_pixels_run_at_another_size(size):
    model = CoAtNet(TABLE)
    old, like = filled(shapes(model, 128)), shapes(model, *size)
    params = adapt_relative_bias(old["params"], like["params"], old_size=(128, 128), new_size=size)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, like["params"])
    x = jnp.ones((1, *size, 3))
    jax.eval_shape(lambda v: model.apply(v, x, train=False), {**old, "params": params})


def test_all_variants_are_hashable_and_differ():
    assert len(set(RW_VARIANTS.values())) == len(RW_VARIANTS) == 10
    details = [field.name for field in dataclasses.fields(RWConfig)]
    assert all(len({getattr(c, d) for c in RW_VARIANTS.values()}) > 1 for d in details[3:])

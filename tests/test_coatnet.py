"""CoAtNet against the paper's and timm's counts and NumPy oracles."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coatnet_jax.coatnet import (
    VARIANTS,
    CoAtNet,
    CoAtNetConfig,
    DropPath,
    _stack,
    adapt_relative_bias,
    attend,
    pool2x2,
    relative_bias,
    resize_relative_bias,
)
from coatnet_jax.heads import ClassifierHead
from coatnet_jax.models import create_backbone

TINY = CoAtNetConfig((4, 6, 8, 12, 16), (2, 1, 1, 1, 1), head_dim=4)


class Classifier(nn.Module):
    """A backbone with CoAtNet's head, as the paper counts it."""

    backbone: nn.Module
    classes: int = 1000

    @nn.compact
    def __call__(self, images, *, train):
        features = self.backbone(images, train=train)
        return ClassifierHead(self.classes, name="head")(features)


def shapes(model, size=224):
    h, w = size if isinstance(size, tuple) else (size, size)
    images = jax.ShapeDtypeStruct((1, h, w, 3), jnp.float32)
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)


def filled(shapes, seed=0):
    """Random arrays of these shapes; quicker than compiling `init`."""
    rng = np.random.default_rng(seed)

    def fill(leaf):
        vector = leaf.ndim == 1
        values = rng.uniform(0.5, 1.5, leaf.shape) if vector else rng.normal(0, 0.2, leaf.shape)
        return jnp.asarray(values, jnp.float32)

    return jax.tree.map(fill, shapes)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(0), (3, 48, 32, 3))


@pytest.fixture(scope="module")
def variables(images):
    init = CoAtNet(TINY).init
    return filled(jax.eval_shape(lambda x: init(jax.random.key(1), x, train=False), images))


@pytest.mark.parametrize(
    "name, paper, timm",
    [
        ("coatnet_0", 25, 25.04),
        ("coatnet_1", 42, 42.23),
        ("coatnet_2", 75, 74.68),
        ("coatnet_3", 168, 166.97),
        ("coatnet_4", 275, 275.43),
        ("coatnet_5", 688, 687.47),
    ],
)
def test_parameter_counts_are_the_papers_and_timms(name, paper, timm):
    millions = count(shapes(Classifier(create_backbone(name)))["params"]) / 1e6
    assert abs(millions - paper) < 0.007 * paper
    # coatnet_5 of timm has heads of 32 where the paper's Table 12 has 64: 0.42 M more biases.
    assert abs(millions - timm) < (0.43 if name == "coatnet_5" else 0.01)


@pytest.mark.parametrize("name, most", [("coatnet_micro", 6e6), ("coatnet_atto", 1e6)])
def test_small_variants_are_small(name, most):
    assert most / 3 < count(shapes(create_backbone(name), 64)["params"]) < most


def test_module_names_are_the_checkpoint_format():
    names = set(shapes(CoAtNet(VARIANTS["coatnet_0"]))["params"])
    depths = {1: 2, 2: 3, 3: 5, 4: 2}
    blocks = {f"stage{s}_block{n}" for s, depth in depths.items() for n in range(depth)}
    assert names == {"stem", "norm"} | blocks


@pytest.mark.parametrize("h, w", [(32, 32), (48, 33), (50, 56), (80, 96), (112, 111)])
def test_odd_sizes_halve_upwards(h, w):
    images = jax.ShapeDtypeStruct((2, h, w, 3), jnp.float32)

    def run(x):
        model = CoAtNet(TINY)
        return model.init_with_output(jax.random.key(0), x, train=False, return_map=True)[0]

    features, last = jax.eval_shape(run, images)
    assert features.shape == (2, 16) and features.dtype == jnp.float32
    assert last.shape == (2, -(-h // 32), -(-w // 32), 16)


def test_features_are_the_normed_mean_of_the_map(images, variables):
    features, last = jax.jit(lambda v, x: CoAtNet(TINY).apply(v, x, train=False, return_map=True))(
        variables, images
    )
    mean = np.asarray(last).mean((1, 2))
    normed = (mean - mean.mean(1, keepdims=True)) / np.sqrt(mean.var(1, keepdims=True) + 1e-6)
    norm = variables["params"]["norm"]
    expected = normed * norm["scale"] + norm["bias"]
    np.testing.assert_allclose(features, expected, atol=1e-4)


def test_wrong_images_raise(variables):
    def run(*shape, dtype="float32", of=jnp.float32):
        model, images = CoAtNet(TINY, dtype=dtype), jax.ShapeDtypeStruct(shape, of)
        jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, images)

    with pytest.raises(ValueError, match="31x40 is too small"):
        run(1, 31, 40, 3)
    with pytest.raises(ValueError, match="takes float images"):
        run(1, 48, 32, 3, of=jnp.uint8)
    with pytest.raises(ValueError, match="hold 15 .* gives 4x2 tokens, which need 21; resize"):
        run(1, 64, 32, 3)
    with pytest.raises(ValueError, match="not 'float16'"):
        run(1, 48, 32, 3, dtype="float16")


def test_pool_means_what_is_there():
    x = np.arange(2 * 5 * 4 * 3, dtype=np.float32).reshape(2, 5, 4, 3)
    expected = np.stack(
        [
            np.stack([x[:, i : i + 2, j : j + 2].mean((1, 2)) for j in (0, 2)], axis=1)
            for i in (0, 2, 4)
        ],
        axis=1,
    )
    np.testing.assert_allclose(pool2x2(jnp.asarray(x)), expected, rtol=1e-6)
    np.testing.assert_allclose(pool2x2(jnp.asarray(x[:, :4])), expected[:, :2], rtol=1e-6)


def test_relative_bias_is_looked_up_by_offset():
    h, w, heads = 3, 2, 4
    table = np.random.default_rng(0).normal(size=((2 * h - 1) * (2 * w - 1), heads))
    bias = np.asarray(relative_bias(jnp.asarray(table, jnp.float32), (h, w)))
    assert bias.shape == (heads, h * w, h * w)
    for query in range(h * w):
        for key in range(h * w):
            (qi, qj), (ki, kj) = divmod(query, w), divmod(key, w)
            row = (qi - ki + h - 1) * (2 * w - 1) + qj - kj + w - 1
            np.testing.assert_allclose(bias[:, query, key], table[row], rtol=1e-6)


def test_resized_bias_keeps_a_plane_and_its_centre():
    # A table that is linear in both offsets stays linear: bilinear interpolation is exact on it.
    rows, columns = np.linspace(-1, 1, 2 * 7 - 1), np.linspace(-1, 1, 2 * 5 - 1)
    table = (3 + 2 * rows[:, None] - columns).reshape(-1, 1).astype(np.float32)
    resized = np.asarray(resize_relative_bias(jnp.asarray(table), (7, 5), (4, 6))).reshape(7, 11)
    expected = 3 + 2 * np.linspace(-1, 1, 7)[:, None] - np.linspace(-1, 1, 11)
    np.testing.assert_allclose(resized, expected, atol=1e-5)
    np.testing.assert_allclose(resized[3, 5], 3, atol=1e-5)
    with pytest.raises(ValueError, match="which has 117"):
        resize_relative_bias(jnp.asarray(table[:-1]), (7, 5), (4, 6))


def test_adapted_weights_run_at_another_size_and_others_are_untouched():
    model = CoAtNet(TINY)
    params, like = filled(shapes(model, 32)), shapes(model, 64)
    adapted = adapt_relative_bias(params["params"], like["params"])
    same = jax.tree.map(lambda a, b: a.shape == b.shape, adapted, like["params"])
    assert all(jax.tree.leaves(same))
    assert adapted["stem"] == params["params"]["stem"]
    large = jnp.ones((1, 64, 64, 3))
    jax.eval_shape(lambda v: model.apply(v, large, train=False), {**params, "params": adapted})
    # Wrapped in a model, and back again: a table that grew gives up its old points again.
    back = adapt_relative_bias({"backbone": adapted}, {"backbone": params["params"]})["backbone"]
    table = ("stage3_block0", "attention", "relative_bias")
    old, new = (p[table[0]][table[1]][table[2]] for p in (params["params"], back))
    np.testing.assert_allclose(old, new, atol=1e-6)


def test_weights_adapt_between_squares_and_rectangles():
    model, small, wide = CoAtNet(TINY), (128, 128), (100, 76)
    square, rectangle = shapes(model, small)["params"], shapes(model, wide)["params"]
    params = filled(square)
    adapted = adapt_relative_bias(params, rectangle, old_size=small, new_size=wide)
    assert jax.tree.map(jnp.shape, adapted) == jax.tree.map(jnp.shape, rectangle)
    for stage, old, new in ((3, (8, 8), (7, 5)), (4, (4, 4), (4, 3))):
        before, after = (
            tree[f"stage{stage}_block0"]["attention"]["relative_bias"] for tree in (params, adapted)
        )
        np.testing.assert_array_equal(after, resize_relative_bias(before, old, new))
    # As many rows, but of 5x7 tokens: without the sizes nothing could tell.
    turned = adapt_relative_bias(adapted, rectangle, old_size=wide, new_size=wide[::-1])
    table = ("stage3_block0", "attention", "relative_bias")
    before, after = (np.asarray(t[table[0]][table[1]][table[2]]) for t in (adapted, turned))
    np.testing.assert_array_equal(after, resize_relative_bias(before, (7, 5), (5, 7)))
    with pytest.raises(ValueError, match="has 117 rows, which is no image of 128x128"):
        adapt_relative_bias(adapted, square, old_size=small, new_size=wide)


def test_adapting_to_other_heads_or_from_a_rectangle_raises():
    def table(*shape):
        return {"attention": {"relative_bias": jnp.ones(shape)}}

    with pytest.raises(ValueError, match="attention/relative_bias has 2 heads, the model has 3"):
        adapt_relative_bias(table(9, 2), table(25, 3))
    with pytest.raises(ValueError, match="15 rows, which is no square"):
        adapt_relative_bias(table(15, 2), table(25, 2))


def test_remat_and_scan_change_neither_values_nor_gradients_nor_statistics(images):
    config = CoAtNetConfig((4, 6, 8, 12, 16), (1, 1, 4, 4, 1), head_dim=4)
    variables = filled(shapes(CoAtNet(config), 64))
    images = jnp.concatenate([images, images], axis=2)[:, :, :64].repeat(2, axis=1)[:, :64]

    def outputs(**options):
        def loss(params):
            all_variables = {**variables, "params": params}
            y, new = CoAtNet(config, **options).apply(
                all_variables, images, train=True, mutable=["batch_stats"]
            )
            return (y * jnp.arange(16)).sum(), (y, new)

        return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])

    plain = outputs()
    for options in ({"remat": True}, {"scan": True, "remat": True}):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3),
            plain,
            outputs(**options),
        )


@pytest.mark.parametrize(("depths", "loops"), [((3, 3, 3, 3), 0), ((4, 3, 5, 2), 2)])
def test_blocks_are_scanned_from_three_equal_ones_on(depths, loops):
    config = CoAtNetConfig((4, 4, 4, 4, 4), (1, *depths), head_dim=2)
    variables = shapes(CoAtNet(config), 32)

    def counted(scan):
        model = CoAtNet(config, scan=scan)
        traced = jax.make_jaxpr(lambda *a: model.apply(*a, train=False))
        return str(traced(variables, jnp.ones((1, 32, 32, 3)))).count(" scan[")

    assert (counted(False), counted(True)) == (0, loops)


def test_slices_of_scanned_blocks_gradients_are_the_same_code_for_each():
    def momentum(moments, weights):
        grads = jax.grad(lambda weights: (_stack(weights)["w"] ** 3).sum())(weights)
        return jax.tree.map(lambda m, g: 0.9 * m + g, moments, grads)

    weights = [{"w": jnp.full((8, 3), n + 1.0)} for n in range(4)]
    moments = jax.tree.map(jnp.ones_like, weights)
    compiled = jax.jit(momentum).lower(moments, weights).compile()
    np.testing.assert_allclose(
        [new["w"] for new in compiled(moments, weights)],
        [np.full((8, 3), 0.9 + 3 * (n + 1) ** 2) for n in range(4)],
        rtol=1e-6,
    )
    # A slice at a place that XLA knows would stand there as `slice={[2:3], …}`.
    assert " dynamic-slice(" in compiled.as_text() and " slice(" not in compiled.as_text()


def test_scanned_blocks_draw_different_drop_paths():
    config = CoAtNetConfig((4, 6, 6, 6, 6), (1, 1, 1, 9, 1), head_dim=2)
    model = CoAtNet(config, drop_path=0.9, scan=True)
    images = jnp.ones((8, 32, 32, 3))
    variables = filled(shapes(model, 32))

    def features(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return model.apply(variables, images, train=True, mutable=["batch_stats"], rngs=rngs)[0]

    first, again, other = (np.asarray(jax.jit(features)(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    assert len(np.unique(first.round(4), axis=0)) > 4  # equal images that lost other branches


def test_attention_equals_jaxs_and_refuses_what_cannot_run():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 6, 4, 8))
    bias = jax.random.normal(jax.random.key(1), (4, 6, 6))
    expected = jax.nn.dot_product_attention(q, k, v, bias=bias[None])
    np.testing.assert_allclose(attend(q, k, v, bias, implementation="xla"), expected, atol=1e-5)
    with pytest.raises(ValueError, match="needs an NVIDIA GPU, bfloat16 and an even number"):
        attend(q, k, v, bias, implementation="cudnn")
    with pytest.raises(ValueError, match="must be 'xla' or 'cudnn', not 'flash'"):
        attend(q, k, v, bias, implementation="flash")


def test_bfloat16_keeps_float32_parameters_and_is_near(images, variables):
    model = CoAtNet(TINY, dtype="bfloat16")
    made = jax.eval_shape(lambda x: model.init(jax.random.key(1), x, train=False), images)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(made)} == {"float32"}
    exact, near = (
        jax.jit(lambda v, x, m=m: m.apply(v, x, train=False))(variables, images)
        for m in (CoAtNet(TINY), model)
    )
    assert near.dtype == jnp.float32
    assert 0 < jnp.abs(exact - near).max() < 0.15


def test_frozen_stages_keep_their_statistics_and_ignore_the_batch(images, variables):
    model = CoAtNet(TINY, frozen_below=2)
    _, new = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))(
        variables, images
    )
    for name, old in variables["batch_stats"].items():
        same = jax.tree.map(lambda a, b: bool((a == b).all()), old, new["batch_stats"][name])
        assert all(jax.tree.leaves(same)) == (name in ("stem", "stage1_block0")), name


def test_drop_path_drops_whole_images_and_scales_the_rest():
    x = jnp.ones((512, 2, 2, 3))
    module, rngs = DropPath(0.25), {"dropout": jax.random.key(0)}
    y = np.asarray(module.apply({}, x, True, rngs=rngs)).reshape(512, -1)
    assert set(np.round(np.unique(y), 4)) == {0, np.float32(1.3333)}
    assert (y == y[:, :1]).all()
    assert abs((y[:, 0] == 0).mean() - 0.25) < 0.07
    np.testing.assert_array_equal(module.apply({}, x, False), x)


def test_drop_path_grows_linearly_over_the_blocks():
    rates = {}

    def note(next_function, args, kwargs, context):
        if isinstance(context.module, DropPath):
            rates[context.module.path[0]] = context.module.rate
        return next_function(*args, **kwargs)

    with nn.intercept_methods(note):
        shapes(create_backbone("coatnet_0", drop_path=0.11), 32)
    np.testing.assert_allclose(list(rates.values()), np.arange(12) * 0.01, atol=1e-9)


def test_unknown_backbones_and_options_raise_with_near_names():
    with pytest.raises(ValueError, match="'coatnet_mirco'; near: coatnet_micro"):
        create_backbone("coatnet_mirco")
    with pytest.raises(ValueError, match="no option 'rematt'; it has: remat"):
        create_backbone("coatnet_0", rematt=True)

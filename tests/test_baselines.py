"""The baselines: published counts, CoAtNet's interface, and the training steps on each family."""

import re
from functools import partial

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from coatnet_jax.augment import simclr_view, supervised_view
from coatnet_jax.baselines import inverted_residual, resnet, vit
from coatnet_jax.baselines.inverted_residual import InvertedResidualConfig, Row
from coatnet_jax.baselines.simple_cnn import SimpleCNN, mean_cells
from coatnet_jax.checkpoint import Checkpoints, load_backbone
from coatnet_jax.coatnet import DropPath
from coatnet_jax.finetune import finetune_train_step
from coatnet_jax.heads import AgeModel, ProjectionHead, SiameseModel
from coatnet_jax.models import BASELINES, create_backbone
from coatnet_jax.optim import decay_mask, first_trained_stage, freeze_mask, layer_scales
from coatnet_jax.pretrain import pretrain_train_step
from coatnet_jax.ssl.simclr import SimCLR
from coatnet_jax.train_state import create_train_state, init_variables

# torchvision's counts with its layer for 1000 classes; of ViT-S/16 timm's.
PUBLISHED = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "mobilenet_v2": 3_504_872,
    "efficientnet_b0": 5_288_548,
    "vit_s16": 22_050_664,
}
TINY_ROWS = ((Row(1, 4, 1, 1), Row(2, 6, 2, 2)), *(((Row(2, 8, 2, 2, side=5),),) * 3))
# One of each family, with all its kinds of blocks.
TINY = {
    "simple_cnn": SimpleCNN,
    "basic_resnet": partial(resnet.ResNet, resnet.ResNetConfig((1, 2, 1, 1))),
    "bottleneck_resnet": partial(resnet.ResNet, resnet.ResNetConfig((1, 1, 1, 1), True)),
    "inverted_residual": partial(
        inverted_residual.InvertedResidualNet,
        InvertedResidualConfig(4, TINY_ROWS, activation=nn.silu, squeeze_excite=True),
    ),
    "vit": partial(vit.ViT, vit.ViTConfig(width=8, heads=2, depth=4)),
}


def shapes(model, *hw, of=jnp.float32, **options):
    """Shapes of ((features, map), variables)."""
    images = jax.ShapeDtypeStruct((2, *(hw or (64, 64)), 3), of)
    init = partial(model.init_with_output, train=False, return_map=True, **options)
    return jax.eval_shape(lambda x: init(jax.random.key(0), x), images)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    (features, _), variables = shapes(create_backbone(name), 224, 224)
    classifier = (features.shape[1] + 1) * 1000
    assert count(variables["params"]) + classifier == PUBLISHED[name]


def test_simple_cnn_has_less_than_a_million_parameters_at_every_size():
    model = AgeModel(create_backbone("simple_cnn"))
    counts = {
        count(jax.eval_shape(lambda s=size: init_variables(RNG, model, image_size=s)))
        for size in (48, 128)
    }
    assert counts == {392_220}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", TINY)
def test_features_and_parameters_are_float32_in_either_dtype(kind, dtype):
    (features, last), variables = shapes(TINY[kind](dtype=dtype), 64, 96)
    halvings = 4 if kind in ("simple_cnn", "vit") else 5
    assert last.shape == (2, 64 >> halvings, 96 >> halvings, last.shape[3])
    assert features.shape == (2, features.shape[1])
    leaves = jax.tree.leaves((features, last, variables))
    assert {leaf.dtype.name for leaf in leaves} == {"float32"}
    params = variables["params"]
    stages = {name.split("_")[0] for name in params} - {"stem", "norm"}
    assert stages == {"stage1", "stage2", "stage3", "stage4"}


@pytest.mark.parametrize("kind", TINY)
def test_products_are_of_bfloat16_and_only_those_of_one(kind):
    def operands(dtype):
        model, images = TINY[kind](dtype=dtype), jnp.zeros((1, 32, 32, 3))
        init = partial(model.init_with_output, jax.random.key(0), train=False)
        text = str(jax.make_jaxpr(init)(images))
        products = re.findall(r"(\w+)\[[\d,]*\] = (?:dot_general|conv_general_dilated)", text)
        return set(products)

    assert operands("float32") == {"f32"} and operands("bfloat16") == {"bf16"}


@pytest.mark.parametrize("name", BASELINES)
def test_layer_decay_and_frozen_stages_know_every_parameter(name):
    params = {"backbone": shapes(create_backbone(name))[1]["params"], "head": jnp.ones(())}
    scales = layer_scales(params, decay=0.5)["backbone"]
    first = "stem" if "stem" in scales else "stage1_block0"
    assert max(jax.tree.leaves(scales[first])) == min(jax.tree.leaves(scales))
    frozen = freeze_mask(params, "stage3")["backbone"]
    by_name = {child: set(jax.tree.leaves(mask)) for child, mask in frozen.items()}
    still = {child for child, values in by_name.items() if values == {True}}
    assert still == {c for c in by_name if c.startswith(("stem", "stage1", "stage2"))}
    assert not set().union(*(by_name[c] for c in by_name.keys() - still)) & {True}


def test_positions_and_class_token_do_not_decay():
    params = shapes(TINY["vit"]())[1]["params"]
    stem = decay_mask(params)["stem"]
    assert not stem["position_embedding"] and not stem["class_token"]
    assert stem["patches"] == {"kernel": True, "bias": False}


@pytest.mark.parametrize("kind", ["basic_resnet", "bottleneck_resnet", "inverted_residual"])
def test_frozen_stages_hand_their_statistics_through(kind):
    model = TINY[kind](frozen_below=3)
    _, variables = shapes(model)
    images = jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32)

    def new_statistics(stats, params, images):
        variables = {"params": params, "batch_stats": stats}
        return model.apply(variables, images, train=True, mutable=["batch_stats"])[1]

    stats = variables["batch_stats"]
    jaxpr = jax.make_jaxpr(new_statistics)(stats, variables["params"], images).jaxpr
    paths = [path for path, _ in jax.tree.leaves_with_path(stats)]
    same = {
        path[0].key: before is after
        for path, before, after in zip(paths, jaxpr.invars, jaxpr.outvars, strict=False)
    }
    assert {name for name in same if same[name]} == {
        name for name in same if name.startswith(("stem", "stage1", "stage2"))
    }


def test_drop_path_grows_linearly_over_the_blocks_that_have_a_shortcut():
    def rates(kind):
        found = {}

        def note(next_function, args, kwargs, context):
            if isinstance(context.module, DropPath):
                found.setdefault(context.module.path[0], context.module.rate)
            return next_function(*args, **kwargs)

        with nn.intercept_methods(note):
            shapes(TINY[kind](drop_path=0.3))
        return found

    assert rates("simple_cnn") == {}
    for kind in ("basic_resnet", "bottleneck_resnet", "vit"):
        np.testing.assert_allclose(
            list(rates(kind).values()), np.linspace(0, 0.3, len(rates(kind)))
        )
    # Block 1 of the first stage and 0 of the others change the shape and have none.
    blocks = ["stage1_block0", "stage1_block2", "stage2_block1", "stage3_block1", "stage4_block1"]
    expected = dict(zip(blocks, 0.3 * np.array([0, 2, 4, 6, 8]) / 8, strict=True))
    assert rates("inverted_residual") == pytest.approx(expected)


@pytest.mark.parametrize("kind", sorted(TINY.keys() - {"simple_cnn"}))
def test_frozen_backbone_draws_no_random_numbers(kind):
    _, variables = shapes(TINY[kind]())
    images = jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32)

    def train(frozen_below):
        model = TINY[kind](drop_path=0.5, frozen_below=frozen_below)
        if kind == "vit":
            variables["params"] = shapes(model, 32, 32)[1]["params"]
        step = partial(model.apply, train=True, mutable=["batch_stats"])
        return jax.eval_shape(step, variables, images)

    train(first_trained_stage("head"))
    with pytest.raises(flax.errors.InvalidRngError):
        train(4)


@pytest.mark.parametrize(
    ("kind", "size", "message"),
    [
        ("simple_cnn", (15, 64), "15x64 is too small: simple_cnn needs at least 16x16"),
        ("basic_resnet", (64, 31), "64x31 is too small: ResNet needs at least 32x32"),
        ("inverted_residual", (31, 31), "needs at least 32x32"),
        ("vit", (8, 8), "8x8 is too small: ViT needs at least 16x16"),
        ("vit", (100, 48), "100x48 is no multiple of that; give it images of 96x48"),
    ],
)
def test_wrong_image_sizes_are_told_in_one_line(kind, size, message):
    with pytest.raises(ValueError, match=message):
        shapes(TINY[kind](), *size)


def test_wrong_images_and_dtypes_are_told_in_one_line():
    with pytest.raises(ValueError, match="ViT takes float images"):
        shapes(TINY["vit"](), of=jnp.uint8)
    with pytest.raises(ValueError, match="not 'float16'"):
        shapes(TINY["basic_resnet"](dtype="float16"))


def test_vit_weights_of_another_image_size_are_refused_until_adapted():
    model = TINY["vit"]()
    small, large = (shapes(model, size, size)[1]["params"] for size in (32, 64))
    params = jax.tree.map(lambda s: np.ones(s.shape, np.float32), small)
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    apply = partial(model.apply, train=False)
    with pytest.raises(ValueError, match="positions of 4 patches, but this image size gives 4x4"):
        jax.eval_shape(apply, {"params": params}, images)
    adapted = vit.adapt_positions(params, large)
    jax.eval_shape(apply, {"params": adapted}, images)
    assert adapted["stage1_block0"] is params["stage1_block0"]
    with pytest.raises(ValueError, match="has 6 patches, which is no square"):
        vit.adapt_positions({"stem": {"position_embedding": np.ones((7, 8))}}, large)


def test_adapted_positions_lie_on_the_same_plane():
    # Bilinear interpolation between patch centres keeps what is linear, but for the outer edge.
    def plane(side, width=3):
        centres = (np.arange(side) + 0.5) / side
        grid = 2 + 3 * centres[:, None, None] - centres[None, :, None] * np.arange(width)
        token = np.full((1, width), 9.0)
        return np.concatenate([token, grid.reshape(-1, width)]).astype(np.float32)

    tree = lambda table: {"stem": {"position_embedding": table}}  # noqa: E731
    table = vit.adapt_positions(tree(plane(4)), tree(plane(8)))["stem"]["position_embedding"]
    inner = np.s_[1:-1, 1:-1]
    resized, expected = (np.asarray(t)[1:].reshape(8, 8, 3)[inner] for t in (table, plane(8)))
    np.testing.assert_allclose(resized, expected, atol=1e-5)
    np.testing.assert_array_equal(table[0], 9)


@pytest.mark.parametrize("h, w", [(8, 6), (7, 5), (1, 2)])
def test_max_pool_matches_flax_with_gradients(h, w):
    values = np.random.default_rng(0).permutation(2 * h * w * 3) - h * w  # no two alike
    x = jnp.asarray(values.reshape(2, h, w, 3), jnp.float32)
    theirs = partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))

    def run(pool):
        y, gradient = jax.vjp(pool, x)
        return y, *gradient(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))

    for a, b in zip(run(resnet.max_pool3x3), run(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("h, w", [(4, 8), (7, 3), (1, 6)])
def test_cells_are_means_of_a_quarter_of_the_rows_and_columns(h, w):
    x = np.random.default_rng(0).normal(size=(2, h, w, 3)).astype(np.float32)
    cells = np.asarray(mean_cells(jnp.asarray(x)))
    for i in range(4):
        for j in range(4):
            rows = slice(int(np.floor(i * h / 4)), int(np.ceil((i + 1) * h / 4)))
            columns = slice(int(np.floor(j * w / 4)), int(np.ceil((j + 1) * w / 4)))
            np.testing.assert_allclose(
                cells[:, i, j], x[:, rows, columns].mean((1, 2)), rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("name", BASELINES)
def test_options_are_the_modules_own(name):
    assert create_backbone(name, drop_path=0.2, frozen_below=3, dtype="bfloat16").frozen_below == 3
    with pytest.raises(ValueError, match=f"{name} has no option 'rmat'; it has: .*frozen_below"):
        create_backbone(name, rmat=True)
    if name == "simple_cnn":
        with pytest.raises(ValueError, match="no option 'remat'; it has: frozen_below"):
            create_backbone(name, remat=True)
    else:
        assert create_backbone(name, remat=True).remat


def pretrain_parts(backbone):
    model = SiameseModel(backbone, ProjectionHead(layers=2, hidden=16, out=8))
    view = partial(simclr_view, size=32)
    step = partial(pretrain_train_step, model=model, view=view, method=SimCLR(), total_steps=100)
    return model, step, False


def finetune_parts(backbone):
    model = AgeModel(backbone)
    step = partial(
        finetune_train_step,
        model=model,
        view=partial(supervised_view, size=32),
        loss_name="kl_l1",
        sigma=2.0,
        gender_weight=0.1,
        race_weight=0.1,
        mixup_alpha=0.2,
        ema=0.9,
    )
    return model, step, True


BATCH = {
    "image": np.random.default_rng(0).integers(0, 256, (8, 40, 40, 3), np.uint8),
    "age": np.arange(8, dtype=np.int32),
    "gender": np.arange(8, dtype=np.int32) % 2,
    "race": np.arange(8, dtype=np.int32) % 5,
}
TX = optax.adam(1e-2)
RNG = jax.random.key(0)


def start(model, ema=True):
    variables = init_variables(RNG, model, image_size=32)
    return create_train_state(jax.random.key(1), variables, TX, ema=ema)


@pytest.mark.parametrize("parts", [pretrain_parts, finetune_parts])
@pytest.mark.parametrize("kind", TINY)
def test_training_steps_keep_the_state_of_every_family(kind, parts):
    remat = {} if kind == "simple_cnn" else {"remat": True}
    model, step, ema = parts(TINY[kind](drop_path=0.2, dtype="bfloat16", frozen_below=2, **remat))
    state = jax.eval_shape(lambda: start(model, ema))
    new, metrics = jax.eval_shape(partial(step, tx=TX), state, BATCH)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert jax.tree.map(lambda s: (s.shape, s.dtype), new) == jax.tree.map(
        lambda s: (s.shape, s.dtype), state
    )
    assert metrics["loss"].shape == () and metrics["loss"].dtype == jnp.float32


def test_finetune_step_of_a_baseline_lowers_the_loss():
    model, step, _ = finetune_parts(TINY["simple_cnn"](drop_path=0.2))
    state, losses = start(model), []
    for _ in range(20):
        state, metrics = step(state, BATCH, tx=TX)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.9 * losses[0] and int(state.step) == 20


@pytest.mark.parametrize("kind", ["vit", "basic_resnet"])
def test_checkpoint_gives_its_backbone_to_a_model_of_another_image_size(kind, tmp_path):
    """A ViT's has no statistics, and positions that follow the image size."""
    rng = np.random.default_rng(0)

    def state_at(size):
        model = AgeModel(TINY[kind]())
        variables = jax.eval_shape(lambda: init_variables(RNG, model, image_size=size))
        filled = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), variables)
        return create_train_state(jax.random.key(1), filled, TX, ema=True)

    small, large = state_at(32), state_at(48)
    checkpoints = Checkpoints(tmp_path, metric="mae")
    checkpoints.save(small, {"place": 3}, {"mae": 1.0})
    restored, iterator = checkpoints.restore_latest(small)
    checkpoints.close()
    assert iterator == {"place": 3}
    assert jax.tree.structure(restored) == jax.tree.structure(small)
    jax.tree.map(np.testing.assert_array_equal, restored.params, small.params)

    merged = load_backbone(tmp_path, large.eval_variables)
    shape_of = partial(jax.tree.map, jnp.shape)
    assert shape_of(merged) == shape_of(large.eval_variables)
    source, target = (tree["backbone"] for tree in (small.params, merged["params"]))
    jax.tree.map(np.testing.assert_array_equal, source["stage4_block0"], target["stage4_block0"])
    if kind == "vit":
        assert merged["batch_stats"] == {}
        assert target["stem"]["position_embedding"].shape == (1 + 3 * 3, 8)
    else:
        jax.tree.map(np.testing.assert_array_equal, merged["batch_stats"], small.batch_stats)

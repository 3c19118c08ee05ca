"""Multiply-accumulates against counts by hand and published ones."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from coatnet_jax.coatnet import CoAtNet, CoAtNetConfig
from coatnet_jax.depthwise import depthwise_conv
from coatnet_jax.macs import count_macs
from coatnet_jax.main import main
from coatnet_jax.model_table import describe


def images(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def macs(function, *shape):
    return count_macs(function, images(*shape))[0]


def conv(x, kernel, *, groups=1, stride=1):
    dimensions = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=dimensions,
        feature_group_count=groups,
    )


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x.reshape(2, -1) @ jnp.ones((8 * 6 * 4, 5)), 2 * 8 * 6 * 4 * 5),
        (lambda x: jnp.einsum("bhwc,bHWc->bhwHW", x, x), 2 * (8 * 6) ** 2 * 4),
        (lambda x: conv(x, jnp.ones((3, 3, 4, 7))), 2 * 8 * 6 * 9 * 4 * 7),
        (lambda x: conv(x, jnp.ones((5, 3, 4, 7)), stride=2), 2 * 4 * 3 * 15 * 4 * 7),
        (lambda x: conv(x, jnp.ones((3, 3, 2, 6)), groups=2), 2 * 8 * 6 * 9 * 2 * 6),
        (lambda x: depthwise_conv(x, jnp.ones((5, 5, 4)), stride=2), 2 * 4 * 3 * 25 * 4),
        (lambda x: jax.nn.gelu(x) + x.mean(), 0),
        # Without a part of the images in it, a product is done once for all of them.
        (lambda x: x + (jnp.ones((4, 9)) @ jnp.ones((9, 4))).sum(), 0),
    ],
)
def test_products_and_convolutions_are_counted_by_hand(function, expected):
    assert macs(function, 2, 8, 6, 4) == expected
    assert macs(jax.jit(function), 2, 8, 6, 4) == expected
    assert macs(jax.checkpoint(function), 2, 8, 6, 4) == expected


def test_loops_count_as_often_as_they_turn():
    weights, table = jnp.ones((5, 4, 4)), jnp.ones((5, 3, 3))

    def scanned(x):
        body = lambda x, w: (x @ w[0] + (w[1] @ w[1]).sum(), None)  # noqa: E731
        return lax.scan(body, x, (weights, table))[0]

    assert macs(scanned, 2, 4) == 5 * 2 * 4 * 4
    branches = lambda x: lax.cond(x.sum() > 0, lambda x: x @ x, lambda x: x, x)  # noqa: E731
    assert macs(branches, 4, 4) == 64
    with pytest.raises(ValueError, match="cannot count a while loop"):
        macs(lambda x: lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x), 4, 4)


def test_tiny_coatnet_is_counted_by_hand():
    """Stem, two MBConv, two transformer blocks at 32 px: maps of 16, 8, 4, 2 and 1 pixel."""
    model = CoAtNet(CoAtNetConfig((4, 6, 8, 12, 16), (1, 1, 1, 1, 1), head_dim=4))
    counted, _ = count_macs(
        lambda x: model.init_with_output(jax.random.key(0), x, train=False), images(1, 32, 32, 3)
    )

    def mbconv(side, c, d):
        gate = 2 * 4 * d * (d // 4)
        narrow = (side // 2) ** 2
        return narrow * (c * d + 9 * 4 * d + 4 * d * d) + side**2 * c * 4 * d + gate

    def transformer(side, c, d):
        tokens = (side // 2) ** 2
        return tokens * (c * d + 3 * c * d + d * d + 8 * d * d) + 2 * tokens**2 * d

    blocks = mbconv(16, 4, 6) + mbconv(8, 6, 8) + transformer(4, 8, 12) + transformer(2, 12, 16)
    assert counted == 16 * 16 * 27 * 4 + blocks


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("coatnet_0", 4.2, 4.6),  # the paper's Table 3, without and with the DConv stem
        ("resnet50", 4.08, 4.12),  # timm: 4.11
        ("mobilenet_v2", 0.295, 0.32),  # the paper's Table 4: 0.300
        ("efficientnet_b0", 0.38, 0.40),  # the paper's Table 2: 0.39
        ("vit_s16", 4.55, 4.65),  # DeiT: 4.6, attention products among them
    ],
)
def test_published_counts_are_met(name, least, most):
    row = describe(name, image_size=224)
    assert least <= row["multiply-adds, G"] <= most
    assert "arXiv" in row["source"]


def test_table_lists_sizes_that_do_not_fit_below_it(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["models", "--image-size", "36", "simple_cnn", "vit_s16"])
    printed = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0
    assert printed[2].startswith("| simple_cnn |") and printed[3].startswith("| vit_s16    |")
    assert "vit_s16: ViT cuts images into patches of 16x16" in printed[-1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["resnet51"], "no backbone is called 'resnet51'; near: resnet50"),
        (["--image-size", "8", "resnet18"], "8x8 is too small: ResNet needs at least 32x32"),
        (["--image-size", "0", "resnet18"], "0x0 is too small"),
    ],
)
def test_table_is_refused_in_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["models", *argv])
    error = capsys.readouterr().err
    assert ended.value.code == 1 and message in error and error.count("\n") == 1

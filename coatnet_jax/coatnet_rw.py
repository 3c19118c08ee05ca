"""timm's own CoAtNets (`_rw`, `rmlp`, `bn`), for which ImageNet weights exist.

They have the paper's plan and other details: MBConv expands its input's width, convolutions take
SiLU, attention is as wide as its input and widened on the way out, positions may be told by a small
network (as in Swin V2, arXiv 2111.09883) and the head has no hidden layer. Which model has which
detail is a fact of the weights, taken from timm 1.0.31 `maxxvit.py`; tests hold the logits of each
against timm's. Module names are those of `coatnet`.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from coatnet_jax.batchnorm import BatchNorm, gelu, silu
from coatnet_jax.coatnet import (
    EXPANSION,
    CoAtNetConfig,
    Dense,
    DepthwiseConv,
    DropPath,
    RelativeAttention,
    SqueezeExcite,
    conv_init,
    dense_init,
    pool2x2,
)
from coatnet_jax.conv import Conv3x3


@dataclasses.dataclass(frozen=True)
class RWConfig(CoAtNetConfig):
    """Sizes, and the details in which these models differ from each other.

    Attributes:
      stem_width: of the stem's first convolution; the second has `widths[0]`.
      pool: how shortcuts and the input of attention are halved, by 'mean' of 2x2 or 'max' of 3x3.
      early_pool: MBConv is halved by means before its expansion, not in the depthwise convolution.
      pre_norm_silu: SiLU follows MBConv's first norm.
      conv_bias: MBConv's last convolution and shortcut have biases.
      se_early: squeeze-and-excitation comes before the norm of the depthwise convolution.
      se_activation: in squeeze-and-excitation, 'silu' or 'relu'.
      shortcut_bias: the shortcut of a transformer block has a bias.
      norm: of the transformer blocks and of the last map, 'layer' or 'batch'.
      layer_scale: both branches of a transformer block are scaled, channel by channel.
      position_mlp: width of the network that gives the relative biases; 0: they lie in a table.
    """

    stem_width: int = 32
    pool: str = "mean"
    early_pool: bool = False
    pre_norm_silu: bool = True
    conv_bias: bool = False
    se_early: bool = False
    se_activation: str = "relu"
    shortcut_bias: bool = True
    norm: str = "layer"
    layer_scale: bool = False
    position_mlp: int = 0

    def parts(self) -> tuple[Callable, Callable, Callable, Callable]:
        """The stem, the block of stages 1 and 2, that of 3 and 4, and what makes features."""
        return (
            functools.partial(RWStem, self),
            functools.partial(RWMBConv, config=self),
            functools.partial(RWTransformer, config=self),
            functools.partial(mean_of_normed, kind=self.norm),
        )


def _variants() -> dict[str, RWConfig]:
    nano = functools.partial(
        RWConfig,
        (64, 64, 128, 256, 512),
        (2, 3, 4, 6, 3),
        pre_norm_silu=False,
        conv_bias=True,
        se_activation="silu",
    )
    base = functools.partial(RWConfig, (64, 96, 192, 384, 768))
    small, deep = (2, 2, 3, 7, 2), (2, 2, 6, 14, 2)
    first = {"se_early": True, "shortcut_bias": False}  # details of those that were trained first
    wide = functools.partial(
        RWConfig, (128, 128, 256, 512, 1024), deep, stem_width=64, se_activation="silu"
    )
    return {
        "coatnet_nano_rw": nano(early_pool=True),
        "coatnet_0_rw": base(small, early_pool=True, **first),
        "coatnet_1_rw": base(deep, **first),
        "coatnet_2_rw": wide(),
        "coatnet_3_rw": RWConfig(
            (192, 192, 384, 768, 1536),
            deep,
            stem_width=96,
            se_activation="silu",
            layer_scale=True,
        ),
        "coatnet_bn_0_rw": base(small, norm="batch", **first),
        "coatnet_rmlp_nano_rw": nano(position_mlp=384),
        "coatnet_rmlp_1_rw": base(deep, early_pool=True, pool="max", position_mlp=384, **first),
        "coatnet_rmlp_1_rw2": base(deep, position_mlp=512),
        "coatnet_rmlp_2_rw": wide(layer_scale=True, position_mlp=512),
    }


RW_VARIANTS = _variants()


def mean_of_normed(x: Float[Array, "b h w c"], train: bool, *, kind: str) -> Float[Array, "b c"]:
    """The last map normed, then its mean; called inside a module, which gets its `norm`."""
    return _norm(kind, x, train, dtype=jnp.float32, name="norm").mean((1, 2))


class RWStem(nn.Module):
    """Two 3x3 convolutions, the first at stride 2, with BN and SiLU between them."""

    config: RWConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h2 w2 d"]:
        conv = functools.partial(Conv3x3, dtype=self.dtype, kernel_init=conv_init)
        x = conv(self.config.stem_width, stride=2, name="conv1")(x)
        x = silu(BatchNorm(name="norm1")(x, train))
        return conv(self.config.widths[0], stride=1, name="conv2")(x)


class RWMBConv(nn.Module):
    """Pre-norm inverted bottleneck with squeeze-and-excitation; expands its input's width."""

    width: int
    stride: int
    drop_path: float
    dtype: jnp.dtype
    config: RWConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h2 w2 d"]:
        config, inner = self.config, EXPANSION * x.shape[-1]
        dense = functools.partial(Dense, dtype=self.dtype, kernel_init=conv_init)
        gate = SqueezeExcite(inner // 4, self.dtype, getattr(nn, config.se_activation), name="se")

        shortcut = _halve(x, config.pool) if self.stride == 2 else x
        if x.shape[-1] != self.width:
            shortcut = dense(self.width, use_bias=config.conv_bias, name="shortcut")(shortcut)

        x = BatchNorm(name="pre_norm")(x, train)
        x = silu(x) if config.pre_norm_silu else x
        early = self.stride == 2 and config.early_pool
        x = pool2x2(x) if early else x
        x = dense(inner, use_bias=False, name="expand")(x)
        x = silu(BatchNorm(name="norm1")(x, train))
        x = DepthwiseConv(1 if early else self.stride, dtype=self.dtype, name="depthwise")(x)
        x = gate(x) if config.se_early else x
        x = silu(BatchNorm(name="norm2")(x, train))
        x = x if config.se_early else gate(x)
        x = dense(self.width, use_bias=config.conv_bias, name="project")(x)
        return shortcut + DropPath(self.drop_path)(x, train)


class RWTransformer(nn.Module):
    """Pre-norm relative attention, then a feed-forward layer; a stride-2 one pools first."""

    width: int
    stride: int
    drop_path: float
    dtype: jnp.dtype
    config: RWConfig
    implementation: str = "xla"

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h2 w2 d"]:
        config = self.config
        dense = functools.partial(Dense, dtype=self.dtype, kernel_init=dense_init)
        norm = functools.partial(_norm, config.norm, train=train, dtype=self.dtype)
        attention = RelativeAttention
        if config.position_mlp:
            attention = functools.partial(MLPRelativeAttention, hidden=config.position_mlp)

        shortcut, y = x, norm(x, name="norm1")
        if self.stride == 2:
            shortcut, y = _halve(x, config.pool), _halve(y, config.pool)
        if x.shape[-1] != self.width:
            shortcut = dense(self.width, use_bias=config.shortcut_bias, name="shortcut")(shortcut)
        y = attention(
            self.width,
            config.head_dim,
            self.dtype,
            self.implementation,
            inner=x.shape[-1],
            name="attention",
        )(y)
        y = LayerScale(name="layer_scale1")(y) if config.layer_scale else y
        x = shortcut + DropPath(self.drop_path)(y, train)

        y = dense(EXPANSION * self.width, name="mlp1")(norm(x, name="norm2"))
        y = dense(self.width, name="mlp2")(gelu(y))
        y = LayerScale(name="layer_scale2")(y) if config.layer_scale else y
        return x + DropPath(self.drop_path)(y, train)


class MLPRelativeAttention(RelativeAttention):
    """Relative attention whose biases a small network computes from the offset of two tokens.

    It takes sign(d) log(1 + |d|) of both distances d in tokens, so it answers for any image size.
    timm drops an eighth of the network's hidden layer in training, which is not done here.
    """

    hidden: int = 512

    def _table(self, h, w, heads):
        dense = functools.partial(nn.Dense, kernel_init=dense_init)
        x = nn.relu(dense(self.hidden, name="relative_bias_hidden")(log_offsets(h, w)))
        return dense(heads, name="relative_bias_out")(x)


def log_offsets(h: int, w: int) -> Float[np.ndarray, "offsets 2"]:
    """sign(d) log(1 + |d|) of all offsets of two of h x w tokens, in the order of a table."""
    rows, columns = np.arange(1 - h, h), np.arange(1 - w, w)
    offsets = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2)
    return (np.sign(offsets) * np.log1p(np.abs(offsets))).astype(np.float32)


class LayerScale(nn.Module):
    """Multiplies every channel by its own learned scale, at first one millionth."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        scale = self.param("scale", nn.initializers.constant(1e-6), (x.shape[-1],))
        return x * scale.astype(x.dtype)


def _norm(kind, x, train, *, dtype, name):
    if kind == "batch":
        return BatchNorm(epsilon=1e-6, name=name)(x, train)
    return nn.LayerNorm(epsilon=1e-6, dtype=dtype, name=name)(x)


def _halve(x, kind):
    """Half the rows and columns, rounded up, as means of 2x2 or maxima of 3x3 pixels."""
    if kind == "mean":
        return pool2x2(x)
    return nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))

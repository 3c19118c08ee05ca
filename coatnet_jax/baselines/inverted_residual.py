"""MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381, Table 2) and EfficientNet-B0 (Tan and Le
2019, arXiv 1905.11946, Table 1): both are stacks of inverted residuals.

The papers' seven stages are joined to four by the size of the map, so that a stage begins where
the map is halved; the last 1x1 convolution is the last block of the last stage.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from coatnet_jax.batchnorm import BatchNorm
from coatnet_jax.coatnet import (
    Dense,
    DepthwiseConv,
    DropPath,
    SqueezeExcite,
    check_images,
    conv_init,
)
from coatnet_jax.conv import Conv3x3

SMALLEST_IMAGE = 32
LAST_WIDTH = 1280


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the papers' tables: `depth` blocks, of which the first may have stride 2."""

    expansion: int
    width: int
    depth: int
    stride: int
    side: int = 3  # of the depthwise kernel


@dataclasses.dataclass(frozen=True)
class InvertedResidualConfig:
    """The rows of each of the four stages, the activation, and whether blocks are gated."""

    stem: int
    stages: tuple[tuple[Row, ...], ...]
    activation: Callable
    squeeze_excite: bool


VARIANTS = {
    "mobilenet_v2": InvertedResidualConfig(
        stem=32,
        stages=(
            (Row(1, 16, 1, 1), Row(6, 24, 2, 2)),
            (Row(6, 32, 3, 2),),
            (Row(6, 64, 4, 2), Row(6, 96, 3, 1)),
            (Row(6, 160, 3, 2), Row(6, 320, 1, 1)),
        ),
        activation=nn.relu6,
        squeeze_excite=False,
    ),
    "efficientnet_b0": InvertedResidualConfig(
        stem=32,
        stages=(
            (Row(1, 16, 1, 1), Row(6, 24, 2, 2)),
            (Row(6, 40, 2, 2, side=5),),
            (Row(6, 80, 3, 2), Row(6, 112, 3, 1, side=5)),
            (Row(6, 192, 4, 2, side=5), Row(6, 320, 1, 1)),
        ),
        activation=nn.silu,
        squeeze_excite=True,
    ),
}


class InvertedResidualNet(nn.Module):
    """Images to the mean of the last feature map; attributes as in `CoAtNet`."""

    config: InvertedResidualConfig
    drop_path: float = 0.0
    dtype: str = "float32"
    remat: bool = False
    frozen_below: int = 0

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w 3"], *, train: bool, return_map: bool = False
    ) -> Float[Array, "b 1280"] | tuple[Float[Array, "b 1280"], Float[Array, "b h32 w32 1280"]]:
        """Returns float32 features [b, 1280], and with `return_map` also the last map.

        Any height and width of at least 32 will do; raises ValueError for anything else.
        """
        model = "MobileNet or EfficientNet"
        check_images(images, self.dtype, model=model, smallest=SMALLEST_IMAGE)
        config, dtype = self.config, jnp.dtype(self.dtype)
        depth = sum(row.depth for stage in config.stages for row in stage)
        rates = iter(np.linspace(0.0, self.drop_path, depth).tolist())
        block = nn.remat(InvertedResidual, static_argnums=(2,)) if self.remat else InvertedResidual

        x = images.astype(dtype)
        x = Stem(config, dtype, name="stem")(x, train and self.frozen_below == 0)
        for stage, rows in enumerate(config.stages, start=1):
            training = train and stage >= self.frozen_below
            blocks = [(row, n) for row in rows for n in range(row.depth)]
            for number, (row, n) in enumerate(blocks):
                x = block(
                    config,
                    row,
                    stride=row.stride if n == 0 else 1,
                    drop_path=next(rates),
                    dtype=dtype,
                    name=f"stage{stage}_block{number}",
                )(x, training)
        x = LastConv(config, dtype, name=f"stage{stage}_block{len(blocks)}")(x, training)

        x = x.astype(jnp.float32)
        features = x.mean((1, 2))
        return (features, x) if return_map else features


class Stem(nn.Module):
    """3x3 convolution at stride 2, BN and the activation."""

    config: InvertedResidualConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h2 w2 d"]:
        width = self.config.stem
        x = Conv3x3(width, stride=2, dtype=self.dtype, kernel_init=conv_init, name="conv")(x)
        return self.config.activation(BatchNorm(name="norm")(x, train))


class InvertedResidual(nn.Module):
    """1x1 to a wider map, depthwise, gate, 1x1 to a narrow one; no activation after the last BN.

    There is no widening where the expansion is 1, and a shortcut only where shapes agree. The
    gate's hidden layer has a quarter of the width that the block is given.
    """

    config: InvertedResidualConfig
    row: Row
    stride: int
    drop_path: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h2 w2 d"]:
        row, activation, c = self.row, self.config.activation, x.shape[-1]
        dense = functools.partial(Dense, use_bias=False, dtype=self.dtype, kernel_init=conv_init)
        shortcut = x
        if row.expansion != 1:
            x = dense(row.expansion * c, name="expand")(x)
            x = activation(BatchNorm(name="expand_norm")(x, train))
        x = DepthwiseConv(self.stride, dtype=self.dtype, side=row.side, name="depthwise")(x)
        x = activation(BatchNorm(name="depthwise_norm")(x, train))
        if self.config.squeeze_excite:
            x = SqueezeExcite(c // 4, dtype=self.dtype, name="se")(x)
        x = BatchNorm(name="project_norm")(dense(row.width, name="project")(x), train)
        if self.stride == 2 or c != row.width:
            return x
        return shortcut + DropPath(self.drop_path)(x, train)


class LastConv(nn.Module):
    """1x1 convolution to 1280 channels, BN and the activation."""

    config: InvertedResidualConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w 1280"]:
        dense = Dense(
            LAST_WIDTH, use_bias=False, dtype=self.dtype, kernel_init=conv_init, name="conv"
        )
        return self.config.activation(BatchNorm(name="norm")(dense(x), train))

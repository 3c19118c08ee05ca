"""ResNet-18, -34 and -50 (He et al. 2015, arXiv 1512.03385, Table 1).

The stride of a bottleneck is in its 3x3 convolution, as torchvision and timm have it; the paper
has it in the first 1x1.
"""

import dataclasses
import functools

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from coatnet_jax.batchnorm import BatchNorm
from coatnet_jax.coatnet import Dense, DropPath, check_images, conv_init
from coatnet_jax.conv import Conv3x3

SMALLEST_IMAGE = 32


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """Blocks of each stage, and whether they are bottlenecks, which are four times as wide."""

    depths: tuple[int, int, int, int]
    bottleneck: bool = False


VARIANTS = {
    "resnet18": ResNetConfig((2, 2, 2, 2)),
    "resnet34": ResNetConfig((3, 4, 6, 3)),
    "resnet50": ResNetConfig((3, 4, 6, 3), bottleneck=True),
}


class ResNet(nn.Module):
    """Images to the mean of the last feature map; attributes as in `CoAtNet`."""

    config: ResNetConfig
    drop_path: float = 0.0
    dtype: str = "float32"
    remat: bool = False
    frozen_below: int = 0

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w 3"], *, train: bool, return_map: bool = False
    ) -> Float[Array, "b d"] | tuple[Float[Array, "b d"], Float[Array, "b h32 w32 d"]]:
        """Returns float32 features [b, D], D 512 or 2048, and with `return_map` the last map.

        Any height and width of at least 32 will do; raises ValueError for anything else.
        """
        check_images(images, self.dtype, model="ResNet", smallest=SMALLEST_IMAGE)
        dtype = jnp.dtype(self.dtype)
        rates = iter(np.linspace(0.0, self.drop_path, sum(self.config.depths)).tolist())
        block = Bottleneck if self.config.bottleneck else BasicBlock
        if self.remat:
            block = nn.remat(block, static_argnums=(2,))

        x = Stem(dtype, name="stem")(images.astype(dtype), train and self.frozen_below == 0)
        for stage, depth in enumerate(self.config.depths, start=1):
            for n in range(depth):
                x = block(
                    64 * 2 ** (stage - 1),
                    stride=2 if n == 0 and stage > 1 else 1,
                    drop_path=next(rates),
                    dtype=dtype,
                    name=f"stage{stage}_block{n}",
                )(x, train and stage >= self.frozen_below)

        x = x.astype(jnp.float32)
        features = x.mean((1, 2))
        return (features, x) if return_map else features


class Stem(nn.Module):
    """7x7 convolution at stride 2, BN and ReLU, and the largest of 3x3 pixels at stride 2."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h4 w4 64"]:
        x = nn.Conv(
            64,
            (7, 7),
            strides=2,
            padding=3,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=conv_init,
            name="conv",
        )(x)
        return max_pool3x3(nn.relu(BatchNorm(name="norm")(x, train)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, each with BN, beside a shortcut; ReLU after the sum."""

    width: int
    stride: int
    drop_path: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h2 w2 d"]:
        conv = functools.partial(Conv3x3, self.width, dtype=self.dtype, kernel_init=conv_init)
        shortcut = Shortcut(self.width, self.stride, self.dtype, name="shortcut")(x, train)
        x = conv(stride=self.stride, name="conv1")(x)
        x = nn.relu(BatchNorm(name="norm1")(x, train))
        x = BatchNorm(name="norm2")(conv(stride=1, name="conv2")(x), train)
        return nn.relu(shortcut + DropPath(self.drop_path)(x, train))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution, each with BN, beside a shortcut; ReLU after the sum."""

    width: int  # of the 3x3 convolution
    stride: int
    drop_path: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h2 w2 d"]:
        dense = functools.partial(Dense, use_bias=False, dtype=self.dtype, kernel_init=conv_init)
        shortcut = Shortcut(4 * self.width, self.stride, self.dtype, name="shortcut")(x, train)
        x = dense(self.width, name="conv1")(x)
        x = nn.relu(BatchNorm(name="norm1")(x, train))
        x = Conv3x3(self.width, self.stride, self.dtype, conv_init, name="conv2")(x)
        x = nn.relu(BatchNorm(name="norm2")(x, train))
        x = BatchNorm(name="norm3")(dense(4 * self.width, name="conv3")(x), train)
        return nn.relu(shortcut + DropPath(self.drop_path)(x, train))


class Shortcut(nn.Module):
    """The input itself, or where shapes differ every stride-th pixel through a 1x1 and BN."""

    width: int
    stride: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h2 w2 d"]:
        if self.stride == 1 and x.shape[-1] == self.width:
            return x
        dense = Dense(
            self.width, use_bias=False, dtype=self.dtype, kernel_init=conv_init, name="conv"
        )
        x = dense(x[:, :: self.stride, :: self.stride])
        return BatchNorm(name="norm")(x, train)


def max_pool3x3(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Largest of 3x3 pixels at stride 2, of what is there at the edge: first of rows, then columns.

    By slices, whose gradient takes a tenth of the time of XLA's own pooling on a CPU.
    """
    for axis in (1, 2):
        around = [(1, 1) if a == axis else (0, 0) for a in range(4)]
        size = x.shape[axis]
        x = jnp.pad(x, around, constant_values=-jnp.inf)
        x = functools.reduce(
            jnp.maximum,
            [lax.slice_in_dim(x, n, n + 2 * ((size - 1) // 2) + 1, 2, axis) for n in range(3)],
        )
    return x

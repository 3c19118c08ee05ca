"""The small CNN of many age estimation tutorials: four convolutions with pooling, two dense layers.

There is no paper. The first dense layer is here and gives the features; the second is the hidden
layer of the age head. With that head the whole has 0.39 M parameters at every image size.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from coatnet_jax.coatnet import check_images

WIDTHS = (16, 32, 64, 128)
FEATURES = 128
CELLS = 4  # the last map is averaged to 4x4 before it is flattened
SMALLEST_IMAGE = 2 ** len(WIDTHS)

he_init = nn.initializers.he_normal()


class SimpleCNN(nn.Module):
    """Images to the ReLU of a dense layer over the last map, averaged to 4x4 cells.

    The tutorials flatten the map itself, which ties the weights to one image size; at 64 px the
    map is 4x4 and this is the same.

    Attributes:
      drop_path: taken for the configs' sake and without effect: there is no residual branch.
      dtype: of the computation, 'float32' or 'bfloat16'; features are float32 in either.
      frozen_below: likewise without effect, as nothing here differs between training and
        evaluation. Freezing of parameters is the optimizer's, and its stages are the convolutions.
    """

    drop_path: float = 0.0
    dtype: str = "float32"
    frozen_below: int = 0

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w 3"], *, train: bool, return_map: bool = False
    ) -> Float[Array, "b 128"] | tuple[Float[Array, "b 128"], Float[Array, "b h16 w16 128"]]:
        """Returns float32 features [b, 128], and with `return_map` the last convolution's map.

        Any height and width of at least 16 will do; raises ValueError for anything else.
        """
        check_images(images, self.dtype, model="simple_cnn", smallest=SMALLEST_IMAGE)
        dtype = jnp.dtype(self.dtype)
        x = images.astype(dtype)
        for stage, width in enumerate(WIDTHS, start=1):
            x = ConvBlock(width, dtype, name=f"stage{stage}_block0")(x)
        cells = mean_cells(x).reshape(x.shape[0], -1)
        last = nn.Dense(FEATURES, dtype=dtype, kernel_init=he_init, name="stage4_block1")
        features, x = nn.relu(last(cells)).astype(jnp.float32), x.astype(jnp.float32)
        return (features, x) if return_map else features


class ConvBlock(nn.Module):
    """3x3 convolution, ReLU, and the largest of 2x2 pixels (an odd last row or column is left)."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        conv = nn.Conv(self.width, (3, 3), dtype=self.dtype, kernel_init=he_init, name="conv")
        x = nn.relu(conv(x))
        _, h, w, _ = x.shape
        x = x[:, : h // 2 * 2, : w // 2 * 2]
        # By slices, whose gradient takes a fraction of the time of XLA's own pooling on a CPU.
        x = jnp.maximum(x[:, ::2], x[:, 1::2])
        return jnp.maximum(x[:, :, ::2], x[:, :, 1::2])


def mean_cells(x: Float[Array, "b h w c"]) -> Float[Array, "b 4 4 c"]:
    """Means over 4x4 cells, which overlap by a pixel where the size is no multiple of 4."""
    rows, columns = (_cells(size).astype(x.dtype) for size in x.shape[1:3])
    return jnp.einsum("ih,jw,bhwc->bijc", rows, columns, x)


def _cells(size):
    """Matrix [4, size]: cell i averages the pixels from floor(i size/4) to ceil((i+1) size/4)."""
    cells = np.zeros((CELLS, size), np.float32)
    for i in range(CELLS):
        first, end = i * size // CELLS, -(-(i + 1) * size // CELLS)
        cells[i, first:end] = 1 / (end - first)
    return jnp.asarray(cells)

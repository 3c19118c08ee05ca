"""3x3 convolution of channels with each other, in forms that suit the CPU.

XLA computes the weight gradient of a convolution as a convolution over the batch, for which it
transposes both images and gradients: on a CPU that costs several times the arithmetic. Here it
is one matrix product, with the patches that the kernel met or, at stride 1, with shifted copies.
Small maps and images are products with patches forwards and backwards: where the result is 2x2
pixels, XLA's own takes dozens of times as long (`benchmarks/conv3x3.py`).
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from coatnet_jax.products import product, weight_gradient

SMALL_MAP = 4  # pixels of a side of the result; up to there a product is the faster form
FEW_CHANNELS = 4  # of the input, as an image has: a product is up to four times as fast


class Conv3x3(nn.Module):
    """3x3 convolution without bias, padded by one on each side; parameter `kernel` [3, 3, c, d]."""

    width: int
    stride: int
    dtype: jnp.dtype
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        kernel = self.param("kernel", self.kernel_init, (3, 3, x.shape[-1], self.width))
        return conv3x3(x, kernel.astype(self.dtype), stride=self.stride)


def conv3x3(
    x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c d"], *, stride: int = 1
) -> Float[Array, "b h2 w2 d"]:
    """Convolves, padded by one zero on each side, to ceil(h / stride) x ceil(w / stride)."""
    if jax.default_backend() != "cpu":
        return _lax_conv(x, kernel, stride)
    small = -(-max(x.shape[1:3]) // stride) <= SMALL_MAP
    if small or x.shape[-1] <= FEW_CHANNELS:
        return _product_with_patches(x, kernel, stride)
    return _conv(x, kernel, stride)


def _lax_conv(x, kernel, stride):
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _pad(x, *, rows, columns):
    # The barrier keeps XLA from padding anew for each of the slices.
    widths = ((0, 0), (rows, rows), (columns, columns), (0, 0))
    return lax.optimization_barrier(jnp.pad(x, widths))


def _patches(x, stride):
    """The pixels that the nine places of the kernel meet, side by side: [b, h2, w2, 9c]."""
    last = tuple(size - (size - 1) % stride for size in x.shape[1:3])
    padded = _pad(x, rows=1, columns=1)
    taps = [
        padded[:, i : i + last[0] : stride, j : j + last[1] : stride]
        for i in range(3)
        for j in range(3)
    ]
    return jnp.concatenate(taps, axis=-1)


def _product_with_patches(x, kernel, stride):
    patches = _patches(x, stride)
    d = kernel.shape[-1]
    y = product(patches.reshape(-1, patches.shape[-1]), kernel.reshape(-1, d))
    return y.reshape(*patches.shape[:3], d)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv(x, kernel, stride):
    return _lax_conv(x, kernel, stride)


def _forward(x, kernel, stride):
    return _lax_conv(x, kernel, stride), (x, kernel)


def _backward(stride, saved, dy):
    x, kernel = saved
    _, input_gradient = jax.vjp(lambda x: _lax_conv(x, kernel, stride), x)
    dkernel = _kernel_gradient(x, dy) if stride == 1 else _strided_kernel_gradient(x, dy, stride)
    return *input_gradient(dy), dkernel.reshape(kernel.shape).astype(kernel.dtype)


_conv.defvjp(_forward, _backward)


def _strided_kernel_gradient(x, dy, stride):
    patches = _patches(x, stride)
    return weight_gradient(
        patches.reshape(-1, patches.shape[-1]), dy.reshape(-1, dy.shape[-1]), dtype=jnp.float32
    )


def _kernel_gradient(x, dy):
    """The gradient at stride 1 from a third of the copies that patches are: float32 [3, 3, c, d].

    Pixel (r, s) of dy met x at (r + i - 1, s + j - 1) by tap (i, j). Three copies of x, shifted
    along its rows, against three of dy, shifted against its columns, make the nine pairs.
    """
    w, c, d = x.shape[2], x.shape[-1], dy.shape[-1]
    x, dy = _pad(x, rows=1, columns=1), _pad(dy, rows=2, columns=0)
    rows = x.shape[1]
    shifted_x = jnp.stack([x[:, :, j : j + w] for j in range(3)], axis=3)
    shifted_dy = jnp.stack([dy[:, 2 - i : 2 - i + rows] for i in range(3)], axis=3)
    pairs = weight_gradient(
        shifted_x.reshape(-1, 3 * c), shifted_dy.reshape(-1, 3 * d), dtype=jnp.float32
    )
    return pairs.reshape(3, c, 3, d).transpose(2, 0, 1, 3)

"""3x3 convolution of channels with each other, in forms that suit the CPU.

XLA computes the weight gradient of a convolution as a convolution over the batch, for which it
transposes both images and gradients: on a CPU that costs several times the arithmetic. Here it
is one matrix product with the patches that the kernel met. Small maps are such products forwards
and backwards: where the result is 2x2 pixels, XLA's own takes dozens of times as long
(`benchmarks/conv3x3.py`).
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from coatnet_jax.products import product, weight_gradient

SMALL_MAP = 4  # pixels of a side of the result; up to there a product is the faster form


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
    if -(-max(x.shape[1:3]) // stride) <= SMALL_MAP:
        return _product_with_patches(x, kernel, stride)
    return _conv_with_patches(x, kernel, stride)


def _lax_conv(x, kernel, stride):
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _patches(x, stride):
    """The pixels that the nine places of the kernel meet, side by side: [b, h2, w2, 9c]."""
    last = tuple(size - (size - 1) % stride for size in x.shape[1:3])
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
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
def _conv_with_patches(x, kernel, stride):
    return _lax_conv(x, kernel, stride)


def _forward(x, kernel, stride):
    return _lax_conv(x, kernel, stride), (x, kernel)


def _backward(stride, saved, dy):
    x, kernel = saved
    _, input_gradient = jax.vjp(lambda x: _lax_conv(x, kernel, stride), x)
    patches = _patches(x, stride)
    dkernel = weight_gradient(
        patches.reshape(-1, patches.shape[-1]), dy.reshape(-1, dy.shape[-1]), dtype=jnp.float32
    )
    return *input_gradient(dy), dkernel.reshape(kernel.shape).astype(kernel.dtype)


_conv_with_patches.defvjp(_forward, _backward)

"""Batch normalisation with the GELU that follows it, and a backward pass of few memory passes.

Automatic differentiation of BN and GELU keeps four arrays of the size of the input and lets XLA
merge the long chain of their derivatives into the transposition for the next matrix product,
which on a CPU is ten times slower than the product. Here only the input is kept.
Batch normalisation: Ioffe and Szegedy, arXiv 1502.03167; GELU: arXiv 1606.08415.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

MOMENTUM = 0.9  # the share of the running statistics that a step keeps


class BatchNorm(nn.Module):
    """BatchNorm over all axes but the last, with timm's epsilon, then GELU if asked for.

    Parameters `scale`, `bias` and statistics `mean`, `var` are float32 and named as in Flax's
    own; the output has the dtype of the input. Over a sharded batch under jit the statistics are
    those of the global batch.
    """

    gelu: bool = False
    momentum: float = MOMENTUM
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "*batch c"], train: bool) -> Float[Array, "*batch c"]:
        c = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (c,))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        mean = self.variable("batch_stats", "mean", jnp.zeros, (c,))
        var = self.variable("batch_stats", "var", jnp.ones, (c,))
        if not train:
            factor = scale * lax.rsqrt(var.value + self.epsilon)
            return _affine(x, factor, bias - mean.value * factor, self.gelu)
        y, (batch_mean, batch_var) = normalise(x, scale, bias, self.epsilon, self.gelu)
        if not self.is_initializing():
            keep = self.momentum
            mean.value = keep * mean.value + (1 - keep) * batch_mean
            var.value = keep * var.value + (1 - keep) * batch_var
        return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalise(
    x: Float[Array, "*batch c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    epsilon: float,
    with_gelu: bool,
) -> tuple[Float[Array, "*batch c"], tuple[Float[Array, " c"], Float[Array, " c"]]]:
    """Returns the normalised (and GELU'd) x, and its mean and biased variance.

    The statistics are for the running averages: gradients do not flow back through them.
    """
    axes = tuple(range(x.ndim - 1))
    wide = x.astype(jnp.float32)
    mean = wide.mean(axes)
    var = jnp.maximum(jnp.square(wide).mean(axes) - jnp.square(mean), 0)
    factor = scale * lax.rsqrt(var + epsilon)
    return _affine(x, factor, bias - mean * factor, with_gelu), (mean, var)


def _affine(x, factor, offset, with_gelu):
    y = x.astype(jnp.float32) * factor + offset
    return (_gelu(y) if with_gelu else y).astype(x.dtype)


def _forward(x, scale, bias, epsilon, with_gelu):
    y, (mean, var) = normalise(x, scale, bias, epsilon, with_gelu)
    return (y, (mean, var)), (x, scale, bias, mean, var)


def _backward(epsilon, with_gelu, saved, cotangents):
    x, scale, bias, mean, var = saved
    dy, _ = cotangents
    axes, n = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
    inverse = lax.rsqrt(var + epsilon)
    factor = scale * inverse
    wide, g = x.astype(jnp.float32), dy.astype(jnp.float32)
    if with_gelu:
        g = g * _gelu_slope(wide * factor + (bias - mean * factor))
    # The barriers keep these passes out of the products before and after them.
    g = lax.optimization_barrier(g.astype(x.dtype))
    dbias = g.astype(jnp.float32).sum(axes)
    dscale = ((g.astype(jnp.float32) * wide).sum(axes) - mean * dbias) * inverse
    of_x = -factor * inverse * dscale / n
    dx = g * factor + wide * of_x - (factor * dbias / n + of_x * mean)
    return lax.optimization_barrier(dx.astype(x.dtype)), dscale, dbias


normalise.defvjp(_forward, _backward)


@jax.custom_vjp
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The exact GELU, x times the normal distribution function; keeps only x for its gradient."""
    return _gelu(x.astype(jnp.float32)).astype(x.dtype)


def _gelu_backward(x, dy):
    slope = _gelu_slope(x.astype(jnp.float32))
    return (lax.optimization_barrier((dy * slope).astype(x.dtype)),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


@jax.custom_vjp
def silu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """SiLU, x times its logistic function (arXiv 1702.03118); keeps only x for its gradient."""
    return (x * lax.logistic(x.astype(jnp.float32))).astype(x.dtype)


def _silu_backward(x, dy):
    gate = lax.logistic(x.astype(jnp.float32))
    slope = gate * (1 + x * (1 - gate))
    return (lax.optimization_barrier((dy * slope).astype(x.dtype)),)


silu.defvjp(lambda x: (silu(x), x), _silu_backward)


def _gelu(x):
    # Through erf: XLA's erfc, which jax.nn.gelu takes, is twice as slow on a CPU.
    return 0.5 * x * (1 + lax.erf(x * np.float32(np.sqrt(0.5))))


def _gelu_slope(x):
    density = jnp.exp(-0.5 * x * x) * np.float32(1 / np.sqrt(2 * np.pi))
    # By erf(-x) = -erf(x): the very erf of the forward pass XLA would keep until here.
    return 0.5 * (1 - lax.erf(x * -np.float32(np.sqrt(0.5)))) + x * density

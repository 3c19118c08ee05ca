"""3x3 convolution in every form against a loop over pixels, with gradients; the dtype is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coatnet_jax import conv


def by_loop(x, kernel, stride):
    """Convolution with one zero of padding, pixel by pixel in float64."""
    padded = np.pad(np.float64(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows, columns = (-(-size // stride) for size in x.shape[1:3])
    y = np.zeros((len(x), rows, columns, kernel.shape[-1]))
    for i in range(rows):
        for j in range(columns):
            met = padded[:, i * stride : i * stride + 3, j * stride : j * stride + 3]
            y[:, i, j] = np.einsum("brsc,rscd->bd", met, np.float64(kernel))
    return y


@pytest.fixture
def draw():
    rng = np.random.default_rng(0)
    return lambda *shape: rng.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 4), (9, 5), (20, 17)])
def test_conv3x3_and_its_gradients_are_those_of_a_loop(size, stride, draw):
    x, kernel = draw(2, *size, 3), draw(3, 3, 3, 4)
    y, gradients = jax.vjp(lambda *args: conv.conv3x3(*args, stride=stride), x, kernel)
    np.testing.assert_allclose(y, by_loop(x, kernel, stride), atol=1e-5)
    # The convolution is linear in both: <dy, conv(v, k)> is <dx, v>, and for the kernel alike.
    dy, vx, vk = draw(*y.shape), draw(*x.shape), draw(*kernel.shape)
    dx, dk = gradients(jnp.asarray(dy))
    assert np.vdot(dx, vx) == pytest.approx(np.vdot(dy, by_loop(vx, kernel, stride)), abs=1e-3)
    assert np.vdot(dk, vk) == pytest.approx(np.vdot(dy, by_loop(x, vk, stride)), abs=1e-3)


@pytest.mark.parametrize("side", [2, 12])
def test_bfloat16_stays_and_is_summed_in_float32(side, draw):
    x, kernel = (jnp.asarray(v, jnp.bfloat16) for v in (draw(1, side, side, 64), draw(3, 3, 64, 2)))
    y = conv.conv3x3(x, kernel)
    assert y.dtype == jnp.bfloat16
    exact = by_loop(x, kernel, 1)
    np.testing.assert_allclose(np.float64(y), exact, atol=0.004 * np.abs(exact).max())

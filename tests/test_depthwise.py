"""The shifted depthwise convolution and its gradients against lax's grouped convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from coatnet_jax import depthwise
from coatnet_jax.depthwise import auto_means, depthwise_conv

SIZES = [(8, 6), (7, 5), (2, 3), (1, 1)]


def inputs(h, w, dtype=jnp.float32, b=3, c=5, stride=1, k=3):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (b, h, w, c), dtype)
    kernel = jax.random.normal(keys[1], (k, k, c), dtype)
    dy = jax.random.normal(keys[2], (b, -(-h // stride), -(-w // stride), c), dtype)
    return x, kernel, dy


def run(x, kernel, dy, stride, implementation):
    """The output and the gradients of sum(output * dy)."""

    def conv(x, kernel):
        return depthwise_conv(x, kernel, stride=stride, implementation=implementation)

    y, gradient = jax.vjp(conv, x, kernel)
    return y, *gradient(dy)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("h, w, k", [*((*size, 3) for size in SIZES), (5, 2, 5)])
def test_shifted_matches_lax_with_gradients(h, w, k, stride):
    args = inputs(h, w, stride=stride, k=k)
    shifted, lax = (
        jax.jit(run, static_argnums=(3, 4))(*args, stride, how) for how in ("shifted", "lax")
    )
    for ours, theirs in zip(shifted, lax, strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("images, at_once", [(6, 1), (6, 4), (5, 4)])  # 1, 3 and 1 in a turn
def test_kernels_gradient_is_one_however_many_images_a_turn_takes(
    images, at_once, stride, monkeypatch
):
    x, kernel, dy = inputs(4, 4, b=images, stride=stride)
    monkeypatch.setattr(depthwise, "AT_ONCE", at_once * dy[0, 0].size)
    ours, lax = (run(x, kernel, dy, stride, how)[2] for how in ("shifted", "lax"))
    np.testing.assert_allclose(ours, lax, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
def test_bfloat16_stays_within_its_rounding_of_float32(stride):
    args = inputs(7, 6, jnp.bfloat16, stride=stride)
    ours = run(*args, stride, "shifted")
    exact = run(*(a.astype(jnp.float32) for a in args), stride, "lax")
    for value, reference in zip(ours, exact, strict=True):
        assert value.dtype == jnp.bfloat16
        error = jnp.abs(value.astype(jnp.float32) - reference).max()
        assert error < 0.03 * jnp.abs(reference).max()


def test_forward_matches_a_numpy_loop():
    x, kernel, _ = inputs(5, 4, b=2, c=3)
    padded = np.pad(np.asarray(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = np.zeros((2, 3, 2, 3), np.float32)
    for row in range(3):
        for column in range(2):
            patch = padded[:, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
            expected[:, row, column] = (patch * np.asarray(kernel)).sum((1, 2))
    np.testing.assert_allclose(
        depthwise_conv(x, kernel, stride=2, implementation="shifted"), expected, atol=1e-5
    )


@pytest.mark.parametrize("stride", [1, 2])
def test_sharded_batch_gives_the_same_without_gathering_it(stride):
    args = inputs(6, 6, b=16, stride=stride)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    by_image, copied = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    places = (by_image, copied, by_image)
    sharded = [jax.device_put(a, place) for a, place in zip(args, places, strict=True)]
    step = jax.jit(run, static_argnums=(3, 4)).lower(*sharded, stride, "shifted").compile()
    assert "all-gather" not in step.as_text()
    for ours, theirs in zip(step(*sharded), run(*args, stride, "lax"), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-5)


def test_wrong_arguments_raise():
    x, kernel, _ = inputs(4, 4)
    with pytest.raises(ValueError, match="stride must be 1 or 2, not 3"):
        depthwise_conv(x, kernel, stride=3)
    with pytest.raises(ValueError, match=r"\(3, 3, 4\), but 5 channels"):
        depthwise_conv(x, kernel[..., :4], stride=1)
    with pytest.raises(ValueError, match=r"\(2, 2, 5\), .* an odd k"):
        depthwise_conv(x, kernel[:2, :2], stride=1)
    with pytest.raises(ValueError, match="not 'cuda'"):
        depthwise_conv(x, kernel, stride=1, implementation="cuda")


def test_auto_can_be_told_what_it_means():
    x, kernel, _ = inputs(4, 4)

    def traced():
        return str(jax.make_jaxpr(lambda x: depthwise_conv(x, kernel))(x))

    outside = traced()
    with auto_means("lax"):
        assert "conv_general_dilated" in traced()
    with auto_means("shifted"):
        assert "conv_general_dilated" not in traced()
    assert traced() == outside

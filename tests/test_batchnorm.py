"""BatchNorm with GELU, and the stem's convolution, against Flax, jax.nn and lax."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coatnet_jax.batchnorm import BatchNorm, gelu, silu
from coatnet_jax.conv import Conv3x3


def exact_gelu(x):
    return jax.nn.gelu(x, approximate=False)


@pytest.fixture(scope="module")
def x():
    return 2 * jax.random.normal(jax.random.key(0), (6, 5, 4, 7)) + 1


def some_variables(module, x):
    """Variables of a BatchNorm, all of them random."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x))
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten(
        [jax.random.uniform(k, a.shape, minval=0.5) for k, a in zip(keys, leaves, strict=True)]
    )


@pytest.mark.parametrize("with_gelu", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_batchnorm_matches_flax_with_gradients_and_statistics(x, with_gelu, train):
    flax = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5)
    variables = some_variables(flax, x)
    stats = {"batch_stats": variables["batch_stats"]}
    dy = jax.random.normal(jax.random.key(2), x.shape)

    def ours(params, x):
        module = BatchNorm(gelu=with_gelu)
        return module.apply({"params": params, **stats}, x, train, mutable=["batch_stats"])

    def theirs(params, x):
        y, new = flax.apply({"params": params, **stats}, x, mutable=["batch_stats"])
        return exact_gelu(y) if with_gelu else y, new

    def run(function):
        def loss(params, x):
            y, new = function(params, x)
            return (y * dy).sum(), (y, new)

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(variables["params"], x)

    for a, b in zip(jax.tree.leaves(run(ours)), jax.tree.leaves(run(theirs)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_batchnorm_keeps_bfloat16_and_float32_statistics(x):
    module = BatchNorm(gelu=True)
    variables = module.init(jax.random.key(0), x, False)
    y, new = module.apply(variables, x.astype(jnp.bfloat16), True, mutable=["batch_stats"])
    assert y.dtype == jnp.bfloat16
    assert {a.dtype.name for a in jax.tree.leaves(new)} == {"float32"}


def test_init_leaves_the_running_statistics_alone(x):
    stats = BatchNorm().init(jax.random.key(0), x, True)["batch_stats"]
    np.testing.assert_array_equal(stats["mean"], 0)
    np.testing.assert_array_equal(stats["var"], 1)


def test_gelu_is_the_exact_one_with_its_gradient():
    x = jnp.linspace(-8, 8, 2001)
    np.testing.assert_allclose(gelu(x), exact_gelu(x), atol=2e-6)
    ours, theirs = (jax.vmap(jax.grad(f))(x) for f in (gelu, exact_gelu))
    np.testing.assert_allclose(ours, theirs, atol=2e-6)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("h, w", [(6, 8), (7, 5)])
def test_conv3x3_matches_flax_with_gradients(h, w, stride):
    x = jax.random.normal(jax.random.key(0), (2, h, w, 3))
    init = nn.initializers.normal(1.0)
    ours = Conv3x3(4, stride=stride, dtype=jnp.float32, kernel_init=init)
    theirs = nn.Conv(4, (3, 3), strides=stride, padding=1, use_bias=False)
    variables = ours.init(jax.random.key(1), x)

    def run(module):
        y, gradient = jax.vjp(module.apply, variables, x)
        return y, *gradient(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))

    for a, b in zip(jax.tree.leaves(run(ours)), jax.tree.leaves(run(theirs)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_silu_is_flaxs_with_its_gradient(x):
    dy = jax.random.normal(jax.random.key(2), x.shape)
    (y, dx), (expected, expected_dx) = (
        (f(x), jax.grad(lambda x, f=f: (f(x) * dy).sum())(x)) for f in (silu, nn.silu)
    )
    np.testing.assert_allclose(y, expected, atol=1e-6)
    np.testing.assert_allclose(dx, expected_dx, atol=1e-5)
    assert silu(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16

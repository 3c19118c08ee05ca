"""8-bit weights: how far they are from what was rounded, how coarse, and files that fit a size."""

import gzip

import numpy as np
import pytest
from safetensors.numpy import load

from coatnet_jax.quantise import STEP, coarsest, dequantise, quantise
from coatnet_jax.release_weights import FILE, load_released, save_weights


@pytest.fixture
def kernels():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return {
        "params/a/kernel": draw(128, 256) * rng.uniform(0.1, 3, 256).astype(np.float32),
        "params/b/kernel": draw(3, 3, 64, 256),
        "params/c/kernel": draw(20, 30),
        "params/a/bias": draw(20_000),
    }


def test_integers_are_the_nearest_multiples_of_a_127th_of_each_channels_largest(kernels):
    quantised = quantise(kernels, 0)
    assert sorted(quantised) == sorted([*kernels, "params/a/kernel:step", "params/b/kernel:step"])
    for name in ("params/c/kernel", "params/a/bias"):
        assert quantised[name] is kernels[name]
    for name in ("params/a/kernel", "params/b/kernel"):
        integers, steps = quantised[name], quantised[name + STEP]
        assert integers.dtype == np.int8 and integers.shape == kernels[name].shape
        for channel in (0, 100, 255):
            exact = kernels[name][..., channel].astype(np.float64)
            step = np.abs(exact).max() / 127
            np.testing.assert_allclose(steps[channel], step, rtol=1e-6)
            rounded = integers[..., channel] * step
            assert np.abs(rounded - exact).max() <= step * 0.5001
    back = dequantise(quantised)
    assert back.keys() == kernels.keys()
    for name, exact in kernels.items():
        assert back[name].dtype == np.float32
        assert np.abs(back[name] - exact).max() <= np.abs(exact).max() / 127 / 1.99


def test_steps_grow_with_the_root_of_a_kernels_size(kernels):
    quantised = quantise(kernels, coarseness=0.002)
    for name in ("params/a/kernel", "params/b/kernel"):
        exact = kernels[name].astype(np.float64).reshape(-1, 256)
        step = 0.002 * exact.size**0.5 * (exact**2).mean(0) ** 0.5
        np.testing.assert_allclose(quantised[name + STEP], step, rtol=1e-5)
        error = dequantise(quantised)[name].reshape(-1, 256) - exact
        # Of numbers rounded to multiples of a step: that step over the root of 12.
        np.testing.assert_allclose((error**2).mean(0) ** 0.5, step / 12**0.5, rtol=0.3)
    largest = max(array.size for array in kernels.values())
    assert coarsest(kernels) * largest**0.5 == pytest.approx(1)


def test_a_channel_without_weights_stays_so(kernels):
    kernel = kernels["params/a/kernel"]
    kernel[:, 3] = 0
    back = dequantise(quantise(kernels, 0.002))["params/a/kernel"]
    assert not back[:, 3].any() and back[:, 4].any()


def test_steps_that_fit_nothing_are_told():
    for arrays in (
        {"a/kernel:step": np.ones(3)},
        {"a/kernel": np.ones((2, 3), np.int8), "a/kernel:step": np.ones(2)},
        {"a/kernel": np.ones((2, 3), np.int8), "a/kernel:step": np.float32(1)},
    ):
        with pytest.raises(ValueError, match="a/kernel:step fits no array beside it"):
            dequantise(arrays)


@pytest.fixture
def variables(kernels):
    names = {"a": ("kernel", "bias"), "b": ("kernel",), "c": ("kernel",)}
    params = {
        key: {leaf: kernels[f"params/{key}/{leaf}"] for leaf in leaves}
        for key, leaves in names.items()
    }
    return {"params": params, "batch_stats": {"a": {"mean": np.arange(3, dtype=np.float32)}}}


def test_the_file_is_as_large_as_allowed_and_as_fine_as_that_lets_it(tmp_path, variables, kernels):
    errors = []
    for max_mb in (0.23, 0.2, 0.17):
        path = save_weights(tmp_path, variables, step=7, max_mb=max_mb)
        assert path.name == FILE + ".gz"
        assert 0.97 * max_mb < path.stat().st_size / 1e6 <= max_mb
        loaded, step = load_released(tmp_path)
        assert step == 7
        np.testing.assert_array_equal(loaded["params"]["a"]["bias"], kernels["params/a/bias"])
        np.testing.assert_array_equal(loaded["batch_stats"]["a"]["mean"], np.arange(3))
        kernel = kernels["params/b/kernel"]
        errors.append(np.abs(loaded["params"]["b"]["kernel"] - kernel).mean())
    assert errors == sorted(errors) and errors[-1] > 2 * errors[0] and errors[-1] < 0.2
    # Anything that reads gzip and safetensors can read it.
    arrays = load(gzip.decompress(path.read_bytes()))
    assert arrays["params/b/kernel"].dtype == np.int8


def test_integers_only_where_they_are_needed(tmp_path, variables):
    save_weights(tmp_path, variables, step=7, max_mb=0.2)
    for max_mb in (None, 0.43):
        path = save_weights(tmp_path, variables, step=8, max_mb=max_mb)
        assert [file.name for file in tmp_path.iterdir()] == [path.name] == [FILE]
        assert 0.4e6 < path.stat().st_size < 0.43e6
    assert load_released(tmp_path)[1] == 8
    with pytest.raises(ValueError, match=r"take 0\.1 MB with the coarsest integers, more than"):
        save_weights(tmp_path, variables, step=9, max_mb=0.08)
    assert load_released(tmp_path)[1] == 8


def test_fine_integers_are_no_finer_than_eight_bits(tmp_path, variables, kernels):
    save_weights(tmp_path, variables, step=7, max_mb=0.25)
    loaded, _ = load_released(tmp_path)
    finest = dequantise(quantise(kernels, 0))
    np.testing.assert_array_equal(loaded["params"]["b"]["kernel"], finest["params/b/kernel"])


def test_damaged_files_are_told_in_one_line(tmp_path, variables):
    path = save_weights(tmp_path, variables, step=7, max_mb=0.2)
    data = path.read_bytes()
    for damaged in (data[:-5], data[:2000], data[:5000] + b"\0" * 50 + data[5050:], data[:2]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="cannot be read") as error:
            load_released(tmp_path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)

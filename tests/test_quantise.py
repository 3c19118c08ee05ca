"""8-bit weights: how far they are from what was rounded, how coarse, and files that fit a size."""

import gzip
import re

import numpy as np
import pytest
from safetensors.numpy import load, save

from coatnet_jax.checkpoint import load_variables
from coatnet_jax.quantise import STEP, coarsest, dequantise, quantise
from coatnet_jax.release_weights import (
    FILE,
    Packed,
    finest,
    is_released,
    load_released,
    pack_weights,
    save_weights,
)


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


def test_the_largest_weight_of_a_channel_fits_its_steps(kernels):
    kernel = kernels["params/a/kernel"]
    kernel[7] *= 100
    quantised = quantise(kernels, coarseness=1e-4)
    error = np.abs(dequantise(quantised)["params/a/kernel"] - kernel)
    assert (error <= quantised["params/a/kernel:step"] * 0.501).all()


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


def packed(variables, max_mb=None):
    return pack_weights(variables, step=7, max_mb=max_mb)


def test_the_file_is_as_large_as_allowed_and_as_fine_as_that_lets_it(tmp_path, variables, kernels):
    errors = []
    for max_mb in (0.23, 0.2, 0.17):
        name, data = packed(variables, max_mb)
        assert name == FILE + ".gz" and 0.985 * max_mb < len(data) / 1e6 <= max_mb
        save_weights(tmp_path, Packed(name, data))
        loaded, step = load_variables(tmp_path)
        assert step == 7 and is_released(tmp_path)
        np.testing.assert_array_equal(loaded["params"]["a"]["bias"], kernels["params/a/bias"])
        np.testing.assert_array_equal(loaded["batch_stats"]["a"]["mean"], np.arange(3))
        pairs = [(loaded["params"][key]["kernel"], kernels[f"params/{key}/kernel"]) for key in "ab"]
        errors.append([np.abs(found - exact).mean() / exact.std() for found, exact in pairs])
    assert all(np.diff(errors, axis=0).min(0) > 0)  # the smaller the file, the coarser
    assert all(small < large < 0.2 for small, large in errors)
    assert len(data) < len(gzip.compress(gzip.decompress(data)))  # which looks for phrases
    # Anything that reads gzip and safetensors can read it.
    arrays = load(gzip.decompress(data))
    assert arrays["params/b/kernel"].dtype == np.int8


def test_integers_only_where_they_are_needed(tmp_path, variables):
    save_weights(tmp_path, packed(variables, 0.2))
    for max_mb in (None, 0.43):
        name, data = packed(variables, max_mb)
        assert name == FILE and 0.4e6 < len(data) < 0.43e6
    save_weights(tmp_path, packed(variables))
    assert [file.name for file in tmp_path.iterdir()] == [FILE]  # not the integers of before
    with pytest.raises(ValueError, match="coarsest integers, more than 0.08: allow") as error:
        packed(variables, 0.08)
    needed = float(re.search(r"take (\S+) MB", str(error.value))[1])
    assert len(packed(variables, needed).data) <= 1e6 * needed  # as told, it is enough
    variables["params"] = {"a": {"bias": variables["params"]["a"]["bias"]}}
    with pytest.raises(ValueError, match="no kernel has 16384 weights"):
        packed(variables, 0.01)


def test_fine_integers_are_no_finer_than_eight_bits(tmp_path, variables, kernels):
    save_weights(tmp_path, packed(variables, 0.25))
    loaded, _ = load_released(tmp_path)
    finest = dequantise(quantise(kernels, 0))
    np.testing.assert_array_equal(loaded["params"]["b"]["kernel"], finest["params/b/kernel"])


def test_weights_that_are_not_finite_are_refused(variables):
    for value in (np.nan, np.inf):
        variables["params"]["a"]["kernel"][3, 5] = value
        for max_mb in (None, 0.2):
            with pytest.raises(ValueError, match="params/a/kernel holds numbers that are not"):
                packed(variables, max_mb)


def test_the_size_said_to_be_enough_is_enough():
    sizes = {0: 2_000_000, 1: 1_234_000}  # by coarseness: without and with the coarsest integers
    with pytest.raises(ValueError, match=r"take 1\.24 MB .* more than 1: allow as much"):
        finest(lambda coarseness: bytes(sizes[coarseness]), coarsest=1, max_mb=1)
    # A finer one takes as much as without integers.
    data = finest(lambda c: bytes(sizes.get(c, 2_000_000)), coarsest=1, max_mb=1.24)
    assert len(data) == 1_234_000


def test_two_files_are_not_guessed_between(tmp_path, variables):
    for max_mb in (0.2, None):
        name, data = packed(variables, max_mb)
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match="remove the one of another model"):
        load_released(tmp_path)


def test_damaged_files_are_told_in_one_line(tmp_path, variables):
    name, data = packed(variables, 0.2)
    steps = {"params/a/kernel": np.ones((2, 3), np.int8), "params/a/kernel:step": np.ones(2)}
    kinds = b'{"a":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}'
    for number, (damaged, said) in enumerate(
        (
            (data[:-5], "cannot be read"),
            (data[:2000], "cannot be read"),
            (data[:2], "cannot be read"),
            (data[:5000] + b"\0" * 50 + data[5050:], "cannot be read"),
            (data[:10] + b"\xff" * 9 + data[19:], "cannot be read"),  # no deflate block
            (data[:3000] + bytes([data[3000] ^ 1]) + data[3001:], "cannot be read"),
            (gzip.compress(b"hello, here are weights"), "cannot be read"),
            (gzip.compress(len(kinds).to_bytes(8, "little") + kinds + b"ab"), "another kind"),
            (gzip.compress(save(steps, {"step": "7"})), "step fits no array beside it"),
            (gzip.compress(save({"params/a": np.ones(2)})), "was not written by coatnet-jax"),
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=said) as error:
            load_released(folder)
        assert str(folder / name) in str(error.value) and "\n" not in str(error.value)


def test_names_do_not_tell_what_is_compressed(tmp_path, variables):
    (name, data), plain = packed(variables, 0.2), FILE
    for file, content in ((name, gzip.decompress(data)), (plain, data)):
        (tmp_path / file).write_bytes(content)
        assert load_released(tmp_path)[1] == 7
        (tmp_path / file).unlink()

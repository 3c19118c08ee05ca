"""Traced programs on disk: what a second process takes over, and what it must not."""

import os
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coatnet_jax import inference, traced
from coatnet_jax.config import load_config
from coatnet_jax.traced import traced_once


class Steps:
    """Makes steps, each new to JAX, and counts them and how often they are traced."""

    made = count = 0

    def new(self):
        self.made += 1

        def step(weights, x):
            self.count += 1
            return jnp.tanh(x @ weights["w"])

        return step


@pytest.fixture
def another_process(monkeypatch):
    """Forgets what this process has loaded."""
    return lambda: monkeypatch.setattr(traced, "_loaded", {})


ARGUMENTS = {"w": np.linspace(-1, 1, 12).reshape(4, 3).astype("f")}, np.ones((2, 4), "f")


def expected(weights, x):
    return np.tanh(x @ weights["w"])


def test_a_second_process_does_not_trace(tmp_path, another_process):
    steps, weights, x = Steps(), *ARGUMENTS
    call = traced_once(steps.new, folder=tmp_path / "new", key="k")
    np.testing.assert_allclose(call(weights, x), expected(weights, x), rtol=1e-6, atol=1e-6)
    another_process()
    call = traced_once(steps.new, folder=tmp_path / "new", key="k")
    for scale in (1, -2):  # the weights are not part of what is kept
        other = {"w": scale * weights["w"]}
        np.testing.assert_allclose(call(other, 3 * x), expected(other, 3 * x), rtol=1e-6, atol=1e-6)
    assert steps.made == steps.count == 1
    assert [path.suffix for path in (tmp_path / "new").iterdir()] == [".stablehlo"]


def test_programs_that_were_not_asked_for_lately_are_removed(
    tmp_path, another_process, monkeypatch
):
    monkeypatch.setattr(traced, "KEPT", 2)
    steps, (weights, x) = Steps(), ARGUMENTS
    other = tmp_path / "jit_step-cache"  # JAX's own, in the same folder
    other.touch()
    for number, key in enumerate(("first", "second", "first", "third")):
        another_process()
        before = set(tmp_path.glob("*.stablehlo"))
        traced_once(steps.new, folder=tmp_path, key=key)(weights, x)
        for path in set(tmp_path.glob("*.stablehlo")) - before:
            os.utime(path, (number, number))  # long ago: no clock tells programs of a moment apart
    assert steps.made == 3
    another_process()
    traced_once(steps.new, folder=tmp_path, key="first")(weights, x)
    assert steps.made == 3  # it was asked for after the second
    traced_once(steps.new, folder=tmp_path, key="second")(weights, x)
    assert steps.made == 4 and other.exists() and len([*tmp_path.glob("*.stablehlo")]) == 2


def test_whatever_the_program_depends_on_has_its_own(tmp_path, another_process, monkeypatch):
    steps, weights, x = Steps(), *ARGUMENTS

    def call(x=x, key="k"):
        return traced_once(steps.new, folder=tmp_path, key=key)(weights, x)

    call(), call()
    call(key="another")
    call(np.ones((5, 4), "f"))
    call(np.ones((2, 4), "i4"))
    with jax.default_matmul_precision("highest"):
        call()
    another_process()
    monkeypatch.setattr(traced, "version", lambda package: "0")
    call()
    another_process()
    monkeypatch.setattr(traced, "_sources", lambda: "edited")
    call()
    assert steps.count == 7 and len(list(tmp_path.iterdir())) == 7


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-9], lambda data: b"", lambda data: b"0" * 99]
)
def test_a_damaged_file_is_written_anew(tmp_path, another_process, damage):
    steps, (weights, x) = Steps(), ARGUMENTS
    traced_once(steps.new, folder=tmp_path, key="k")(weights, x)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    for _ in range(2):
        another_process()
        found = traced_once(steps.new, folder=tmp_path, key="k")(weights, x)
        np.testing.assert_allclose(found, expected(weights, x), rtol=1e-6, atol=1e-6)
    assert steps.count == 2 and len(path.read_bytes()) == len(whole)


def test_what_cannot_be_written_is_computed_all_the_same(tmp_path):
    (tmp_path / "file").write_text("in the way")
    found = traced_once(Steps().new, folder=tmp_path / "file", key="k")(*ARGUMENTS)
    np.testing.assert_allclose(found, expected(*ARGUMENTS), rtol=1e-6)


def test_what_cannot_be_exported_is_computed_all_the_same(tmp_path):
    def calls_python(weights, x):
        shape = jax.ShapeDtypeStruct((2, 3), "float32")
        return jax.pure_callback(expected, shape, weights, x)

    found = traced_once(lambda: calls_python, folder=tmp_path, key="k")(*ARGUMENTS)
    np.testing.assert_allclose(found, expected(*ARGUMENTS), rtol=1e-6)
    assert not list(tmp_path.iterdir())


def test_predict_starts_without_what_only_a_training_needs():
    slow = {"flax", "optax", "orbax", "grain", "tensorflow_datasets", "matplotlib", "sklearn"}
    program = f"import sys, coatnet_jax.predict; print(*({slow} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("\n", "")


def test_a_run_answers_the_same_from_what_it_kept(
    tmp_path, another_process, small_atto, monkeypatch
):
    config = load_config("finetune:atto,drawn,tiny")
    config.model.image_size = 32
    small_atto(inference)
    trained = inference.random_run(config)
    retrained = replace(trained, variables=jax.tree.map(lambda x: 1.1 * x, trained.variables))
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3)).astype(np.uint8)

    def answers(run, programs=None):
        return replace(run, batch_size=8, programs=programs).probabilities(images)

    plain = [answers(run) for run in (trained, retrained)]
    assert np.abs(plain[0] - plain[1]).max() > 1e-4  # else it would not matter which are kept
    kept = answers(trained, tmp_path)
    another_process()
    monkeypatch.setattr(traced, "_traced", None)
    np.testing.assert_allclose([kept, answers(retrained, tmp_path)], plain, atol=1e-6)

"""XLA's flag for NVIDIA GPUs is set only where JAX's CUDA plugin is there and knows it; the CPU's
option reaches the compiler."""

import os
import subprocess
import sys

import pytest

from coatnet_jax.xla_flags import ROLLED_LOOPS, TRITON, keep_loops_rolled, use_cublas


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """The library of a CUDA plugin that knows the flag, which lies in the installed JAX's too."""
    library = tmp_path / "jax_plugins" / "xla_cuda99" / "xla_cuda_plugin.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"\0machine code\0" + TRITON.encode() + b"\0more")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=somewhere")
    return library


def test_it_is_set_where_a_plugin_knows_it(plugin):
    assert use_cublas()
    assert os.environ["XLA_FLAGS"] == f"--xla_dump_to=somewhere --{TRITON}=false"


def test_what_the_user_says_stays(plugin, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"--{TRITON}=true")
    assert not use_cublas()
    assert os.environ["XLA_FLAGS"] == f"--{TRITON}=true"


# A later XLA may keep the field of its options, or a longer flag, without the flag itself.
@pytest.mark.parametrize("code", [b"", b"another flag", f"{TRITON}_int4\0{TRITON}\x18".encode()])
def test_a_flag_that_would_end_the_process_is_not_set(plugin, code):
    plugin.write_bytes(code)
    assert not use_cublas()
    assert TRITON not in os.environ["XLA_FLAGS"]


def test_nothing_is_set_without_a_plugin(plugin):
    plugin.unlink()
    assert not use_cublas()
    assert TRITON not in os.environ["XLA_FLAGS"]


def test_loops_stay_rolled_beside_other_flags(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=somewhere")
    assert keep_loops_rolled()
    flags = f"--xla_dump_to=somewhere --xla_backend_extra_options={ROLLED_LOOPS}"
    assert os.environ["XLA_FLAGS"] == flags
    assert not keep_loops_rolled()
    assert os.environ["XLA_FLAGS"] == flags


def test_extra_options_of_ones_own_stay(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_extra_options=another")
    assert not keep_loops_rolled()
    assert os.environ["XLA_FLAGS"] == "--xla_backend_extra_options=another"


COMPILED = """
import os
from coatnet_jax.runtime import set_up

set_up()
os.environ["XLA_FLAGS"] += " --xla_dump_to=" + os.environ["DUMP"]

import jax
import jax.numpy as jnp

jax.jit(lambda x: x * x * (x + 1)).lower(jnp.ones(384)).compile()
"""


def test_the_compiler_takes_the_option(tmp_path):
    products = {}
    for name, flags in (("rolled", ""), ("unrolled", "--xla_backend_extra_options=xla_none")):
        environment = {"DUMP": str(tmp_path / name), "XLA_FLAGS": flags}
        environment |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "false"}
        subprocess.run([sys.executable, "-c", COMPILED], env=os.environ | environment, check=True)
        files = (tmp_path / name).glob("*jit*lambda*ir-with-opt.ll")
        products[name] = sum(file.read_text().count(" fmul ") for file in files)
    assert 0 < products["rolled"] < products["unrolled"]

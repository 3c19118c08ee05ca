"""XLA's flag for NVIDIA GPUs is set only where JAX's CUDA plugin is there and knows it."""

import os

import pytest

from coatnet_jax.xla_flags import TRITON, use_cublas


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

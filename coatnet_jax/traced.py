"""Traced programs on disk, for a process that begins where tracing takes longer than its work.

`jax.export` writes what tracing makes of a function, StableHLO without the weights. JAX's own cache
keeps what XLA compiles, but is only asked after tracing, which for one photo is half of the time.
"""

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax import export

SOURCES = Path(__file__).parent
OF_TRACING = ("jax_enable_x64", "jax_default_matmul_precision")  # settings that a trace depends on
DIGEST = hashlib.sha256().digest_size
KEPT = 32  # programs in a folder; what nobody asked for since is most likely of another version
_loaded: dict[tuple, Callable] = {}


def traced_once(make: Callable[[], Callable], *, folder: Path, key: str) -> Callable:
    """The step that `make()` gives, made and traced only by the first process that calls it with
    arguments of these shapes.

    `key` tells it from other steps, also by what it closes over: a program in `folder` of the same
    key, shapes, kind of device, JAX and code of ours is taken for it unseen. What cannot be
    exported, read or written is traced as ever. For one device.
    """

    def call(*arguments: Any) -> Any:
        leaves, tree = jax.tree.flatten(arguments)
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        settings = tuple(getattr(jax.config, name) for name in OF_TRACING)
        wanted = (folder, key, shapes, tree, settings)
        if wanted not in _loaded:  # the file's name takes longer than a look at a few shapes
            path = folder / f"{_digest(*wanted[1:])}.stablehlo"
            _loaded[wanted] = _read(path) or _traced(make(), arguments, path)
        return _loaded[wanted](*arguments)

    return call


def _digest(*wanted: Any) -> str:
    platform = (jax.default_backend(), version("jax"), version("jaxlib"), version("flax"))
    said = repr((wanted, platform, _sources()))
    return hashlib.sha256(said.encode()).hexdigest()[:32]


def _sources() -> str:
    """Digest of the package's code, which the trace is of."""
    files = sorted(SOURCES.rglob("*.py"))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def _read(path: Path) -> Callable | None:
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if hashlib.sha256(data[DIGEST:]).digest() != data[:DIGEST]:
        return None
    with suppress(OSError):
        os.utime(path)  # it was asked for
    return jax.jit(export.deserialize(bytearray(data[DIGEST:])).call)


def _traced(step: Callable, arguments: tuple, path: Path) -> Callable:
    try:
        exported = export.export(jax.jit(step))(*arguments)
        data = bytes(exported.serialize())
    except (ValueError, NotImplementedError):  # it calls what no other JAX could be trusted to have
        return step
    with suppress(OSError):  # a full or read-only disk costs the next process time, not this one
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(hashlib.sha256(data).digest() + data)  # half of it is no file to `_read`
        latest_last = sorted(path.parent.glob("*.stablehlo"), key=lambda file: file.stat().st_mtime)
        for old in latest_last[:-KEPT]:
            old.unlink()
    return jax.jit(exported.call)

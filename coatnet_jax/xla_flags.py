"""Settings of XLA's compiler, made before JAX looks for its devices."""

import importlib.util
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

TRITON = "xla_gpu_enable_triton_gemm"
# An XLA that does not know it passes over it, as over any of these options that begins with xla_.
EXTRA_OPTIONS, ROLLED_LOOPS = "xla_backend_extra_options", "xla_cpu_disable_loop_unrolling"


def keep_loops_rolled() -> bool:
    """Have XLA's CPU compiler unroll no loops; whether the option was set.

    coatnet_0's training step is compiled in a tenth less time (benchmarks/compile_speed.py) and is
    no slower: what takes long in it are products, which come from libraries, and loops that wait
    for memory. Left as it is where XLA_FLAGS has extra options already.
    """
    if EXTRA_OPTIONS in os.environ.get("XLA_FLAGS", ""):
        return False
    _add(f"--{EXTRA_OPTIONS}={ROLLED_LOOPS}")
    return True


def use_cublas() -> bool:
    """Have XLA leave matrix products to cuBLAS; whether the flag was set.

    By default it compiles and times dozens of Triton kernels for each shape of product: coatnet_0's
    steps of SimCLR and of fine-tuning, side by side, were not compiled after five minutes of 16 CPU
    cores, and a notebook has two. Left as it is without JAX's CUDA plugin, where XLA_FLAGS names
    the flag already, and where the installed XLA does not know it: unknown flags end the process.
    """
    plugins = list(_libraries("jax_plugins", "xla_cuda*/*.so"))
    if not plugins or TRITON in os.environ.get("XLA_FLAGS", ""):
        return False
    # The CPU's XLA, in jaxlib, reads XLA_FLAGS too.
    if not (any(map(_names_it, _libraries("jaxlib", "*.so"))) and all(map(_names_it, plugins))):
        return False
    _add(f"--{TRITON}=false")
    return True


def _add(flag: str) -> None:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()


def _libraries(package: str, pattern: str) -> Iterator[Path]:
    spec = importlib.util.find_spec(package)  # finds it and does not import it
    for folder in spec.submodule_search_locations or () if spec else ():
        yield from Path(folder).glob(pattern)


def _names_it(library: Path) -> bool:
    if not library.stat().st_size:  # which cannot be mapped
        return False
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as code:
        # With the byte that ends a name: there are longer ones that begin like it.
        return code.find(TRITON.encode() + b"\0") >= 0

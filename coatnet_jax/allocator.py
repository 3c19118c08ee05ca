"""glibc's allocator set up for large arrays on the CPU.

By default every large array is mapped and unmapped anew, and its pages are cleared by the kernel
each time: that costs CPU training a factor of 3 to 6. Kept pages are used again instead. It is the
same as MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=… MALLOC_ARENA_MAX=1 in the environment.

The one arena is for the large arrays, which other threads' arenas would map anew for all that, and
the threads that compile wait for each other there. So each of them keeps more of the small pieces
that it freed (benchmarks/compile_speed.py). glibc reads that when a process begins and not later.
"""

import ctypes
import os
import sys
from collections.abc import Callable, Mapping

# <malloc.h>
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
# Pieces of a size that a thread keeps for itself; glibc's own number is 7.
THREAD_CACHE = "glibc.malloc.tcache_count", 30_000


def keep_freed_memory() -> bool:
    """Whether the settings were made; elsewhere than with glibc a no-op.

    Call it before JAX is imported: a thread that has got memory of its own by then keeps it, and a
    training step of coatnet_0 grew to 10.7 GiB where it takes 6.1.
    """
    if (mallopt := _glibc("mallopt")) is None:
        return False
    # -1: never trim. The largest int, 2 GiB, would give back the arrays of a large step each time.
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1))
    return all(mallopt(option, value) == 1 for option, value in settings)


def with_thread_caches(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` for a process whose threads compile side by side; another number of pieces that
    is named there stays. Elsewhere than with glibc it means nothing."""
    name, pieces = THREAD_CACHE
    others = environment.get("GLIBC_TUNABLES", "")
    if name in others:
        return dict(environment)
    tunables = f"{others}:{name}={pieces}".removeprefix(":")
    return {**environment, "GLIBC_TUNABLES": tunables}


def restart_with_thread_caches() -> None:
    """Begin this Python process again, with the same arguments, under `with_thread_caches`; where
    that is so already, and elsewhere than with glibc, a no-op. Nothing may have been done yet."""
    environment = with_thread_caches(os.environ)
    if environment == os.environ or not sys.executable or _glibc("gnu_get_libc_version") is None:
        return
    try:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    except OSError:
        pass  # compiling takes a little longer, and that is all


def give_back_freed_memory() -> None:
    """Hand the kept pages back to the system, when arrays of other sizes are about to be needed:
    those would fit into few of the holes, and the memory would grow by all of them. Elsewhere than
    with glibc a no-op."""
    if (malloc_trim := _glibc("malloc_trim")) is not None:
        malloc_trim(0)


def _glibc(name: str) -> Callable | None:
    """A function of glibc; None on another system or C library."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):
        return None

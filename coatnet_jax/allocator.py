"""glibc's allocator set up for large arrays on the CPU.

By default every large array is mapped and unmapped anew, and its pages are cleared by the kernel
each time: that costs CPU training a factor of 3 to 6. Kept pages are used again instead. It is the
same as MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=… MALLOC_ARENA_MAX=1 in the environment.

Threads that compile wait for each other at that one arena. Larger caches of freed pieces
(glibc.malloc.tcache_count) end the waiting, but those pieces lie between the large arrays, whose
holes then do not join: a training grew by half a gigabyte a step.
"""

import ctypes
import sys
from collections.abc import Callable

# <malloc.h>
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


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

"""Freed memory is kept for the next array, and handed back when that is asked for."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource

import numpy as np
from coatnet_jax.allocator import give_back_freed_memory, keep_freed_memory

def resident():
    with open("/proc/self/statm") as told:
        return int(told.read().split()[1]) * resource.getpagesize() / 1e6

assert keep_freed_memory()
before = resident()
np.ones(25_000_000)  # 200 MB, freed at once
kept = resident()
give_back_freed_memory()
print(kept - before, resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the settings are glibc's")
def test_freed_memory_is_kept_and_handed_back():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    kept, left = map(float, done.stdout.split())
    assert kept > 190 and left < 20

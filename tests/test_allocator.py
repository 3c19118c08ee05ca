"""Freed memory is kept for the next array, and handed back when that is asked for; a training does
not grow."""

import subprocess
import sys

import pytest

from coatnet_jax import allocator

on_glibc = pytest.mark.skipif(
    allocator._glibc("gnu_get_libc_version") is None, reason="the settings are glibc's"
)

RESIDENT = """
import resource

def resident():
    with open("/proc/self/statm") as told:
        return int(told.read().split()[1]) * resource.getpagesize() / 1e6
"""

SCRIPT = """
import numpy as np
from coatnet_jax.allocator import give_back_freed_memory, keep_freed_memory

assert keep_freed_memory()
before = resident()
np.ones(25_000_000)  # 200 MB, freed at once
kept = resident()
give_back_freed_memory()
print(kept - before, resident() - before)
"""


@on_glibc
def test_freed_memory_is_kept_and_handed_back():
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT + SCRIPT], capture_output=True, text=True, check=True
    )
    kept, left = map(float, done.stdout.split())
    assert kept > 190 and left < 20


TRAINING = """
from functools import partial

from coatnet_jax.runtime import set_up

set_up()  # before JAX is imported, as the command line does

import jax
import jax.numpy as jnp
from coatnet_jax.models import create_backbone

model = create_backbone("coatnet_atto")
images = jax.random.normal(jax.random.key(0), (8, 64, 64, 3))
variables = jax.jit(partial(model.init, train=False))(jax.random.key(1), images[:1])

@partial(jax.jit, donate_argnums=0)
def step(params):
    def loss(params):
        weights = variables | {"params": params}
        features, _ = model.apply(weights, images, train=True, mutable=["batch_stats"])
        return jnp.square(features - 1).mean()
    return jax.tree.map(lambda leaf, slope: leaf - 1e-3 * slope, params, jax.grad(loss)(params))

params = jax.tree.map(jnp.copy, variables["params"])
for n in range(60):
    params = jax.block_until_ready(step(params))
    if n in (19, 59):
        print(resident())
"""


@on_glibc
def test_a_training_does_not_grow_step_by_step():
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT + TRAINING], capture_output=True, text=True, check=True
    )
    early, late = map(float, done.stdout.split())
    assert late < 1.2 * early

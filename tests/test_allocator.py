"""Freed memory is kept for the next array, and handed back when that is asked for; a process begins
again, once, under the settings that only its environment can make."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from coatnet_jax import allocator
from coatnet_jax.allocator import restart_with_thread_caches, with_thread_caches

on_glibc = pytest.mark.skipif(
    allocator._glibc("gnu_get_libc_version") is None, reason="the settings are glibc's"
)

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


@on_glibc
def test_freed_memory_is_kept_and_handed_back():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    kept, left = map(float, done.stdout.split())
    assert kept > 190 and left < 20


AGAIN = """
import os, sys
print(os.getpid(), sys.argv[1:], sys.flags.utf8_mode, os.environ.get("GLIBC_TUNABLES"), flush=True)
from coatnet_jax.allocator import restart_with_thread_caches
restart_with_thread_caches()
"""


def printed_by(script, *arguments, **environment):
    command = [sys.executable, "-X", "utf8", "-c", script, *arguments]
    kept = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=kept | environment
    )
    return done.stdout.splitlines()


@on_glibc
def test_a_process_begins_again_once_with_its_arguments():
    first, second = (line.split(maxsplit=1) for line in printed_by(AGAIN, "a b", "--c='d'"))
    assert first[0] == second[0]  # the same process: a signal to it still arrives
    assert first[1] == """['a b', "--c='d'"] 1 None"""
    assert second[1] == """['a b', "--c='d'"] 1 glibc.malloc.tcache_count=30000"""


@on_glibc
def test_a_number_of_ones_own_is_left_alone():
    (only,) = printed_by(AGAIN, GLIBC_TUNABLES="glibc.malloc.tcache_count=9")
    assert only.endswith("glibc.malloc.tcache_count=9")


def test_other_tunables_stay():
    before = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "HOME": "/somewhere"}
    assert with_thread_caches(before) == {
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.tcache_count=30000",
        "HOME": "/somewhere",
    }


@on_glibc
def test_glibc_takes_the_number():
    maps = Path("/proc/self/maps").read_text().splitlines()
    loader = next((line.split()[-1] for line in maps if "/ld-" in line), sys.executable)
    command = [loader, "--list-tunables"]
    told = subprocess.run(command, capture_output=True, text=True, env=with_thread_caches({}))
    if told.returncode:
        pytest.skip("before glibc 2.33 the loader does not list the tunables")
    (line,) = [line for line in told.stdout.splitlines() if "tcache_count" in line]
    assert f" {30_000:#x} " in line


def test_where_it_cannot_begin_again_it_goes_on(monkeypatch):
    def refused(*arguments):
        raise PermissionError

    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(os, "execve", refused)
    restart_with_thread_caches()
    monkeypatch.setattr(allocator, "_glibc", lambda name: None)  # another C library
    monkeypatch.setattr(os, "execve", lambda *arguments: pytest.fail("began again"))
    restart_with_thread_caches()

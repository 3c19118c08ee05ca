"""Timing of functions in turns, so that what slows the machine meets all of them alike."""

import statistics
import time
from collections.abc import Callable, Sequence

import jax


def median_milliseconds(
    functions: Sequence[Callable], arguments: Sequence, *, rounds: int
) -> list[float]:
    """Medians over `rounds` of each function's time, after a call of each that compiles."""
    for function in functions:
        jax.block_until_ready(function(*arguments))
    times = [[] for _ in functions]
    for _ in range(rounds):
        for function, taken in zip(functions, times, strict=True):
            started = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            taken.append(1000 * (time.perf_counter() - started))
    return [statistics.median(taken) for taken in times]

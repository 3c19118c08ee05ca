"""Timing of functions in turns, so that what slows the machine meets all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping

import jax


def seconds_in_turns(timed: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list]:
    """Seconds that each function took in each round, after a call of each that is not measured."""
    seconds = {name: [] for name in timed}
    for number in range(rounds + 1):
        for name, function in timed.items():
            started = time.perf_counter()
            function()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def median_milliseconds(timed: Mapping[str, Callable[[], object]], rounds: int) -> list[float]:
    """The median of each function's rounds in turns, in their order."""
    return [1000 * statistics.median(taken) for taken in seconds_in_turns(timed, rounds).values()]


def waited_for(function: Callable, *arguments) -> Callable[[], object]:
    """A call of `function` that ends when its arrays are there."""
    return lambda: jax.block_until_ready(function(*arguments))

"""How far long work is, in lines that come every few seconds and ever more rarely."""

import math
import time
from collections.abc import Callable
from functools import partial

Progress = Callable[[str], None]
say: Progress = partial(print, flush=True)
EVERY = 2.0  # seconds from one line to the next in the beginning
LATER = 20.0  # seconds after which it is a tenth of the time so far, for work of an hour


class Count:
    """Counts what is done and says so: `prepared 1,200 of 4,000 files, 600/s, 0:05 left`.

    `total` is None where it is not known; None for `progress` is silent. Work that is done within
    `EVERY` seconds says nothing.
    """

    def __init__(self, verb: str, total: int | None, noun: str, *, progress: Progress | None = say):
        self.verb, self.total, self.noun, self.progress = verb, total, noun, progress
        self.n = 0
        self.start = self.said = time.monotonic()

    def __call__(self, more: int = 1) -> None:
        """Count `more` of them."""
        self.n += more
        now = time.monotonic()
        every = EVERY * max(1, (now - self.start) / LATER)
        if self.progress is None or now - self.said < every:
            return
        self.said = now
        speed = self.n / (now - self.start)
        pace = f"{speed:,.0f}" if speed >= 10 else f"{speed:.1f}"
        of = f" of {self.total:,}" if self.total else ""
        left = f", {duration((self.total - self.n) / speed)} left" if self.total else ""
        self.progress(f"{self.verb} {self.n:,}{of} {self.noun}, {pace}/s{left}")


def duration(seconds: float) -> str:
    """`3:07` or `1:02:45`."""
    seconds = math.ceil(seconds)
    hours, minutes = seconds // 3600, seconds % 3600 // 60
    return f"{hours}:{minutes:02}:{seconds % 60:02}" if hours else f"{minutes}:{seconds % 60:02}"

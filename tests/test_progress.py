"""How far long work is, told in lines that are few and right."""

import numpy as np
import pytest

from input_pipeline import progress
from input_pipeline.progress import Count, duration


@pytest.fixture
def clock(monkeypatch):
    """Seconds that only the test lets pass."""
    clock = {"now": 100.0}
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock["now"])
    return clock


def test_lines_come_every_few_seconds_with_pace_and_time_left(clock):
    lines = []
    count = Count("read", 400, "files", progress=lines.append)
    for _ in range(40):
        clock["now"] += 0.5
        count(10)
    assert len(lines) == 10
    assert lines[0] == "read 40 of 400 files, 20/s, 0:18 left"
    assert lines[-1] == "read 400 of 400 files, 20/s, 0:00 left"


def test_an_hour_does_not_fill_the_screen(clock):
    times = []
    count = Count("read", 3600, "files", progress=lambda _: times.append(clock["now"] - 100))
    for _ in range(3600):
        clock["now"] += 1
        count()
    assert times[:10] == list(range(2, 22, 2))
    gaps, later = np.diff(times[9:]), np.array(times[10:])
    assert (gaps >= 0.1 * later).all() and (gaps <= 0.1 * later + 1.2).all()
    assert len(times) < 70


def test_slow_work_has_a_decimal_and_unknown_totals_have_no_end(clock):
    lines = []
    count = Count("read", None, "files", progress=lines.append)
    clock["now"] += 10
    count()
    assert lines == ["read 1 files, 0.1/s"]
    count()
    assert len(lines) == 1  # at once


def test_short_or_silent_work_says_nothing(clock, capsys):
    said, silent = Count("read", 9, "files"), Count("read", 9, "files", progress=None)
    for _ in range(9):
        clock["now"] += 0.2
        said()
        silent()
    clock["now"] += 10
    silent()
    assert capsys.readouterr().out == ""


def test_durations_are_clock_like():
    assert [duration(seconds) for seconds in (0, 6.2, 187, 3765)] == [
        "0:00",
        "0:07",
        "3:07",
        "1:02:45",
    ]

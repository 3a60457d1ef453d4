"""The stopwatch: parts within parts, and parts that end with an error."""

import pytest

from sparseinst.engine import stopwatch
from sparseinst.engine.stopwatch import Stopwatch


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    now = [100.0]
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now[0])
    return now


def test_every_second_belongs_to_one_part(clock):
    watch = Stopwatch()
    with watch("outer"):
        clock[0] += 1
        with watch("inner"):
            clock[0] += 2
            with watch("innermost"):
                clock[0] += 3
        clock[0] += 4
        with watch("inner"):
            clock[0] += 5
    clock[0] += 50
    with watch("outer"):
        clock[0] += 5
    assert watch.seconds == {"outer": 10, "inner": 7, "innermost": 3} and watch.total() == 20
    assert str(watch) == "20.0 s: outer 10.0 s (50.0 %), inner 7.0 s (35.0 %), innermost 3.0 s (15.0 %)"
    assert str(Stopwatch()) == "0.0 s: "


def test_an_error_ends_a_part(clock):
    watch = Stopwatch()
    with watch("outer"):
        with pytest.raises(KeyError), watch("inner"):
            clock[0] += 1
            raise KeyError
        clock[0] += 2
    assert watch.seconds == {"outer": 2, "inner": 1}

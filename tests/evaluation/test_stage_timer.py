"""The timer: stages within stages, and stages that end with an error."""

import pytest

from sparseinst.evaluation import StageTimer, stage_timer


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    now = [100.0]
    monkeypatch.setattr(stage_timer.time, "perf_counter", lambda: now[0])
    return now


def test_every_second_belongs_to_one_stage(clock):
    timer = StageTimer()
    with timer.stage("outer"):
        clock[0] += 1
        with timer.stage("inner"):
            clock[0] += 2
            with timer.stage("innermost"):
                clock[0] += 3
        clock[0] += 4
        with timer.stage("inner"):
            clock[0] += 5
    clock[0] += 50
    with timer.stage("outer"):
        clock[0] += 5
    assert timer.seconds == {"outer": [5, 5], "inner": [2, 5], "innermost": [3]}
    assert timer.totals() == {"outer": 10, "inner": 7, "innermost": 3}
    assert str(timer) == "20.0 s: outer 10.0 s (50.0 %), inner 7.0 s (35.0 %), innermost 3.0 s (15.0 %)"
    assert str(StageTimer()) == "0.0 s: "


def test_an_error_ends_a_stage(clock):
    timer = StageTimer()
    with timer.stage("outer"):
        with pytest.raises(KeyError), timer.stage("inner"):
            clock[0] += 1
            raise KeyError
        clock[0] += 2
    assert timer.totals() == {"outer": 2, "inner": 1}

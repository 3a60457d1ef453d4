"""Progress of work on many items: lines with an ETA, and the items as they are."""

import logging

import pytest

from sparseinst.runtime import progress
from sparseinst.runtime.progress import WithProgress


@pytest.mark.parametrize(("seconds", "expected"), [(3.0, ["1 of 5, eta: 0:00:24", "3 of 5, eta: 0:00:08"]), (0.5, [])])
def test_it_logs_what_remains(monkeypatch, caplog, seconds, expected):
    clock = iter(range(100))
    monkeypatch.setattr(progress.time, "monotonic", lambda: seconds * next(clock))
    items = WithProgress("abcde", "Images")
    with caplog.at_level(logging.INFO, "sparseinst"):
        assert "".join(items) == "abcde" and len(items) == 5
    assert caplog.messages == [f"Images: {line}" for line in expected]
    assert "".join(items) == "abcde"

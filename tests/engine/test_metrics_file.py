"""metrics.json: whole lines on a full disk, one line for each iteration after --resume."""

import json
import logging

import pytest
from detectron2.utils.events import EventStorage, EventWriter

from sparseinst.engine.metrics_file import MetricsFile, OptionalWriter, read_metrics
from tests.disk import little_room


def write(path, values, start=0):
    """Write a loss for each iteration from ``start`` on."""
    with EventStorage(start) as storage:
        writer = MetricsFile(path)
        for value in values:
            storage.put_scalars(loss=value, smoothing_hint=False)
            writer.write()
            storage.step()


def test_iterations_are_lines(tmp_path):
    path = tmp_path / "metrics.json"
    write(path, [3, 2])
    assert path.read_text().splitlines() == ['{"iteration": 0, "loss": 3.0}', '{"iteration": 1, "loss": 2.0}']
    assert read_metrics(path) == [{"iteration": 0, "loss": 3.0}, {"iteration": 1, "loss": 2.0}]


def test_a_resumed_run_replaces_what_it_repeats_and_half_a_line(tmp_path):
    path = tmp_path / "metrics.json"
    write(path, [3, 2, 1])
    path.write_text(path.read_text() + '{"iteration": 3, "lo')
    write(path, [7, 8], start=2)
    assert [entry["loss"] for entry in read_metrics(path)] == [3, 2, 7, 8]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_repeated_evaluation_keeps_the_losses_of_its_iteration(tmp_path):
    path = tmp_path / "metrics.json"
    write(path, [3, 2])
    with EventStorage(1) as storage:
        storage.put_scalars(AP=40, smoothing_hint=False)
        storage.step()
        storage.put_scalars(loss=1, smoothing_hint=False)
        MetricsFile(path).write()
    assert read_metrics(path)[1:] == [{"iteration": 1, "loss": 2, "AP": 40}, {"iteration": 2, "loss": 1}]


def test_no_file_and_other_lines(tmp_path):
    assert read_metrics(tmp_path / "metrics.json") == []
    (tmp_path / "metrics.json").write_bytes(b'[1]\n\xff\n{"loss": 3}\n\n')
    assert read_metrics(tmp_path / "metrics.json") == []


def test_a_full_disk_leaves_whole_lines_and_one_warning(tmp_path, caplog):
    path = tmp_path / "metrics.json"
    # Three lines of 30 bytes, and a part of the fourth.
    with little_room(100), EventStorage(0) as storage, caplog.at_level(logging.WARNING, "sparseinst"):
        writer = OptionalWriter(MetricsFile(path), "metrics.json")
        for _ in range(10):
            storage.put_scalars(loss=1.0, smoothing_hint=False)
            writer.write()
            storage.step()
        writer.close()
    (warning,) = [record.message for record in caplog.records]
    assert warning.startswith("metrics.json ends here, and the training goes on")
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [0, 1, 2]


def test_other_errors_are_not_hidden():
    class Broken(EventWriter):
        def write(self):
            raise KeyError("a bug")

    with pytest.raises(KeyError):
        OptionalWriter(Broken(), "x").write()

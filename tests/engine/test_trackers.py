"""TRACKERS: what a tracker gets, a tracker that fails, and a resumed run. tests/extras has the packages themselves."""

import json
import logging
import sys

import pytest
from detectron2.utils.events import EventStorage

from sparseinst.config import check_value
from sparseinst.engine import trackers
from sparseinst.engine.trackers import TrackerWriter, build_trackers, check_trackers


@pytest.fixture
def runs(monkeypatch):
    """The calls of a tracker named wandb, and those that shall fail."""
    calls, failing = [], set()

    def start(output_dir, config, run_id):
        def call(name, *values):
            if name in failing:
                raise RuntimeError(f"{name}\nfailed")
            calls.append((name, *values))

        call("start", config, run_id)
        return TrackerWriter(
            lambda iteration, scalars: call("log", iteration, scalars), lambda error: call("close"), "7"
        )

    monkeypatch.setitem(trackers.TRACKERS, "wandb", start)
    return calls, failing


def train(folder, losses, start=0):
    with EventStorage(start) as storage:
        (writer,) = build_trackers(["wandb"], str(folder), "SEED: 1", is_resumed=start > 0)
        for loss in losses:
            storage.put_scalars(loss=loss, smoothing_hint=False)
            if loss > 2:
                storage.put_scalars(AP=40, smoothing_hint=False)
            writer.write()
            storage.step()
        writer.write()
        writer.close()


def test_each_scalar_is_sent_once(tmp_path, runs):
    train(tmp_path, [3, 2])
    assert runs[0] == [
        ("start", "SEED: 1", None), ("log", 0, {"loss": 3, "AP": 40}), ("log", 1, {"loss": 2}), ("close",)
    ]  # fmt: skip
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"wandb": "7"}


def test_a_resumed_training_goes_on_in_its_run(tmp_path, runs):
    train(tmp_path, [3])
    train(tmp_path, [1], start=1)
    assert runs[0][3:] == [("start", "SEED: 1", "7"), ("log", 1, {"loss": 1}), ("close",)]


def test_a_new_training_starts_a_new_run(tmp_path, runs):
    train(tmp_path, [3])
    runs[1].add("start")
    assert build_trackers(["wandb"], str(tmp_path), "SEED: 1", is_resumed=False) == []
    runs[1].clear()
    train(tmp_path, [1], start=1)
    assert runs[0][3] == ("start", "SEED: 1", None)


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_file_of_runs_costs_a_warning(tmp_path, runs, caplog, content):
    (tmp_path / "trackers.json").write_text(content)
    with caplog.at_level(logging.WARNING, "sparseinst"):
        train(tmp_path, [1], start=1)
    (warning,) = [record.message for record in caplog.records]
    assert "trackers.json cannot be read, so the trackers start new runs: " in warning
    assert runs[0][0] == ("start", "SEED: 1", None)


@pytest.mark.parametrize("failing", ["start", "log", "close"])
def test_a_failure_is_one_warning(tmp_path, runs, caplog, failing):
    runs[1].add(failing)
    with caplog.at_level(logging.WARNING, "sparseinst"):
        if failing == "start":
            assert build_trackers(["wandb"], str(tmp_path), "", False) == []
        else:
            train(tmp_path, [3, 2])
    (warning,) = [record.message for record in caplog.records]
    assert warning.startswith("TRACKERS wandb cannot start" if failing == "start" else "wandb ends here")
    assert "the training goes on" in warning


def test_a_package_that_is_missing_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in ("wandb", "mlflow"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        # The folder that wandb writes is no package.
        (tmp_path / name).mkdir()
        with pytest.raises(ImportError, match=rf"TRACKERS names {name}.*pip install 'sparseinst\[{name}\]'"):
            check_trackers([name])
    check_trackers([])


@pytest.mark.parametrize(
    ("names", "accepted"), [([], True), (["wandb", "mlflow"], True), ("wandb", False), (["x"], False)]
)
def test_values_of_the_key(names, accepted):
    if accepted:
        check_value("TRACKERS", names)
    else:
        with pytest.raises(ValueError, match="TRACKERS is .*; it must be a list of names, each 'wandb' or 'mlflow'"):
            check_value("TRACKERS", names)

"""A training with Weights & Biases and MLflow: what they store, a resumed run, no login, no server."""

import json
import logging
from pathlib import Path

import pytest
from detectron2.utils.events import EventStorage

from sparseinst.engine.trackers import build_trackers
from sparseinst.tools import train_net
from tests.loggers import loggers_restored
from tests.shapes_data import write_shapes
from tests.tiny_model import tiny_cfg


@pytest.fixture
def wandb():
    """The package, without the settings of an earlier test."""
    package = pytest.importorskip("wandb")
    package.teardown()
    return package


def train(folder, losses, start=0, name="mlflow", error=None):
    with EventStorage(start) as storage:
        writers = build_trackers([name], str(folder), "SEED: 1\n", is_resumed=start > 0)
        for loss in losses:
            storage.put_scalars(**{"loss": loss, "segm/AP-a+b": 40.0}, smoothing_hint=False)
            for writer in writers:
                writer.write()
            storage.step()
        try:
            if error is not None:
                raise error
        finally:
            for writer in writers:
                writer.close()
    return writers


def test_mlflow_stores_the_scalars_and_goes_on_with_a_resumed_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    train(tmp_path, [3.0, 2.0])
    train(tmp_path, [1.0], start=2)
    run_id = json.loads((tmp_path / "trackers.json").read_text())["mlflow"]
    history = mlflow.MlflowClient().get_metric_history(run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(0, 3.0), (1, 2.0), (2, 1.0)]
    assert len(mlflow.MlflowClient().get_metric_history(run_id, "segm/AP-a_b")) == 3
    assert mlflow.artifacts.load_text(f"runs:/{run_id}/config.yaml") == "SEED: 1\n"


@pytest.mark.parametrize(("error", "status"), [(RuntimeError(), "FAILED"), (KeyboardInterrupt(), "KILLED")])
def test_mlflow_stores_how_a_training_ended(tmp_path, monkeypatch, error, status):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(type(error)):
        train(tmp_path, [3.0], error=error)
    run_id = json.loads((tmp_path / "trackers.json").read_text())["mlflow"]
    assert mlflow.MlflowClient().get_run(run_id).info.status == status
    train(tmp_path, [1.0], start=1)
    assert mlflow.MlflowClient().get_run(run_id).info.status == "FINISHED"


def test_mlflow_without_its_server_is_a_warning(tmp_path, monkeypatch, caplog):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with caplog.at_level(logging.WARNING, "sparseinst"):
        assert train(tmp_path, [3.0]) == []
    assert "TRACKERS mlflow cannot start, and the training goes on without it" in caplog.text


def test_wandb_stores_the_scalars_offline(tmp_path, monkeypatch, wandb):
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(tmp_path, [3.0, 2.0], name="wandb")
    # The process that stores the run ends, and writes what it holds.
    wandb.teardown()
    run_id = json.loads((tmp_path / "trackers.json").read_text())["wandb"]
    (stored,) = (tmp_path / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb")
    content = stored.read_bytes()
    assert b"segm/AP-a+b" in content and b"SEED" in content


def test_a_training_with_both(tmp_path, monkeypatch, wandb):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    opts = ("MODEL.SPARSE_INST.DECODER.NUM_CLASSES", 4, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.STEPS", ())
    (tmp_path / "tiny.yaml").write_text(tiny_cfg(*opts, "SOLVER.MAX_ITER", 2).dump())
    train_json, train_images = write_shapes(tmp_path, 4)
    arguments = ["--config-file", "tiny.yaml", "--train-json", train_json, "--train-images", train_images]
    with loggers_restored():
        train_net.cli([*arguments, "OUTPUT_DIR", "out", "TRACKERS", "['mlflow', 'wandb']"])
    wandb.teardown()
    runs = json.loads(Path("out/trackers.json").read_text())
    *_, last = map(json.loads, Path("out/metrics.json").read_text().splitlines())
    assert last["iteration"] == 1
    stored = mlflow.MlflowClient().get_run(runs["mlflow"]).data.metrics
    assert stored["total_loss"] == last["total_loss"] and stored["lr"] == last["lr"]
    (offline,) = Path("out/wandb").glob(f"offline-run-*-{runs['wandb']}/run-{runs['wandb']}.wandb")
    assert b"total_loss" in offline.read_bytes()


def test_wandb_without_a_login_is_a_warning(tmp_path, monkeypatch, caplog, wandb):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    # Neither a saved login nor a terminal to ask in.
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with caplog.at_level(logging.WARNING, "sparseinst"):
        assert train(tmp_path, [3.0], name="wandb") == []
    assert "TRACKERS wandb cannot start, and the training goes on without it" in caplog.text

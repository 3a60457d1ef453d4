"""The stage's function on a batch as Ray gives it; tests/extras has the same with Ray."""

import json
import pickle

import numpy as np
import pytest
import torch

from sparseinst import load_config
from sparseinst.inference import ray_stage
from sparseinst.inference.ray_stage import PredictStage
from sparseinst.tools import predict
from tests.loggers import loggers_restored
from tests.red_segmenter import red_segmenter_config
from tests.tools.demo_scenes import save_scene


@pytest.fixture
def config_file(tmp_path):
    torch.save({"model": {"scores": torch.tensor([0.9, 0.3])}}, tmp_path / "model.pth")
    cfg = red_segmenter_config()
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    cfg.MODEL.DEVICE = "cuda"
    (tmp_path / "config.yaml").write_text(cfg.dump())
    return str(tmp_path / "config.yaml")


def config_of_driver(config_file, monkeypatch, *opts, has_cuda):
    """The config as an actor gets it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    cfg = load_config(config_file, opts)
    cfg.freeze()
    return pickle.loads(pickle.dumps(cfg))


@pytest.mark.parametrize(("opts", "device"), [((), "cuda"), (("MODEL.DEVICE", "cpu"), "cpu")])
def test_an_actor_with_a_gpu_of_a_driver_without(config_file, monkeypatch, opts, device):
    cfg = config_of_driver(config_file, monkeypatch, *opts, has_cuda=False)
    assert cfg.MODEL.DEVICE == "cpu"
    devices = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ray_stage, "Predictor", lambda cfg: devices.append(cfg.MODEL.DEVICE))
    PredictStage(cfg)
    assert devices == [device]


def test_an_actor_without_a_gpu_of_a_driver_with_one(config_file, monkeypatch, tmp_path):
    cfg = config_of_driver(config_file, monkeypatch, has_cuda=True)
    assert cfg.MODEL.DEVICE == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    content = save_scene(tmp_path / "a.png").read_bytes()
    (line,) = PredictStage(cfg)({"bytes": np.array([content], dtype=object), "path": np.array(["a.png"])})["line"]
    assert len(json.loads(line)["detections"]) == 2


def test_random_weights_are_refused(config_file):
    with pytest.raises(ValueError, match="MODEL.WEIGHTS is empty"):
        PredictStage(load_config(config_file, ["MODEL.WEIGHTS", ""]))


def test_the_lines_of_sparseinst_predict(tmp_path):
    torch.save({"model": {"scores": torch.tensor([0.9, 0.3])}}, tmp_path / "model.pth")
    cfg = red_segmenter_config()
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    # RedSegmenter does not read this key, so the blue instance is dropped after the model.
    cfg.MODEL.OUTPUT.SCORE_THRESHOLD = 0.5
    (tmp_path / "config.yaml").write_text(cfg.dump())
    (tmp_path / "in").mkdir()
    paths = [save_scene(tmp_path / "in" / "a.png"), tmp_path / "in" / "b.png", tmp_path / "in" / "c.png"]
    paths[1].write_bytes(b"text")
    paths[2].write_bytes(b"")
    output = tmp_path / "out.jsonl"
    arguments = ["--config-file", tmp_path / "config.yaml", "--input", tmp_path / "in", "--output", output]
    with loggers_restored():
        assert predict.main([str(argument) for argument in arguments]) == 1
    content = [path.read_bytes() for path in paths]
    batch = {"bytes": np.array(content, dtype=object), "path": np.array(list(map(str, paths)), dtype=object)}
    cfg = load_config(str(tmp_path / "config.yaml"))
    result = PredictStage(cfg)(batch)
    assert list(result["path"]) == list(map(str, paths))
    assert list(result["line"]) == output.read_text().splitlines()[1:]
    first, second, third = map(json.loads, result["line"])
    assert [detection["category_id"] for detection in first["detections"]] == [0]
    assert "b.png: it is not an image" in second["error"] and "c.png: the file is empty" in third["error"]
    assert cfg.MODEL.OUTPUT.MASK_FORMAT == "bitmask"

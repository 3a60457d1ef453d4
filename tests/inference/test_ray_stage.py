"""The stage's function on a batch as Ray gives it; tests/extras has the same with Ray."""

import json

import numpy as np
import torch

from sparseinst import load_config
from sparseinst.inference import Predictor
from sparseinst.inference.prediction_lines import prediction_line
from sparseinst.inference.ray_stage import PredictStage
from tests.red_segmenter import red_segmenter_config
from tests.tools.demo_scenes import save_scene


def test_a_batch_of_files(tmp_path):
    torch.save({"model": {"scores": torch.tensor([0.9, 0.3])}}, tmp_path / "model.pth")
    cfg = red_segmenter_config()
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    path = save_scene(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"text")
    names = [str(path), str(tmp_path / "b.png")]
    content = [path.read_bytes(), b"text"]
    batch = {"bytes": np.array(content, dtype=object), "path": np.array(names, dtype=object)}
    cfg = load_config(str(tmp_path / "config.yaml"))
    result = PredictStage(cfg)(batch)
    assert list(result["path"]) == names
    (instances,) = Predictor(cfg)([path])
    assert instances.pred_classes.tolist() == [0, 1]
    assert result["line"][0] == prediction_line(names[0], instances, [0, 1])
    error = json.loads(result["line"][1])
    assert error["file_name"] == names[1] and "it is not an image" in error["error"]
    assert cfg.MODEL.OUTPUT.MASK_FORMAT == "bitmask"

"""The stage's function on a batch as Ray gives it; tests/extras has the same with Ray."""

import json

import numpy as np

from sparseinst import load_config
from sparseinst.inference.ray_stage import PredictStage
from tests.red_segmenter import red_segmenter_config
from tests.tools.demo_scenes import save_scene


def test_a_batch_of_files(tmp_path):
    import torch

    torch.save({"model": {"scores": torch.tensor([0.9, 0.3])}}, tmp_path / "model.pth")
    cfg = red_segmenter_config()
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    content = save_scene(tmp_path / "a.png").read_bytes()
    batch = {"bytes": np.array([content, b"text"], dtype=object), "path": np.array(["x/a.png", "b.png"], dtype=object)}
    result = PredictStage(load_config(str(tmp_path / "config.yaml")))(batch)
    assert list(result["path"]) == ["x/a.png", "b.png"]
    line, error = map(json.loads, result["line"])
    assert line["file_name"] == "x/a.png" and (line["height"], line["width"]) == (48, 64)
    assert [len(line["detections"]), set(line["detections"][0])] == [
        2,
        {"category_id", "bbox", "score", "segmentation"},
    ]
    assert error["file_name"] == "b.png" and "it is not an image" in error["error"]

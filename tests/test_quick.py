"""configs/quick/shapes.yaml in a shorter form: a fifth of its iterations, on images drawn for the test."""

import re
from pathlib import Path

import pytest
import torch
from detectron2.data import MetadataCatalog
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sparseinst import get_config_file
from sparseinst.config import load_config
from sparseinst.data.coco_json import check_num_classes, register_user_datasets
from sparseinst.engine.trainer import Trainer
from sparseinst.tools.make_shapes import write_shapes_dataset

ITERATIONS = 280
# Last 20 iterations over the first 20. The published settings end above both.
MAX_SHARE = {"loss_iam": 0.75, "loss_dice": 0.5}
MIN_AP50 = 20.0  # in percent, of the masks, whatever their class


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quick")
    for split, count, seed in (("train", 800, 0), ("val", 60, 1)):
        write_shapes_dataset(folder, count, seed, 128, split=split)
    cfg = load_config(
        get_config_file("quick/shapes"),
        [
            "DATASETS.TRAIN_JSON", str(folder / "train.json"), "DATASETS.TRAIN_IMAGES", str(folder / "train"),
            "DATASETS.TEST_JSON", str(folder / "val.json"), "DATASETS.TEST_IMAGES", str(folder / "val"),
            "OUTPUT_DIR", str(folder / "output"), "SOLVER.MAX_ITER", ITERATIONS, "DATALOADER.NUM_WORKERS", 0,
        ],
    )  # fmt: skip
    (folder / "output").mkdir()
    register_user_datasets(cfg)
    check_num_classes(cfg)
    return cfg


def test_makefile_passes_the_expected_results(cfg):
    assert not cfg.TEST.EXPECTED_RESULTS  # so that a changed copy of the file does not fail
    makefile = Path(__file__).resolve().parents[1] / "Makefile"
    value = re.search(r"^QUICK_EXPECTED := (.+)$", makefile.read_text(), re.MULTILINE)[1]
    assert "TEST.EXPECTED_RESULTS '$(QUICK_EXPECTED)'" in makefile.read_text()
    expected = load_config("quick/shapes", ["TEST.EXPECTED_RESULTS", value]).TEST.EXPECTED_RESULTS
    tolerances = {(task, metric): (value, tolerance) for task, metric, value, tolerance in expected}
    for metric, floor in (("AP", 40), ("AP50", 65)):
        value, tolerance = tolerances["segm", metric]
        # verify_results() fails outside of value +- tolerance, so below the floor at the least.
        assert value - tolerance >= floor


def test_learns_masks_in_a_fifth_of_the_time(cfg):
    torch.manual_seed(0)
    trainer = Trainer(cfg)
    trainer.train()
    # The activation maps find the objects, and the masks follow.
    for name, max_share in MAX_SHARE.items():
        values = [value for value, _ in trainer.storage.history(name).values()]
        assert sum(values[-20:]) < max_share * sum(values[:20]), name
    assert class_agnostic_ap50(cfg) > MIN_AP50


def class_agnostic_ap50(cfg) -> float:
    """AP50 of the masks, in percent, from what the last evaluation wrote."""
    ground_truth = COCO(MetadataCatalog.get(cfg.DATASETS.TEST[0]).json_file)
    results = ground_truth.loadRes(f"{cfg.OUTPUT_DIR}/inference/coco_instances_results.json")
    evaluation = COCOeval(ground_truth, results, "segm")
    evaluation.params.useCats = 0
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return 100 * evaluation.stats[1]

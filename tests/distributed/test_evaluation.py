"""Evaluation by several ranks: results, speed and files are as by one; and the ranks need not have images."""

import json
from types import SimpleNamespace

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from pycocotools.coco import COCO
from torch import nn

from sparseinst.data.coco_json import register_coco_json
from sparseinst.evaluation import StageTimer, evaluate
from sparseinst.evaluation.evaluate import speed_summary
from tests.distributed.ranks import run_ranks
from tests.shapes_data import write_shapes
from tests.tiny_model import tiny_cfg, tiny_model


class Guesser(nn.Module):
    """Predicts the annotations of a json, shifted and with wrong classes now and then; most scores are equal."""

    device = torch.device("cpu")

    def __init__(self, json_file):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.coco = COCO(json_file)

    def preprocess(self, batched_inputs):
        return SimpleNamespace(tensor=torch.zeros(1))

    def network(self, images):
        return {}

    def postprocess(self, outputs, batched_inputs, images):
        return [{"instances": self._guess(x)} for x in batched_inputs]

    def _guess(self, x):
        size = (x["height"], x["width"])
        found = self.coco.imgToAnns[x["image_id"]]
        masks = torch.zeros(len(found), *size, dtype=torch.bool)
        for mask, annotation in zip(masks, found):
            shift = annotation["id"] % 4
            mask[shift:] = torch.from_numpy(self.coco.annToMask(annotation)).bool()[: size[0] - shift]
        ids = torch.tensor([annotation["id"] for annotation in found], dtype=torch.int64)
        classes = torch.tensor([annotation["category_id"] - 1 for annotation in found], dtype=torch.int64)
        return Instances(
            size,
            pred_masks=masks,
            pred_boxes=Boxes(torch.tensor([[0.0, 0.0, 9.0, 9.0]]).repeat(len(found), 1)),
            scores=torch.where(ids % 5 == 0, 0.9, 0.5),
            pred_classes=torch.where(ids % 7 == 0, (classes + 1) % 4, classes),
        )


def make_cfg(files, output_dir):
    if files[0] not in DatasetCatalog:
        register_coco_json(files[0], *files, for_evaluation=True)
    return tiny_cfg("DATASETS.TEST", files[:1], "OUTPUT_DIR", output_dir, "MODEL.SPARSE_INST.DECODER.NUM_CLASSES", 4)


def evaluate_guesses(files, output_dir):
    return json.dumps(evaluate(make_cfg(files, output_dir), Guesser(files[0])))


@pytest.mark.parametrize(
    ("num_images", "num_ranks"),
    [
        (7, 2),
        (7, 3),
        (2, 3),  # a rank without images
    ],
)
def test_results_are_those_of_one_process(tmp_path, num_images, num_ranks):
    files, by_one, by_ranks = write_shapes(tmp_path, num_images, seed=1), tmp_path / "one", tmp_path / "ranks"
    for output_dir in (by_one, by_ranks):
        output_dir.mkdir()
    one = evaluate_guesses(files, str(by_one))
    first, *others = run_ranks(num_ranks, evaluate_guesses, files, str(by_ranks))
    assert json.loads(one)["segm"]["AP"] > 10
    assert first == one and others == ["{}"] * (num_ranks - 1)
    predictions = [path / "inference" / "coco_instances_results.json" for path in (by_one, by_ranks)]
    assert predictions[0].read_text() == predictions[1].read_text()
    written = json.loads((by_ranks / "results.json").read_text())
    assert json.dumps(written["results"]) == first
    speed = written["speed"]
    assert speed["num_processes"] == num_ranks
    assert speed["num_batches"] + speed["warmup_batches"] == num_images


def summarize_speed(batches_of_ranks):
    timer, seconds = StageTimer(), batches_of_ranks[comm.get_rank()]
    if seconds:
        timer.seconds = {"preprocessing": seconds, "network": [0.0] * len(seconds)}
    return json.dumps(speed_summary(timer, [2] * len(seconds)))


def test_speed_of_all_ranks_by_hand():
    # Two batches of 2 images after five of warm-up, one batch, and none: 4 images in 0.2 s and 2 in 0.5 s.
    batches = [[9.0] * 5 + [0.05, 0.15], [0.5], []]
    first, *others = [json.loads(speed) for speed in run_ranks(3, summarize_speed, batches)]
    assert first["images_per_second"] == pytest.approx(4 / 0.2 + 2 / 0.5)
    assert first["stages"]["network"]["median_ms"] == 0
    assert first["stages"]["total"]["median_ms"] == pytest.approx(150)
    assert (first["num_batches"], first["warmup_batches"], first["num_processes"]) == (3, 5, 3)
    assert others == [{}, {}]


def evaluate_with_other_statistics(files, output_dir):
    model = tiny_model("MODEL.SPARSE_INST.DECODER.NUM_CLASSES", 4)
    for buffer in model.buffers():
        buffer.add_(comm.get_rank())
    evaluate(make_cfg(files, output_dir), model)
    return [buffer.clone() for buffer in model.buffers()]


def test_running_statistics_are_those_of_rank_0(tmp_path):
    files = write_shapes(tmp_path, 2, seed=1)
    first, second = run_ranks(2, evaluate_with_other_statistics, files, str(tmp_path))
    original = list(tiny_model("MODEL.SPARSE_INST.DECODER.NUM_CLASSES", 4).buffers())
    assert len(first) == len(original) > 10
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, original))

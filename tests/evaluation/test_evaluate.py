"""Evaluation: the evaluators, the limit of detections, the speed table."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from torch import nn

from sparseinst.evaluation import StageTimer, build_evaluator, evaluate, stage_timer
from sparseinst.evaluation.evaluate import speed_summary, speed_table
from sparseinst.runtime.exported_model import ExportedSegmenter
from sparseinst.runtime.optimize import OptimizedSegmenter, optimize_for_inference
from sparseinst.structures.rle_masks import RLEMasks
from tests.runtime.test_exported_files import METADATA
from tests.shapes_data import CLASS_NAMES, register_shapes
from tests.tiny_model import tiny_cfg, tiny_model

STAGES = ("preprocessing", "network", "post-processing")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return register_shapes(tmp_path_factory.mktemp("shapes"), "evaluation_val", 7)


def make_cfg(dataset, output_dir, *opts):
    return tiny_cfg(
        "DATASETS.TEST", (dataset,), "OUTPUT_DIR", str(output_dir), "MODEL.SPARSE_INST.DECODER.NUM_CLASSES", 4, *opts
    )


def test_results_and_speed_are_written(dataset, tmp_path, monkeypatch):
    # Each look at the clock takes a second.
    clock = itertools.count()
    monkeypatch.setattr(stage_timer, "now", lambda device: next(clock))
    cfg = make_cfg(dataset, tmp_path)
    results = evaluate(cfg, tiny_model("MODEL.SPARSE_INST.DECODER.NUM_CLASSES", 4))
    assert {"AP", "AP50", "AP75", "APs", "APm", "APl"} <= results["segm"].keys()
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["results"]["segm"]["AP50"] == pytest.approx(results["segm"]["AP50"])
    speed = written["speed"]
    assert speed["stages"] == {
        **{stage: {"median_ms": 1e3, "p95_ms": 1e3} for stage in STAGES}, "total": {"median_ms": 3e3, "p95_ms": 3e3}
    }  # fmt: skip
    assert speed["num_batches"] == 2 and speed["warmup_batches"] == 5 and speed["batch_size"] == 1
    assert speed["images_per_second"] == pytest.approx(1 / 3) and speed["peak_memory_mb"] > 50
    assert speed["precision"] == "float32" and "cpu" in speed["device"]
    # 7 images, and the end of the data. The model's own timer reads the clock six times for each image. Outside of the
    # 26 other stages a second passes before and after each.
    assert written["seconds"] == {
        "preparing": 1, "waiting for data": 8, "model": 7 * 7, "results": 7, "gathering": 1, "writing": 1,
        "AP of bbox": 1, "AP of segm": 1, "the rest": 27,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("of_file", "of_engine", "reported"),
    [("float32", "float32", "float32"), ("float16", "float32", "float16"), ("float32", "bfloat16", "bfloat16"),
     ("int8", "float32", "int8"), ("int8", "bfloat16", "int8 and bfloat16")],
)  # fmt: skip
def test_the_precision_of_a_file_and_of_its_engine_is_written(dataset, tmp_path, of_file, of_engine, reported):
    model = tiny_model("MODEL.SPARSE_INST.DECODER.NUM_CLASSES", 4)
    metadata = dataclasses.replace(METADATA, precision=of_file, class_names=CLASS_NAMES)
    evaluate(make_cfg(dataset, tmp_path), ExportedSegmenter(model, model.network, metadata, of_engine))
    assert json.loads((tmp_path / "results.json").read_text())["speed"]["precision"] == reported


def test_the_precision_of_an_optimized_model_is_written(dataset, tmp_path):
    model = tiny_model("MODEL.SPARSE_INST.DECODER.NUM_CLASSES", 4)
    # As an engine computes that has no parameters of its own.
    optimized = OptimizedSegmenter(model, model.network, "bfloat16")
    evaluate(make_cfg(dataset, tmp_path), optimized)
    assert json.loads((tmp_path / "results.json").read_text())["speed"]["precision"] == "bfloat16"
    assert optimize_for_inference(model, precision="bfloat16").precision == "bfloat16"
    assert optimize_for_inference(model).precision == "float32"


@pytest.mark.parametrize("limit", [100, 300])
def test_the_log_says_where_more_detections_count_than_in_coco(dataset, tmp_path, caplog, limit):
    opts = ("MODEL.SPARSE_INST.DECODER.NUM_CLASSES", 4, "MODEL.SPARSE_INST.MAX_DETECTIONS", limit)
    with caplog.at_level("INFO", logger="sparseinst.evaluation.evaluate"):
        evaluate(make_cfg(dataset, tmp_path, *opts), truth_model(dataset, *opts))
    (line,) = [message for message in caplog.messages if message.startswith("Results on")]
    note = ", of the best 300 detections of an image (COCO's AP: 100)" * (limit == 300)
    assert line.startswith(f"Results on {dataset}, in percent{note}:\n")


def timer_of(*batches):
    timer = StageTimer()
    timer.seconds = dict(zip(STAGES, map(list, zip(*batches))))
    return timer


def test_speed_summary_by_hand():
    # Five batches of warm-up, then two of 2 images: 1 + 2 + 3 ms and 3 + 4 + 5 ms.
    timer = timer_of(*[(9.0, 9.0, 9.0)] * 5, (0.001, 0.002, 0.003), (0.003, 0.004, 0.005))
    speed = speed_summary(timer, [2] * 7)
    assert [speed["stages"][name]["median_ms"] for name in (*STAGES, "total")] == pytest.approx([2, 3, 4, 9])
    assert speed["stages"]["total"]["p95_ms"] == pytest.approx(np.percentile([6, 12], 95))
    assert speed["images_per_second"] == pytest.approx(4 / 0.018)
    assert "post-processing" in speed_table({**speed, "precision": "float32"})


def test_a_single_batch_is_not_all_warm_up():
    assert speed_summary(timer_of((0.001, 0.001, 0.001)), [1])["num_batches"] == 1


def test_evaluator_by_type(dataset, tmp_path):
    cfg = make_cfg(dataset, tmp_path, "MODEL.SPARSE_INST.MAX_DETECTIONS", 300)
    assert build_evaluator(cfg, dataset).max_detections == 300
    assert build_evaluator(make_cfg(dataset, tmp_path), dataset).max_detections == 100
    MetadataCatalog.get("evaluation_unknown").set(evaluator_type="panoptic")
    with pytest.raises(ValueError, match="panoptic"):
        build_evaluator(cfg, "evaluation_unknown")


def test_a_model_that_finds_nothing_has_results(dataset, tmp_path):
    model = tiny_model("MODEL.SPARSE_INST.DECODER.NUM_CLASSES", 4, "MODEL.SPARSE_INST.CLS_THRESHOLD", 1.0)
    assert {"bbox", "segm"} <= evaluate(make_cfg(dataset, tmp_path), model).keys()


def test_encoded_masks_have_the_same_ap_to_the_last_digit(dataset, tmp_path):
    # Every prediction is taken, so that AP is not 0.
    opts = ("MODEL.SPARSE_INST.DECODER.NUM_CLASSES", 4, "MODEL.SPARSE_INST.CLS_THRESHOLD", 0.0)
    results, written = [], []
    for mask_format in ("bitmask", "rle"):
        model = truth_model(dataset, *opts, "MODEL.OUTPUT.MASK_FORMAT", mask_format)
        results.append(evaluate(make_cfg(dataset, tmp_path / mask_format), model))
        written.append((tmp_path / mask_format / "inference" / "coco_instances_results.json").read_text())
    assert results[0]["segm"]["AP"] > 5 and written[0] == written[1]
    assert repr(results[0]) == repr(results[1])


def truth_model(dataset, *opts):
    """A model whose masks are a data set's objects, blurred, so that some overlap well enough and some do not."""
    model = tiny_model(*opts)
    truth = {record["file_name"]: record["annotations"] for record in DatasetCatalog.get(dataset)}

    def network(images):
        annotations = truth[model.file_name]
        classes = torch.full((1, len(annotations), 4), -3.0)
        masks = torch.full((1, len(annotations), 16, 16), -4.0)
        for index, annotation in enumerate(annotations):
            x, y, width, height = (int(value / 4 + 0.5) for value in annotation["bbox"])
            masks[0, index, y : y + height, x : x + width] = 3.0
            classes[0, index, annotation["category_id"]] = 2.0 - index / 5
        return {"pred_logits": classes, "pred_scores": classes.amax(2, keepdim=True), "pred_masks": masks}

    preprocess = model.preprocess

    def remember(batched_inputs):
        model.file_name = batched_inputs[0]["file_name"]
        return preprocess(batched_inputs)

    model.preprocess = remember
    model.network = network
    return model


def test_masks_are_encoded_where_they_are_made(dataset, tmp_path, monkeypatch):
    model = truth_model(dataset, "MODEL.SPARSE_INST.DECODER.NUM_CLASSES", 4)
    formats = []
    postprocess = model.postprocess
    model.postprocess = lambda *args: formats.append(model.output.mask_format) or postprocess(*args)
    # Not those that are whole.
    monkeypatch.setattr(RLEMasks, "encode", None)
    evaluate(make_cfg(dataset, tmp_path), model)
    assert set(formats) == {"rle"} and model.output.mask_format == "bitmask"

    model.postprocess = None
    with pytest.raises(TypeError):
        evaluate(make_cfg(dataset, tmp_path), model)
    assert model.output.mask_format == "bitmask"


class AnyModel(nn.Module):
    """A Detectron2 model without stages and parameters, which finds the whole image."""

    def forward(self, batched_inputs):
        assert not self.training
        return [{"instances": self._whole(x["height"], x["width"])} for x in batched_inputs]

    def _whole(self, height, width):
        return Instances(
            (height, width),
            pred_boxes=Boxes(torch.tensor([[0.0, 0, width, height]])),
            pred_masks=torch.ones(1, height, width, dtype=torch.bool),
            scores=torch.tensor([0.5]),
            pred_classes=torch.tensor([3]),
        )


@pytest.mark.parametrize("training", [False, True])
def test_any_model_is_evaluated_and_its_mode_restored(dataset, tmp_path, training):
    model = AnyModel().train(training)
    assert {"bbox", "segm"} <= evaluate(make_cfg(dataset, tmp_path), model).keys()
    assert model.training is training
    assert set(json.loads((tmp_path / "results.json").read_text())["speed"]["stages"]) == {"model", "total"}


def test_the_time_is_logged(dataset, tmp_path, caplog):
    with caplog.at_level("INFO", logger="sparseinst.evaluation.evaluate"):
        evaluate(make_cfg(dataset, tmp_path), tiny_model("MODEL.SPARSE_INST.DECODER.NUM_CLASSES", 4))
    (line,) = [message for message in caplog.messages if message.startswith("Evaluation took")]
    assert " s: preparing " in line and ", model " in line and "AP of segm" in line


def test_the_faster_computation_is_chosen_by_the_config(dataset, tmp_path):
    pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed (extra fast-eval)")
    model = truth_model(dataset, "MODEL.SPARSE_INST.DECODER.NUM_CLASSES", 4)
    cfg = make_cfg(dataset, tmp_path, "TEST.COCO_EVAL", "faster-coco-eval")
    assert build_evaluator(cfg, dataset).coco_eval == "faster-coco-eval"
    fast, plain = evaluate(cfg, model), evaluate(make_cfg(dataset, tmp_path), model)
    assert plain["segm"]["AP"] > 5
    for task in ("bbox", "segm"):
        assert fast[task] == pytest.approx(plain[task], rel=1e-14, abs=0, nan_ok=True)


def test_several_data_sets(dataset, tmp_path, tmp_path_factory):
    other = register_shapes(tmp_path_factory.mktemp("shapes"), "evaluation_other", 3, seed=1)
    cfg = make_cfg(dataset, tmp_path, "DATASETS.TEST", (dataset, other))
    results = evaluate(cfg, tiny_model("MODEL.SPARSE_INST.DECODER.NUM_CLASSES", 4))
    assert set(results) == {dataset, other} and "segm" in results[other]

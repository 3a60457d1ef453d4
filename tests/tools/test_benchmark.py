"""The benchmark: what it times, what it compares with, its figures and its errors; no test asserts a time."""

import json
import logging

import numpy as np
import pytest
import torch

from sparseinst.data.augmentations import build_test_augmentations
from sparseinst.engine.benchmark import STAGES, PlainSparseInst, drawn_outputs, measure, ratio, summarize
from sparseinst.modeling.optimization import optimize_for_inference
from sparseinst.tools import benchmark
from tests.tiny_model import random_input, tiny_cfg, tiny_model


@pytest.fixture(autouse=True)
def loggers_as_before():
    """The command's handlers write to a stream that is gone after the test."""
    loggers = [logging.getLogger(name) for name in ("fvcore", "detectron2", "sparseinst")]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before):
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_cfg().dump())
    return [
        "--config-file",
        str(path),
        "--size",
        "40",
        "60",
        "--repetitions",
        "3",
        "--warmup",
        "1",
        "--detections",
        "4",
    ]


def test_drawn_objects_are_what_post_processing_finds():
    model = tiny_model()
    inputs = [random_input(100, 140)]
    inputs[0].update(height=100, width=140)
    with torch.no_grad():
        images = model.preprocess_image(inputs)
        outputs = drawn_outputs(model.network(images.tensor), 5)
        plain = PlainSparseInst(model).postprocess(outputs, inputs, images)[0]["instances"]
        ours = model.postprocess(outputs, inputs, images)[0]["instances"]
    assert 1 <= len(plain) <= 5
    assert torch.equal(plain.pred_masks, ours.pred_masks)
    # Sums in another order.
    assert torch.allclose(plain.scores, ours.scores, atol=1e-6)
    assert torch.equal(plain.pred_boxes.tensor, ours.pred_boxes.tensor)
    assert torch.equal(plain.pred_classes, ours.pred_classes)


def test_areas_of_drawn_objects_are_typical():
    outputs = {
        "pred_logits": torch.zeros(1, 400, 3), "pred_scores": torch.zeros(1, 400, 1),
        "pred_masks": torch.zeros(1, 400, 80, 108),
    }  # fmt: skip
    areas = (drawn_outputs(outputs, 300)["pred_masks"][0] > 0).float().mean((1, 2))
    # A part of an object lies outside of the picture.
    assert 0.03 < areas[:300].median() < 0.05 and areas[:300].max() > 0.15
    assert areas[300:].max() == 0
    assert (drawn_outputs(outputs, 300, median_area=1)["pred_masks"][0, :300] > 0).all()


def test_measures_every_stage_in_turn():
    model = tiny_model()
    order = []

    class Spy(PlainSparseInst):
        def __init__(self, name):
            super().__init__(model)
            self.name = name

        def network(self, images):
            order.append(self.name)
            return super().network(images)

    picture = np.zeros((40, 60, 3), np.uint8)
    found = measure(
        {"a": Spy("a"), "b": Spy("b")}, [picture, picture], build_test_augmentations(tiny_cfg()),
        num_detections=3, repetitions=2, warmup=1,
    )  # fmt: skip
    assert order[:6] == ["a", "b"] * 3
    for measured in found.values():
        assert measured.stages.shape == (2, len(STAGES)) and (measured.stages >= 0).all()
        assert measured.batch_size == 2 and measured.parts.keys() == {"backbone", "encoder", "decoder"}
        assert np.allclose(measured.total(), measured.stages.sum(1))
        assert np.allclose(measured.published(), measured.stages[:, 1] + measured.stages[:, 2])


def test_keys_of_the_model_itself_take_effect():
    models = benchmark.build_models(tiny_cfg(), ["configured", "rle=MODEL.OUTPUT.MASK_FORMAT rle"])
    assert models["configured"].model.output_mask_format == "bitmask"
    assert models["rle"].model.output_mask_format == "rle"


def test_figures():
    values = np.array([0.001, 0.002, 0.003, 0.004, 0.010])
    assert summarize(values)["median_ms"] == pytest.approx(3.0)
    assert ratio(values, values / 2) == pytest.approx({"median": 2, "p5": 2, "p95": 2})


def test_parts_that_do_not_run_one_by_one_are_left_out():
    pytest.importorskip("openvino", reason="the package openvino (extra 'openvino') is not installed")
    model = optimize_for_inference(tiny_model(), engine="openvino")
    picture = np.zeros((40, 60, 3), np.uint8)
    found = measure(
        {"a": model}, [picture], build_test_augmentations(tiny_cfg()), num_detections=3, repetitions=1, warmup=0
    )
    assert found["a"].parts == {}


def test_the_command(config, tmp_path, capsys):
    path = tmp_path / "out" / "speed.json"
    code = benchmark.main(
        [*config, "--batch-sizes", "1", "2", "--json", str(path), "--stock", "--threads", "1",
         "--compare", "plain", "configured", "mine=FUSE False MODEL.OUTPUT.MASK_FORMAT rle"]
    )  # fmt: skip
    text = capsys.readouterr().out
    assert code == 0
    assert "times as fast as plain" in text and "Batch of 2, 3 repetitions after 1" in text and "mine" in text
    report = json.loads(path.read_text())
    assert [batch["batch_size"] for batch in report["batches"]] == [1, 2]
    settings = report["batches"][1]["settings"]
    assert settings.keys() == {"plain", "configured", "mine"}
    assert settings["plain"]["times_as_fast_as_first"]["median"] == 1
    assert settings["mine"].keys() >= {*STAGES, "as published", "end to end", "peak_mb", "images_per_second"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--compare", "fastest"], "--compare fastest: there are plain, configured"),
        (["--compare", "mine=FUSED True"], "--compare mine=FUSED True"),
        (["--compare", "mine=FUSE"], "--compare mine=FUSE"),
        (["--detections", "7"], "--detections is 7; MODEL.SPARSE_INST.DECODER.NUM_MASKS allows 0 to 6"),
        (["--repetitions", "0"], "--repetitions has 0"),
        (["--area", "0"], "--area is 0"),
        (["--input", "missing.jpg"], "missing.jpg"),
    ],
)
def test_errors(config, capsys, args, message):
    assert benchmark.main([*config, *args]) == 2
    assert message in capsys.readouterr().err

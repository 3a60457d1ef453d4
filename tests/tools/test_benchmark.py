"""The benchmark: what it times, what it compares with, its figures and its errors; no test asserts a time."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from torch import nn

from sparseinst.benchmarks import inference as benchmark_of_inference
from sparseinst.benchmarks import settings
from sparseinst.benchmarks.inference import INFERENCE_STAGES, measure_models
from sparseinst.benchmarks.settings import Measurement, report
from sparseinst.data.augmentations import build_test_augmentations
from sparseinst.runtime import exported_model
from sparseinst.runtime.optimize import optimize_for_inference
from sparseinst.tools import benchmark
from tests.oracles.postprocessing import naive_postprocess
from tests.tiny_model import random_input, tiny_cfg, tiny_model

pytestmark = pytest.mark.usefixtures("loggers_as_before")
IMAGE = np.zeros((40, 60, 3), np.uint8)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_cfg().dump())
    counts = ["--repetitions", "3", "--warmup", "1", "--detections", "4"]
    return ["--config-file", str(path), "--size", "40", "60", *counts]


def test_drawn_objects_are_what_post_processing_finds():
    model = tiny_model()
    inputs = [random_input(100, 140)]
    inputs[0].update(height=100, width=140)
    with torch.no_grad():
        images = model.preprocess(inputs)
        outputs = model.example_outputs(model.network(images.tensor), 5, 0.05)
        naive = naive_postprocess(model, outputs, inputs, images)[0]["instances"]
        ours = model.postprocess(outputs, inputs, images)[0]["instances"]
    assert 1 <= len(naive) <= 5
    assert torch.equal(naive.pred_masks, ours.pred_masks)
    # Sums in another order.
    assert torch.allclose(naive.scores, ours.scores, atol=1e-6)
    assert torch.equal(naive.pred_boxes.tensor, ours.pred_boxes.tensor)
    assert torch.equal(naive.pred_classes, ours.pred_classes)


def test_areas_of_drawn_objects_are_typical():
    outputs = {
        "pred_logits": torch.zeros(1, 400, 3), "pred_scores": torch.zeros(1, 400, 1),
        "pred_masks": torch.zeros(1, 400, 80, 108),
    }  # fmt: skip
    model = tiny_model()
    areas = (model.example_outputs(outputs, 300, 0.05)["pred_masks"][0] > 0).float().mean((1, 2))
    # A part of an object lies outside of the image.
    assert 0.03 < areas[:300].median() < 0.05 and areas[:300].max() > 0.15
    assert areas[300:].max() == 0
    assert (model.example_outputs(outputs, 300, 1)["pred_masks"][0, :300] > 0).all()


class Stages(nn.Module):
    """A model of another family: a network of two parts, and nothing that draws objects."""

    device = torch.device("cpu")

    def __init__(self, name, order):
        super().__init__()
        self.trunk, self.head, self.unused = nn.Sequential(nn.Conv2d(3, 4, 1)), nn.Conv2d(4, 1, 1), nn.Conv2d(1, 1, 1)
        self.name, self.order, self.postprocessed = name, order, []

    def preprocess(self, batched_inputs):
        return tiny_model().preprocess(batched_inputs)

    def network(self, images):
        self.order.append(self.name)
        return {"out": self.head(self.trunk(images))}

    def example_outputs(self, outputs, num_objects, median_area):
        return outputs

    def postprocess(self, outputs, batched_inputs, images):
        self.postprocessed.append(outputs.keys())
        return [{"instances": torch.zeros(1)} for _ in batched_inputs]


def augmentations(*names):
    return {name: T.AugmentationList(build_test_augmentations(tiny_cfg())) for name in names}


def test_measures_every_stage_of_any_model_in_turn():
    order = []
    models = {name: Stages(name, order) for name in "ab"}
    found = measure_models(models, [IMAGE, IMAGE], augmentations(*models), num_detections=3, repetitions=2, warmup=1)
    # Once for outputs to post-process, then the repetitions.
    assert order[:8] == ["a", "b"] * 4
    assert models["a"].postprocessed == [{"out": 0}.keys()] * 3
    for measured in found.values():
        assert list(measured.stages) == [*INFERENCE_STAGES, "as published", "end to end"]
        assert all(seconds.shape == (2,) and (seconds >= 0).all() for seconds in measured.stages.values())
        assert measured.batch_size == 2 and list(measured.more["parts_ms"]) == ["trunk", "head"]
        assert np.allclose(measured.totals, sum(measured.stages[stage] for stage in INFERENCE_STAGES))
        published = measured.stages["network"] + measured.stages["post-processing"]
        assert np.allclose(measured.stages["as published"], published)


def test_parts_of_an_optimized_model_keep_their_names_and_of_openvino_there_are_none():
    def parts(model):
        found = measure_models({"a": model}, [IMAGE], augmentations("a"), num_detections=3, repetitions=1, warmup=0)
        return list(found["a"].more["parts_ms"])

    assert parts(tiny_model()) == parts(optimize_for_inference(tiny_model())) == ["backbone", "encoder", "decoder"]
    pytest.importorskip("openvino", reason="the package openvino (extra 'openvino') is not installed")
    assert parts(optimize_for_inference(tiny_model(), engine="openvino")) == []


def test_keys_of_the_model_itself_take_effect():
    models = benchmark.build_models(tiny_cfg(), ["configured", "rle=MODEL.OUTPUT.MASK_FORMAT rle"])
    assert models["configured"][0].output.mask_format == "bitmask"
    assert models["rle"][0].output.mask_format == "rle"


def test_figures():
    seconds = np.array([0.001, 0.002, 0.003, 0.004, 0.010])
    slow = Measurement({"network": seconds}, seconds, 2, None, {"parts_ms": {}})
    fast = Measurement({"network": seconds / 2}, seconds / 2, 2, 2**20, {"parts_ms": {}})
    figures = report({"slow": slow, "fast": fast})
    assert figures["slow"]["network"] == pytest.approx({"median_ms": 3.0, "p5_ms": 1.2, "p95_ms": 8.8})
    assert figures["slow"]["images_per_second"] == pytest.approx(2 / 0.003)
    assert figures["fast"]["times_as_fast_as_first"] == pytest.approx({"median": 2, "p5": 2, "p95": 2})
    assert figures["slow"]["peak_mb"] is None and figures["fast"]["peak_mb"] == 1


def test_the_command(config, tmp_path, capsys):
    path = tmp_path / "out" / "speed.json"
    code = benchmark.main(
        [*config, "--batch-sizes", "1", "2", "--json", str(path), "--threads", "1",
         "--compare", "eager", "configured", "mine=FUSE False MODEL.OUTPUT.MASK_FORMAT rle"]
    )  # fmt: skip
    text = capsys.readouterr().out
    assert code == 0
    assert "times as fast as eager" in text and "Batch of 2, 3 repetitions after 1" in text and "mine" in text
    written = json.loads(path.read_text())
    assert written["detections"] == 4 and [batch["batch_size"] for batch in written["batches"]] == [1, 2]
    settings = written["batches"][1]["settings"]
    assert settings.keys() == {"eager", "configured", "mine"}
    assert settings["eager"]["times_as_fast_as_first"]["median"] == 1
    keys = {*INFERENCE_STAGES, "as published", "end to end", "parts_ms", "peak_mb", "images_per_second"}
    assert settings["mine"].keys() >= keys
    assert settings["mine"]["parts_ms"].keys() == {"backbone", "encoder", "decoder"}


def test_busy_processes_spin_while_the_models_are_timed(config, monkeypatch, capsys):
    started, popen, measure = [], settings.subprocess.Popen, benchmark_of_inference.measure_models

    def start(*args, **kwargs):
        process = popen(*args, **kwargs)
        if "-S" in args[0]:
            started.append(process)
        return process

    def measured(*args, **kwargs):
        assert len(started) == 2 and [process.poll() for process in started] == [None, None]
        return measure(*args, **kwargs)

    monkeypatch.setattr(settings.subprocess, "Popen", start)
    monkeypatch.setattr(benchmark_of_inference, "measure_models", measured)
    assert benchmark.main([*config, "--busy", "2"]) == 0
    assert "with 2 spinning processes" in capsys.readouterr().out
    assert len(started) == 2 and all(process.returncode is not None for process in started)


def test_several_configs_at_their_own_sizes(config, tmp_path, capsys):
    path, other = tmp_path / "speed.json", tmp_path / "large.yaml"
    other.write_text(tiny_cfg("INPUT.MIN_SIZE_TEST", 160).dump())
    first, others = config[1], config[2:]
    assert benchmark.main(["--config-file", first, str(other), *others, "--json", str(path)]) == 0
    assert "times as fast as tiny" in capsys.readouterr().out
    written = json.loads(path.read_text())
    assert written["configs"] == [first, str(other)]
    assert written["batches"][0]["settings"].keys() == {"tiny", "large"}
    assert written["batches"][0]["settings"]["tiny"]["peak_mb"] is None
    compared = ["--json", str(path), "--compare", "eager", "fused"]
    assert benchmark.main(["--config-file", first, str(other), *others, *compared]) == 0
    settings = json.loads(path.read_text())["batches"][0]["settings"]
    assert list(settings) == ["tiny eager", "tiny fused", "large eager", "large fused"]


@pytest.mark.parametrize(
    ("args", "is_measured"),
    [([], True), (["--compare", "eager", "fused"], False), (["--batch-sizes", "2", "1"], False)],
)
def test_on_the_cpu_the_peak_is_that_of_a_single_row(config, tmp_path, args, is_measured):
    path = tmp_path / "speed.json"
    assert benchmark.main([*config, "--json", str(path), *args]) == 0
    for batch in json.loads(path.read_text())["batches"]:
        assert all((each["peak_mb"] is not None) == is_measured for each in batch["settings"].values())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--compare", "fastest"], "--compare fastest: there are configured, eager"),
        (["--compare", "eager", "exported/modle.onnx"], "--compare: the file exported/modle.onnx does not exist"),
        (["--compare", "mine=FUSED True"], "--compare mine=FUSED True"),
        (
            ["--compare", "RUNTIME.ENGINE=openvino"],
            "openvino: expected NAME='KEY VALUE ...', such as mine='RUNTIME.KEY",
        ),
        (
            ["--compare", "winograd", "--opts", "MODEL.WEIGHTS", "a.onnx"],
            "--compare winograd: the exported file a.onnx of MODEL.WEIGHTS has no RUNTIME.FUSE",
        ),
        (["--compare", "mine=ENGINE openvino WINOGRAD False MODEL.WEIGHTS a.onnx"], "has no RUNTIME.WINOGRAD"),
        (["--compare", "a=FUSE True", "eager", "a=FUSE False"], "--compare: a is given more than once"),
        (["--compare", "eager", "eager"], "--compare: eager is given more than once"),
        (["--detections", "7"], "7 objects in an image: MODEL.SPARSE_INST.DECODER.NUM_MASKS allows 0 to 6"),
        (["--busy", "-1"], "--busy is -1; it must be at least 0"),
        (["--repetitions", "0"], "--repetitions is 0; it must be at least 1"),
        (["--area", "0"], "--area is 0"),
        (["--threads", "0"], "--threads is 0"),
        (["--input", "missing.jpg"], "missing.jpg"),
        (["--opts", "MODEL.META_ARCHITECTURE", "ProposalNetwork"], "MODEL.META_ARCHITECTURE"),
    ],
)
def test_errors(config, capsys, args, message):
    assert benchmark.main([*config, *args]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_files_of_one_name_are_told_apart_by_their_folders(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = [Path(folder, "model.onnx") for folder in ("fp32", "int8/a", "int8/b")] + [Path("int8/a/other.onnx")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
    monkeypatch.setattr(exported_model, "follow_exported", lambda cfg: None)
    monkeypatch.setattr(exported_model, "load_exported", lambda cfg: cfg.MODEL.WEIGHTS)
    models = benchmark.build_models(tiny_cfg(), ["eager", *map(str, files)])
    assert list(models) == ["eager", "fp32/model.onnx", "a/model.onnx", "b/model.onnx", "other.onnx"]
    assert [models[name][0] for name in list(models)[1:]] == list(map(str, files))
    on_file = benchmark.build_models(tiny_cfg("MODEL.WEIGHTS", "other.onnx"), ["configured", "openvino"])
    assert [model for model, _ in on_file.values()] == ["other.onnx"] * 2
    with pytest.raises(ValueError, match="--compare: fp32/model.onnx is given more than once"):
        benchmark.build_models(tiny_cfg(), ["fp32/model.onnx", "./fp32/model.onnx"])


def test_configs_of_one_name_are_told_apart_by_their_folders(config, tmp_path):
    path, other = tmp_path / "speed.json", tmp_path / "large" / "tiny.yaml"
    other.parent.mkdir()
    other.write_text(tiny_cfg("INPUT.MIN_SIZE_TEST", 160).dump())
    first, others = config[1], config[2:]
    assert benchmark.main(["--config-file", first, str(other), *others, "--json", str(path)]) == 0
    names = list(json.loads(path.read_text())["batches"][0]["settings"])
    assert names == [f"{tmp_path.name}/tiny", "large/tiny"]

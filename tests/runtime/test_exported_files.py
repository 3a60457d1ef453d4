"""Batches, metadata and damaged files, without a single export."""

import dataclasses
import json
import logging
import zipfile
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T

from sparseinst import load_config
from sparseinst.data.augmentations import ResizeToFit
from sparseinst.inference import Predictor
from sparseinst.runtime import exported_file, exported_model, tensorrt
from sparseinst.runtime.batches import in_batches
from sparseinst.runtime.export import InputRule, input_rule
from sparseinst.runtime.exported_file import ExportMetadata, is_exported, read_metadata
from sparseinst.runtime.exported_model import (
    ExportedSegmenter,
    config_of_run,
    exported_config,
    load_exported,
    open_network,
)
from tests.modeling.solo.tiny_solo import tiny_solo_cfg
from tests.modeling.yolact.tiny_yolact import tiny_yolact, tiny_yolact_cfg
from tests.tiny_model import NUM_CLASSES, random_input, tiny_cfg, tiny_model

METADATA = ExportMetadata(
    meta_architecture="SparseInst", config=tiny_cfg().dump(), class_names=["a", "b", "c"], category_ids=[1, 5, 7],
    input="normalized", channel_order="RGB", pixel_mean=list(tiny_cfg().MODEL.PIXEL_MEAN),
    pixel_std=list(tiny_cfg().MODEL.PIXEL_STD), size_divisibility=32, size=None, batch=None, short_side=64,
    long_side=1333, outputs=["pred_logits"], postprocessing={}, max_detections=0, precision="float32",
    has_deform_conv=False, weights_sha256="0", version="0",
)  # fmt: skip


def field(number, content: bytes) -> bytes:
    """A length-delimited field of protobuf with a short number."""
    return bytes([number << 3 | 2]) + varint(len(content)) + content


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def onnx_file(path, text=None, **changes):
    """Write what an ONNX file begins and ends with; its graph is 300 zeros."""
    text = dataclasses.replace(METADATA, **changes).to_json() if text is None else text
    entry = field(1, b"sparseinst") + field(2, text.encode())
    # ir_version is a number: field 1 of wire type 0.
    path.write_bytes(
        b"\x08\x09" + field(7, bytes(300)) + field(14, field(1, b"other") + field(2, b"x")) + field(14, entry)
    )
    return path


@pytest.mark.parametrize(("count", "size", "calls"), [(5, 2, 3), (4, 2, 2), (1, 3, 1), (3, 3, 1), (7, None, 1)])
def test_batches_are_filled_up(count, size, calls):
    seen = []

    def network(images):
        seen.append(len(images))
        return {"sums": images.sum((1, 2, 3))}

    images = torch.rand(count, 3, 2, 2)
    assert torch.equal(in_batches(network, images, size)["sums"], images.sum((1, 2, 3)))
    assert seen == [size or count] * calls


@pytest.mark.parametrize(("count", "calls"), [(1, [1]), (4, [4]), (5, [4, 1]), (9, [4, 4, 1])])
def test_batches_beyond_the_largest_are_split(tmp_path, monkeypatch, count, calls):
    """TensorRT's engines have a largest batch."""
    (tmp_path / "m.engine").write_bytes(b"")
    seen = []
    monkeypatch.setattr(
        tensorrt, "TensorRTNetwork", lambda path: lambda images: {"sums": seen.append(len(images)) or images.sum(1)}
    )
    network = open_network(tmp_path / "m.engine", dataclasses.replace(METADATA, max_batch=4), "torch", 0, [])
    images = torch.rand(count, 3, 2, 2)
    assert torch.equal(network(images)["sums"], images.sum(1)) and seen == calls


def test_sizes_that_preprocessing_makes():
    model = tiny_model()
    assert input_rule(model) == InputRule(32)
    # A model whose preprocessing resizes to its own size.
    model.preprocess = lambda inputs: type("Images", (), {"tensor": torch.zeros(1, 3, 550, 550)})
    assert input_rule(model) == InputRule(0, (550, 550))


def test_a_fixed_batch_of_tensorrt_is_filled_up(tmp_path, monkeypatch):
    (tmp_path / "m.engine").write_bytes(b"")
    seen = []
    monkeypatch.setattr(
        tensorrt, "TensorRTNetwork", lambda path: lambda images: {"sums": seen.append(len(images)) or images.sum(1)}
    )
    network = open_network(tmp_path / "m.engine", dataclasses.replace(METADATA, batch=2), "torch", 0, [])
    images = torch.rand(3, 3, 2, 2)
    assert torch.equal(network(images)["sums"], images.sum(1)) and seen == [2, 2]


def test_an_image_fits_its_static_size():
    for height, width, expected in ((30, 40, (64, 85)), (40, 30, (64, 48)), (64, 96, (64, 96)), (1, 900, (1, 96))):
        x = T.AugInput(np.zeros((height, width, 3), np.uint8))
        T.AugmentationList([ResizeToFit((64, 96))])(x)
        assert x.image.shape[:2] == expected


def test_metadata_of_onnx_are_read_without_the_package(tmp_path):
    assert read_metadata(onnx_file(tmp_path / "m.onnx", size=[64, 96])) == dataclasses.replace(METADATA, size=[64, 96])
    assert is_exported("a/m.onnx") and is_exported("m.xml") and not is_exported("m.pth") and not is_exported("")


def test_a_program_of_openvino_is_read_once(tmp_path, monkeypatch):
    read = []
    info = SimpleNamespace(astype=lambda kind: METADATA.to_json())
    program = SimpleNamespace(has_rt_info=lambda key: True, get_rt_info=lambda key: info)
    monkeypatch.setattr(exported_file, "read_program", lambda path: read.append(path) or program)
    path = tmp_path / "m.xml"
    for content in ("a", "longer"):
        path.write_text(content)
        assert read_metadata(path).class_names == read_metadata(path).class_names == METADATA.class_names
    assert read == [path, path]


@pytest.mark.parametrize("suffix", [".onnx", ".xml", ".pt2", ".engine"])
@pytest.mark.parametrize("content", [b"", b"not a model", bytes(range(256)) * 40])
def test_other_files_are_refused_in_one_line(tmp_path, suffix, content):
    path = tmp_path / f"m{suffix}"
    path.write_bytes(content)
    if suffix == ".xml":
        pytest.importorskip("openvino", reason="the package openvino (extra 'openvino') is not installed")
    with pytest.raises(ValueError, match="cannot be read|no metadata|cannot read") as caught:
        read_metadata(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_cut_off(tmp_path):
    path = onnx_file(tmp_path / "m.onnx")
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cannot be read|no metadata"):
            read_metadata(path)


@pytest.mark.parametrize("length", [2**40, 2**63 - 1, 2**69])
@pytest.mark.parametrize("prefix", [b"", b"\x72\x7f\x12"], ids=["field", "entry"])
def test_a_length_beyond_the_file(tmp_path, prefix, length):
    # Field 7, the graph; or field 14, an entry of the metadata, whose value has the length.
    (tmp_path / "m.onnx").write_bytes((prefix or b"\x3a") + varint(length) + bytes(200))
    with pytest.raises(ValueError, match="cannot be read|no metadata"):
        read_metadata(tmp_path / "m.onnx")


def test_a_damaged_archive(tmp_path):
    path = tmp_path / "m.pt2"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/extra/sparseinst", METADATA.to_json())
    content = bytearray(path.read_bytes())
    # The data begin after a header of 30 bytes and the name.
    content[50:60] = b"\xff" * 10
    path.write_bytes(content)
    with pytest.raises(ValueError, match="m.pt2 cannot be read"):
        read_metadata(path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", "[" * 100_000, json.dumps({"meta_architecture": 3})])
def test_metadata_of_others(tmp_path, text):
    with pytest.raises(ValueError, match="no metadata of `sparseinst export`"):
        read_metadata(onnx_file(tmp_path / "m.onnx", text))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("config", 5), ("class_names", "abc"), ("category_ids", ["1", "5", "7"]), ("pixel_mean", None), ("size", 640),
        ("size_divisibility", 32.5), ("has_deform_conv", "no"), ("postprocessing_weights", {"a": 1}),
    ],
)  # fmt: skip
def test_metadata_of_a_wrong_type(tmp_path, name, value):
    path = onnx_file(tmp_path / "m.onnx", **{name: value})
    with pytest.raises(ValueError) as error:
        Predictor(path)
    assert "m.onnx has no metadata of `sparseinst export`" in str(error.value)
    assert f"{name} is {value!r}" in str(error.value) and "\n" not in str(error.value)


def test_a_file_runs_no_code(tmp_path):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    config = METADATA.config.replace("IMPORTS: []", f"IMPORTS: [{tmp_path / 'evil.py'}]")
    path = onnx_file(tmp_path / "m.onnx", config=config)
    with pytest.raises(ValueError, match=r"m\.onnx.* imports .*evil.*not allowed here. Pass your own config file too"):
        Predictor(path)
    assert not (tmp_path / "ran").exists()


def test_the_config_of_a_file(tmp_path):
    path = onnx_file(tmp_path / "m.onnx")
    cfg = config_of_run("", ["MODEL.SPARSE_INST.CLS_THRESHOLD", "0.25", "MODEL.WEIGHTS", str(path)])
    assert cfg.MODEL.WEIGHTS == str(path) and cfg.MODEL.SPARSE_INST.CLS_THRESHOLD == 0.25
    assert cfg.MODEL.SPARSE_INST.DECODER.NUM_CLASSES == NUM_CLASSES
    with pytest.raises(ValueError, match="--config-file is missing"):
        config_of_run("", ["MODEL.WEIGHTS", "model.pth"])
    with pytest.raises(ValueError, match="--import needs --config-file"):
        config_of_run("", ["MODEL.WEIGHTS", str(path)], ["mine.py"])
    with pytest.raises(ValueError, match="which does not exist"):
        exported_config(tmp_path / "other.onnx")
    with pytest.raises(ValueError, match="'model.pth' is neither"):
        Predictor("model.pth")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("INPUT.FORMAT", "BGR", "INPUT.FORMAT is BGR, and the network .* was exported with RGB"),
        ("MODEL.PIXEL_MEAN", [1.0, 2.0, 3.0], "MODEL.PIXEL_MEAN is"),
        ("MODEL.SPARSE_INST.DECODER.NUM_CLASSES", 4, "NUM_CLASSES is 4, and the network .* was exported with 3"),
        ("RUNTIME.ENGINE", "openvino", "OpenVINO cannot read the deformable convolutions"),
    ],
)
def test_a_config_of_another_model_is_refused(tmp_path, key, value, message):
    path = onnx_file(tmp_path / "m.onnx", has_deform_conv=True)
    (tmp_path / "config.yaml").write_text(tiny_cfg().dump())
    with pytest.raises(ValueError, match=message):
        load_exported(load_config(str(tmp_path / "config.yaml"), ["MODEL.WEIGHTS", str(path), key, str(value)]))


def exported_yolact(path, **changes):
    """A file whose config and metadata are the tiny YOLACT's."""
    cfg = tiny_yolact_cfg()
    square = dict(meta_architecture="YOLACT", config=cfg.dump(), size_divisibility=0, size=[64, 64])
    means = dict(pixel_mean=list(cfg.MODEL.PIXEL_MEAN), pixel_std=list(cfg.MODEL.PIXEL_STD))
    return onnx_file(path, channel_order=cfg.INPUT.FORMAT, **square, **means, **changes)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.YOLACT.ANCHOR_SIZES", [24, 16, 24, 32, 48], r"ANCHOR_SIZES is \[24, 16, .* exported with \[8, 16, "),
        ("MODEL.YOLACT.ANCHOR_RATIOS", [1.0, 0.4, 2.5], "ANCHOR_RATIOS is .1.0, 0.4"),
        ("MODEL.YOLACT.SQUARE_ANCHORS", True, "SQUARE_ANCHORS is True, .* exported with False: leave that key"),
        ("INPUT.SQUARE_SIZE", 128, "INPUT.SQUARE_SIZE is 128, .* exported with 64"),
    ],
)
def test_another_geometry_is_refused(tmp_path, key, value, message):
    """The boxes would be wrong, or the advice."""
    path = exported_yolact(tmp_path / "m.onnx")
    with pytest.raises(ValueError, match=message):
        load_exported(exported_config(path, [key, str(value)]))


def test_the_precision_of_the_exporting_config_is_not_that_of_the_file(tmp_path):
    """Files of earlier versions hold the precision that the model had in PyTorch."""
    config = tiny_cfg("RUNTIME.PRECISION", "bfloat16").dump()
    path = onnx_file(tmp_path / "m.onnx", config=config)
    assert exported_config(path).RUNTIME.PRECISION == "float32"
    assert exported_config(path, ["RUNTIME.PRECISION", "bfloat16"]).RUNTIME.PRECISION == "bfloat16"


def test_the_precision_of_a_loaded_file(tmp_path, monkeypatch):
    monkeypatch.setattr(exported_model, "open_network", lambda *args: None)
    path = onnx_file(tmp_path / "m.onnx", precision="int8")
    assert load_exported(exported_config(path)).precision == "int8"
    assert load_exported(exported_config(path, ["RUNTIME.PRECISION", "bfloat16"])).precision == "int8 and bfloat16"


def test_thresholds_and_keys_of_the_training_are_free(tmp_path, monkeypatch):
    monkeypatch.setattr(exported_model, "open_network", lambda *args: None)
    path = exported_yolact(tmp_path / "m.onnx")
    node = "MODEL.YOLACT."
    opts = {"SCORE_THRESHOLD": 0.2, "NMS.TYPE": "greedy", "MAX_DETECTIONS": 7, "LOSS.SEM_SEG_WEIGHT": 0.0}
    values = [str(part) for name, value in opts.items() for part in (f"{node}{name}", value)]
    model = load_exported(exported_config(path, values)).model
    assert model.detection.score_threshold == 0.2 and model.detection.max_detections == 7


@pytest.mark.parametrize(
    ("name", "engine", "precision"),
    [("m.onnx", "torch", "bfloat16"), ("m.pt2", "torch", "float16"), ("m.onnx", "openvino", "float16"),
     ("m.engine", "torch", "bfloat16")],
)  # fmt: skip
def test_a_precision_that_the_engine_lacks_is_refused(tmp_path, name, engine, precision):
    with pytest.raises(ValueError, match=f"RUNTIME.PRECISION is {precision}; .*{name} runs in .* precisions are flo"):
        open_network(tmp_path / name, METADATA, engine, 1, ["CPUExecutionProvider"], precision)


def test_a_deformable_file_on_cuda_is_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(exported_model, "ONNXRuntimeNetwork", lambda *args: None)
    metadata = dataclasses.replace(METADATA, has_deform_conv=True)
    for providers in (["CPUExecutionProvider"], ["CUDAExecutionProvider", "CPUExecutionProvider"]):
        assert not caplog.messages
        with caplog.at_level(logging.WARNING, "sparseinst"):
            open_network(tmp_path / "m.onnx", metadata, "torch", 1, providers)
    assert len(caplog.messages) == 1 and "Resize ONNX Runtime has no CUDA kernel for" in caplog.text


def test_grids_of_another_config_are_refused(tmp_path):
    cfg = tiny_solo_cfg("solo")
    means = dict(pixel_mean=list(cfg.MODEL.PIXEL_MEAN), pixel_std=list(cfg.MODEL.PIXEL_STD))
    solo = dict(meta_architecture="SOLO", config=cfg.dump(), channel_order=cfg.INPUT.FORMAT, **means)
    path = onnx_file(tmp_path / "m.onnx", **solo)
    for key in ("STRIDES", "NUM_GRIDS"):
        with pytest.raises(ValueError, match=f"MODEL.SOLO.{key} is .* exported with"):
            load_exported(exported_config(path, [f"MODEL.SOLO.{key}", "[16, 8, 16, 32, 32]"]))


def test_an_end_to_end_file_is_for_others(tmp_path):
    with pytest.raises(ValueError, match="exported with --end-to-end, for runtimes without Python"):
        Predictor(onnx_file(tmp_path / "m.onnx", max_detections=5))


def test_weights_are_not_held_twice(tmp_path, monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(exported_model, "open_network", lambda *args: model.network)
    loaded = load_exported(exported_config(onnx_file(tmp_path / "m.onnx")))
    assert sum(parameter.numel() for parameter in loaded.parameters()) == 0
    with torch.no_grad():
        found, expected = (each([random_input()])[0]["instances"] for each in (loaded, model))
    assert len(found) and torch.equal(found.scores, expected.scores)


@pytest.mark.parametrize(("family", "most"), [("sparse_inst", 0.0), ("yolact", 0.5)])
def test_pixels_of_a_file_that_takes_images(family, most):
    """YOLACT resizes to float32, which a file of uint8 rounds; others resize before, to whole levels."""
    model = tiny_yolact() if family == "yolact" else tiny_model()
    metadata = dataclasses.replace(METADATA, input="image", min_side=64, size=[64, 64] if family == "yolact" else None)
    x = random_input()
    found = ExportedSegmenter(model, model.network, metadata).preprocess([x]).tensor
    expected = model.preprocess([x]).tensor * model.pixel_std + model.pixel_mean
    height, width = (64, 64) if family == "yolact" else x["image"].shape[1:]
    assert found.dtype == torch.uint8
    difference = (found - expected)[..., :height, :width].abs().max()
    assert 0.8 * most <= difference <= most + 1e-4


def test_keys_of_runtime_choose_the_engine_of_a_file(tmp_path):
    opts = ("RUNTIME.ENGINE", "openvino", "RUNTIME.INTRA_OP_THREADS", 3, "RUNTIME.PRECISION", "bfloat16")
    path = onnx_file(tmp_path / "m.onnx")
    with mock.patch.object(exported_model, "open_network") as opened:
        load_exported(tiny_cfg("MODEL.WEIGHTS", str(path), "RUNTIME.PROVIDERS", ["A", "B"], *opts))
    assert opened.call_args.args == (str(path), METADATA, "openvino", 3, ["A", "B"], "bfloat16")

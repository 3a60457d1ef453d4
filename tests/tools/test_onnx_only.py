"""Errors of examples/onnx_only.py, and images that fit into a size; tests/tools/test_export.py has other detections."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparseinst.runtime.exported_file import read_metadata
from tests.tools.exported import EXAMPLE, assert_example_finds_the_same, load_example, photos, run_export, save_tiny


@pytest.mark.parametrize(
    ("model", "image", "message"),
    [
        ("none.onnx", "a.png", "none.onnx"),
        ("text.onnx", "a.png", "text.onnx"),
        ("foreign.onnx", "a.png", "foreign.onnx: expected a SparseInst"),
        ("foreign.onnx", "none.png", "none.png cannot be read as an image"),
        ("foreign.onnx", "text.onnx", "text.onnx cannot be read as an image"),
    ],
)
def test_an_error_is_one_line(tmp_path, monkeypatch, model, image, message):
    onnx = pytest.importorskip("onnx", reason="the package onnx is not installed")
    pytest.importorskip("onnxruntime", reason="the package onnxruntime is not installed")
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save("a.png")
    Path("text.onnx").write_text("no model")
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "ab"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["a"], ["b"])], "graph", ends[:1], ends[1:])
    opsets = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), "foreign.onnx")
    monkeypatch.setattr(sys, "argv", ["onnx_only.py", model, image])
    with pytest.raises(SystemExit) as error:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    text = str(error.value)
    assert text.startswith("error: ") and message in text and "\n" not in text


@pytest.mark.usefixtures("loggers_as_before")
def test_a_file_of_dynamic_size_keeps_the_size_that_images_fit_into(tmp_path):
    """FIT_SIZE_TEST of the config takes the place of the short side, in the Predictor and in the example.

    Both drop overlapping masks.
    """
    pytest.importorskip("onnxscript", reason="the package onnxscript is not installed")
    save_tiny(tmp_path)
    opts = ("INPUT.FIT_SIZE_TEST", "(70, 80)", "MODEL.SPARSE_INST.MASK_NMS_THRESHOLD", 0.5)
    assert run_export(tmp_path, "--format", "onnx", "--output", tmp_path, opts=opts) == 0
    path = tmp_path / "model.onnx"
    assert (read_metadata(path).size, read_metadata(path).fit_size) == (None, [70, 80])
    example = load_example(path)
    # Each of these would have a short side of 64 pixels.
    for image, size in zip(photos(), ((57, 80), (53, 80), (70, 37), (70, 70)), strict=True):
        assert example.network_size(*image.shape[:2]) == size
        assert_example_finds_the_same(path, image)
    counts = []
    for threshold in (0.5, 0):
        example.metadata["postprocessing"]["mask_nms_threshold"] = threshold
        counts.append(sum(len(example.detect(image)[0]) for image in photos()))
    assert counts[0] < counts[1]
    # As earlier versions wrote their files.
    example.metadata |= {"fit_size": None, "size": [64, 96]}
    assert example.network_size(50, 70) == (64, 90)

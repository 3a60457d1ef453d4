"""Errors of examples/onnx_only.py; tests/tools/test_export.py compares its detections with the Predictor's."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "onnx_only.py"


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

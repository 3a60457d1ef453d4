"""NNCF quantizes a network for OpenVINO; its results stay near the model's, and the layers in float are the model's."""

import pytest
import torch

from sparseinst.runtime.export import ExportableNetwork, converter, export_program
from sparseinst.runtime.exported_file import ExportMetadata
from sparseinst.runtime.openvino import OpenVINONetwork, read_program
from sparseinst.runtime.quantize import Quantization, quantizable_layers
from sparseinst.runtime.rewrites.fuse import fused_copy
from tests.tiny_model import tiny_model

pytest.importorskip("nncf", reason="the package nncf (extra 'int8') is not installed")
NAMES = ["pred_logits", "pred_masks", "pred_scores"]


def test_openvino_in_int8(tmp_path):
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    model = fused_copy(tiny_model().requires_grad_(False))
    program = export_program(ExportableNetwork(model), 32, None, None)
    layers = quantizable_layers(program, model)
    path = tmp_path / "model.xml"
    quantization = Quantization(model, [images], layers[:1])
    converter("openvino", program, NAMES, "int8", ())(quantization)(path, ExportMetadata(*[None] * 20))
    read = read_program(path)
    # Constants of one number are axes.
    weights = [node for node in read.get_ops() if node.get_type_name() == "Constant"
               and node.get_element_type().get_type_name() == "i8" and len(node.get_shape()) > 1]  # fmt: skip
    assert len(weights) == len(layers) - 1
    found = OpenVINONetwork(read)(images)
    for name, value in model.network(images).items():
        error = (found[name] - value).norm() / value.norm()
        assert 1e-5 < error < 0.3, (name, error)

"""Quantization: which layers stay in float32, and the order of the others by their errors."""

import logging
from unittest.mock import MagicMock

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from sparseinst.runtime import quantize
from sparseinst.runtime.export import ExportableNetwork, export_program, onnx_bytes
from sparseinst.runtime.onnxruntime import ONNXRuntimeNetwork
from sparseinst.runtime.quantize import (
    ADDITIONS,
    Quantization,
    by_error,
    float_layers,
    quantizable_layers,
    quantize_onnx,
)
from sparseinst.runtime.rewrites.fuse import fused_copy
from tests.modeling.solo.tiny_solo import tiny_solo
from tests.modeling.yolact.tiny_yolact import tiny_yolact
from tests.tiny_model import DETAIL, normed_placed_model, tiny_model

IAM = "decoder.inst_branch.iam_conv"
# In a fused model, whose decoder is wrapped.
FUSED_IAM = f"decoder.{IAM}"


class TwoLayers(nn.Module):
    """The first layer's numbers are those of INT8 exactly; the second layer's smallest weights become 0."""

    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.exact, self.model.rounded = nn.Conv2d(1, 1, 1, bias=False), nn.Conv2d(1, 2, 1, bias=False)
        self.model.exact.weight.data.fill_(63.0)
        self.model.rounded = nn.Conv2d(2, 1, 1, bias=False)
        self.model.rounded.weight.data[0, :, 0, 0] = torch.tensor([63.0, 0.4])

    def forward(self, images):
        exact = self.model.exact(images)
        return {"exact": exact, "rounded": self.model.rounded(torch.cat([images * 0, exact], 1))}


def test_layers_are_ordered_by_their_error():
    # 255 * 63 is the largest value of the second layer's input, so that its scale is 63 and the input is exact too.
    images = torch.arange(256.0).view(1, 1, 16, 16)
    network = TwoLayers().requires_grad_(False)
    before = network.model.rounded.weight.clone()
    assert by_error(network, ["exact", "rounded"], [images]) == ["rounded", "exact"]
    assert torch.equal(network.model.rounded.weight, before)
    assert not network.model.rounded._forward_pre_hooks


def test_a_layer_that_is_not_in_the_exported_network_is_a_warning(caplog):
    finder = quantize._LayerFinder(Quantization(tiny_model(), [], skipped=("encoder.ppm.missing", IAM, ADDITIONS)))
    finder.note("node", dict(tiny_model().named_modules())[IAM].weight.numpy(force=True))
    logging.getLogger("sparseinst").propagate = True
    with caplog.at_level(logging.WARNING):
        assert finder.skipped_nodes() == {"node"}
    assert caplog.messages == ["Quantized, because the exported network has no such weight: encoder.ppm.missing"]


class Borrowing(nn.Module):
    """Multiply by the weight of a child that is not called, as timm's SwinV2 does."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return nn.functional.linear(x, self.qkv.weight)


class BorrowingModel(nn.Module):
    float_layers = ()

    def __init__(self):
        super().__init__()
        self.attention, self.last = Borrowing(), nn.Linear(4, 2)
        self.pixel_mean = torch.zeros(3)

    def network(self, images):
        return {"values": self.last(self.attention(images))}


def test_a_layer_with_the_weight_of_a_child_is_left_out():
    network = ExportableNetwork(BorrowingModel().requires_grad_(False))
    images = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    layers = quantizable_layers(torch.export.export(network, (images,)), network.model)
    assert by_error(network, layers, [images]) == ["last"]


@pytest.mark.parametrize("engine", ["ONNX Runtime", "NNCF"])
def test_errors_of_an_engine_have_one_line(tmp_path, monkeypatch, engine):
    """The calibration image has a channel too few."""
    helper = onnx.helper
    model = BorrowingModel().requires_grad_(False)
    model.conv = nn.Conv2d(3, 2, 3).requires_grad_(False)
    values = [helper.make_tensor_value_info(name, 1, [1, *"chw"]) for name in ("images", "values")]
    weight = numpy_helper.from_array(model.conv.weight.numpy(), "weight")
    graph = helper.make_graph([helper.make_node("Conv", ["images", "weight"], ["values"])], "g", *([v] for v in values),
                              [weight])  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    quantization = Quantization(model, [torch.zeros(1, 2, 8, 8)])
    with pytest.raises(ValueError, match=f"{engine} cannot quantize the network: .*Export with --pr") as caught:
        if engine == "NNCF":
            openvino = pytest.importorskip("openvino", reason="the package openvino is not installed")
            nncf = MagicMock()
            nncf.quantize.side_effect = RuntimeError("first line\nsecond line")
            monkeypatch.setattr(quantize, "import_nncf", lambda: nncf)
            onnx.save(proto, tmp_path / "m.onnx")
            quantize.quantize_openvino(openvino.Core().read_model(tmp_path / "m.onnx"), quantization)
        else:
            quantize_onnx(proto.SerializeToString(), "images", quantization)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module", params=["GroupIAMDecoder", "PlacedIAMDecoder"])
def quantized(request):
    """The tiny model's layers that can be quantized, and its ONNX in INT8 with one of them skipped.

    The PlacedIAMDecoder has three levels of cells, norms, and takes a feature of the backbone.
    """
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    is_placed = request.param == "PlacedIAMDecoder"
    model = fused_copy(
        (
            normed_placed_model(*DETAIL, "MODEL.SPARSE_INST.DECODER.NORM", "BN") if is_placed else tiny_model()
        ).requires_grad_(False)
    )
    program = export_program(ExportableNetwork(model), 32, (64, 96), 1)
    quantization = Quantization(model, [images], ["backbone.res3.0.conv1"])
    content = quantize_onnx(onnx_bytes(program, list(model.network(images))), "images", quantization)
    return model, quantizable_layers(program, model), onnx.load_model_from_string(content)


def test_layers_behind_the_activation_maps_are_not_quantized(quantized):
    model, layers, _ = quantized
    if FUSED_IAM in float_layers(model):
        decoder, first = "decoder.decoder.", ["inst_branch.iam_conv"]
        last, others = ("fc", "cls_score", "mask_kernel", "objectness"), ("mask_branch.projection",)
        assert "decoder.conv" in layers
    else:
        decoder = "decoder."
        first = ["inst_branch.heatmap", "inst_branch.saliency", "mask_branch.displacement"]
        last = ("peak_fc", "mask_kernel", "objectness", "level_box", "ellipse")
        others = ("inst_branch.inst_convs.0", "mask_branch.projection", "mask_branch.detail_projection")
    assert float_layers(model) == [decoder + name for name in first]
    assert {"backbone.stem.conv1", *(decoder + name for name in others)} <= set(layers)
    branch = f"{decoder}inst_branch."
    assert all(hasattr(model.get_submodule(branch[:-1]), name) for name in last)
    assert not {*float_layers(model), *(branch + name for name in last)} & set(layers)


def test_an_onnx_file_holds_eight_bits_but_for_layers_in_float(quantized):
    """Weights are int8, in 7 bits, where the layer is quantized; others are the model's."""
    model, layers, proto = quantized
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    bits = [values for values in weights.values() if values.dtype == np.int8 and values.ndim == 4]
    assert len(bits) == len(layers) - 1
    assert all(-64 <= values.min() and 60 <= np.abs(values).max() <= 64 for values in bits)
    floats = [values for values in weights.values() if values.dtype == np.float32 and values.ndim == 4]
    modules = dict(model.named_modules())
    for name in (*float_layers(model), "backbone.res3.0.conv1"):
        assert any(np.array_equal(values, modules[name].weight.numpy()) for values in floats), name
    # Nothing that reads the activation maps is rounded, directly or not.
    first = {
        name for name, values in weights.items() for layer in float_layers(model)
        if np.array_equal(values, modules[layer].weight.numpy())
    }  # fmt: skip
    assert len(first) == len(float_layers(model))
    tail = {name for node in proto.graph.node if first & set(node.input) for name in node.output}
    # The nodes of an ONNX graph are sorted.
    for node in proto.graph.node:
        if tail & set(node.input):
            assert node.op_type != "QuantizeLinear"
            tail.update(node.output)
    assert {output.name for output in proto.graph.output} <= tail


def test_additions_are_quantized_unless_they_are_skipped():
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    model = fused_copy(tiny_model().requires_grad_(False))
    program = export_program(ExportableNetwork(model), 32, (64, 96), 1)
    content = onnx_bytes(program, list(model.network(images)))
    rounded = []
    for skipped in ([], [quantize.ADDITIONS]):
        proto = onnx.load_model_from_string(quantize_onnx(content, "images", Quantization(model, [images], skipped)))
        read = {name for node in proto.graph.node if node.op_type == "QuantizeLinear" for name in node.input}
        rounded.append(sum(node.op_type == "Add" and node.output[0] in read for node in proto.graph.node))
    # The sums of the residual blocks.
    assert rounded[0] >= rounded[1] + 4


@pytest.mark.parametrize(
    ("family", "predictions"),
    [
        ("solo", {"cate_pred"}),
        ("decoupled", {"cate_pred", "mask_pred_x", "mask_pred_y"}),
        ("solov2", {"cate_pred", "kernel_pred"}),
        ("yolact", {"cls_score", "bbox_pred", "coeff_pred"}),
    ],
)
def test_predictions_of_every_family_stay_in_float(family, predictions):
    """So does a skipped layer. SOLO's last mask convolutions are outputs, which post-processing applies, and exact."""
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model = tiny_yolact() if family == "yolact" else tiny_solo(family)
    model = fused_copy(model.requires_grad_(False))
    names = list(model.network(images))
    network = ExportableNetwork(model)
    program = export_program(network, 32, (64, 64), 1)
    layers = quantizable_layers(program, model)
    worst = by_error(network, layers, [images])
    assert sorted(worst) == sorted(layers) and not set(layers) & set(float_layers(model))
    content = quantize_onnx(onnx_bytes(program, names), "images", Quantization(model, [images], worst[:1]))
    proto = onnx.load_model_from_string(content)
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    assert sum(values.dtype == np.int8 and values.ndim == 4 for values in weights.values()) > 20
    # A quantized layer reads its weight from a DequantizeLinear.
    floats = [weights[name] for node in proto.graph.node if node.op_type == "Conv" for name in node.input[1:2]
              if name in weights]  # fmt: skip
    modules = dict(model.named_modules())
    assert {name.split(".")[1] for name in float_layers(model)} == predictions
    for name in [*float_layers(model), worst[0]]:
        assert any(np.array_equal(values, modules[name].weight.numpy()) for values in floats), name
    with torch.no_grad():
        expected = model.network(images)
    found = ONNXRuntimeNetwork(content, 1)(images)
    differences = {name: float((found[name] - value).abs().max()) for name, value in expected.items()}
    assert all(differences[name] > 0 for name in names if "_logits" in name)
    exact = [name for name, value in differences.items() if value == 0]
    kinds = ("weights", "biases") if family == "solo" else ()
    assert exact == [f"mask_{kind}_{level}" for level in range(5) for kind in kinds]


def test_a_float_layer_that_is_missing_is_an_error(monkeypatch):
    model = tiny_model().requires_grad_(False)
    program = export_program(ExportableNetwork(model), 32, (64, 96), 1)
    content = onnx_bytes(program, ["pred_logits", "pred_masks", "pred_scores"])
    model.decoder.inst_branch.iam_conv.weight.data += 1
    with pytest.raises(ValueError, match=f"The layers {IAM}, which stay in float32, are not in the exported network"):
        quantize_onnx(content, "images", Quantization(model, []))

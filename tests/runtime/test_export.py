"""`torch.export.export` of networks with dynamic batch, height and width gives the numbers of the model itself."""

import contextlib
import traceback
from pathlib import Path

import pytest
import torch
from detectron2.export import TracingAdapter
from detectron2.modeling import build_model
from torch import nn
from torch.export import Dim
from torch.torch_version import TorchVersion

from sparseinst import get_config_file
from sparseinst.config import load_config
from sparseinst.runtime.export import check_packages, converter
from sparseinst.runtime.exported_file import ExportMetadata
from sparseinst.runtime.optimize import optimize_for_inference
from tests.disk import little_room
from tests.tiny_model import random_input, tiny_model

EXAMPLE = (2, 3, 64, 96)
# Other sizes and batches than the example's; the smallest side is two cells of the coarsest stride.
SIZES = ((1, 3, 64, 64), (3, 3, 96, 160), (1, 3, 192, 64))
TINY = "MODEL.SPARSE_INST.DECODER."


class Network(nn.Module):
    """A model's network, which is a method, as a module."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model.network(images)


def check_export(model, sizes=SIZES):
    network = Network(model.eval())
    batch, rows, columns = Dim("batch"), Dim("rows", min=2), Dim("columns", min=2)
    with torch.no_grad():
        program = torch.export.export(
            network, (torch.randn(EXAMPLE),), dynamic_shapes=({0: batch, 2: 32 * rows, 3: 32 * columns},)
        ).module()
        for size in sizes:
            images = torch.randn(size, generator=torch.Generator().manual_seed(0))
            found, expected = program(images), network(images)
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert found[name].shape == value.shape
                assert (found[name] - value).abs().max() <= 1e-5 * value.abs().max(), (size, name)


def published(name, *opts):
    torch.manual_seed(0)
    return build_model(load_config(get_config_file(name), ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", *opts]))


@pytest.mark.parametrize(
    "opts",
    [
        (f"{TINY}NAME", "BaseIAMDecoder", f"{TINY}NORM", "GN", f"{TINY}INST.DIM", 32, f"{TINY}MASK.DIM", 32),
        (f"{TINY}NAME", "GroupIAMSoftDecoder", f"{TINY}OUTPUT_IAM", True),
    ],
    ids=lambda opts: "-".join(str(value) for value in opts[1::2]),
)
def test_every_decoder(opts):
    check_export(tiny_model(*opts))


@pytest.mark.parametrize(
    "opts",
    [
        ("MODEL.BACKBONE.NAME", "build_pyramid_vision_transformer", "MODEL.PVT.NAME", "b0", "MODEL.PVT.LINEAR", True),
        ("MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.NAME", "mobilenetv3_small_100"),
    ],
    ids=["pvt-linear", "mobilenetv3"],
)
def test_backbones(opts):
    pytest.importorskip("timm", reason="the package timm (extra 'timm') is not installed")
    levels = {"pyramid": ["p2", "p3"], "timm": ["res4", "res5"]}
    (features,) = (names for part, names in levels.items() if part in opts[1])
    check_export(tiny_model(*opts, "MODEL.SPARSE_INST.ENCODER.IN_FEATURES", features))


def test_r50_giam():
    check_export(published("sparse_inst_r50_giam"))


@pytest.mark.parametrize("is_optimized", [False, True])
@pytest.mark.parametrize("export", ["trace", "export"])
def test_a_whole_model_is_refused_with_one_line(is_optimized, export):
    """The masks, boxes and scores of a trace would be those of the example's image."""
    model = optimize_for_inference(tiny_model()) if is_optimized else tiny_model()
    x = random_input(64, 96)
    adapter = TracingAdapter(model, [x], lambda model, inputs: [{"instances": model(inputs)[0]["instances"]}])
    with torch.no_grad(), pytest.raises(RuntimeError, match="cannot be traced or exported.*model.network") as caught:
        if export == "trace":
            torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
        else:
            torch.export.export(adapter, adapter.flattened_inputs, strict=False)
    assert "\n" not in str(caught.value)
    assert Path(traceback.extract_tb(caught.value.__traceback__)[-1].filename).parent.name == "modeling"


@pytest.mark.parametrize("name", ["torch", "openvino"])
def test_a_full_disk_is_an_error_of_the_system(tmp_path, name):
    """The writers in C++ raise a RuntimeError; PyTorch's also ends the process."""
    if name == "openvino":
        pytest.importorskip("openvino", reason="the package openvino is not installed")
    program = torch.export.export(nn.ReLU(), (torch.zeros(1),))
    write = converter(name, program, ["a"], "float32", ())(None)
    with little_room(10), pytest.raises(OSError):
        write(tmp_path / "model.xml", ExportMetadata(*[None] * 20))


@pytest.mark.parametrize(("version", "is_enough"), [("2.4.0", False), ("2.5.1+cpu", False), ("2.6.0+cu124", True)])
def test_an_older_pytorch_writes_no_onnx(monkeypatch, version, is_enough):
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason=f"the package {name} is not installed")
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    expected = pytest.raises(ImportError, match=f"^An export to ONNX needs PyTorch 2.6 or later, and {version[:5]}")
    with contextlib.nullcontext() if is_enough else expected:
        check_packages("onnx")
    check_packages("torch")


def test_a_traced_postprocessing_is_refused():
    model = tiny_model().requires_grad_(False)
    x = random_input(64, 96)

    class Whole(Network):
        def forward(self, pixels):
            images = self.model.preprocess([{"image": pixels}])
            return self.model.postprocess(super().forward(images.tensor), [x], images)[0]["instances"].scores

    with torch.no_grad(), pytest.raises(RuntimeError, match="cannot be traced"):
        torch.jit.trace(Whole(model), x["image"], check_trace=False)

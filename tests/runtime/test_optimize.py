"""A model that is optimised for inference against the plain one: every config, sizes, options, and what is refused."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from sparseinst import get_config_file
from sparseinst.config import load_config
from sparseinst.modeling.sparse_inst.fused import FusedDecoder
from sparseinst.runtime import export, onnxruntime
from sparseinst.runtime import optimize as optimization
from sparseinst.runtime.optimize import OptimizedSegmenter, optimize_as_configured, optimize_for_inference
from sparseinst.runtime.output_difference import is_close
from sparseinst.runtime.rewrites import winograd
from sparseinst.runtime.rewrites.fold_norms import fold_norms
from sparseinst.runtime.rewrites.fuse import fused_copy
from tests.runtime.optimized import assert_close, assert_optimized_equals
from tests.tiny_model import random_input, tiny_cfg, tiny_model


def give_character(model, seed=0):
    """Norms and biases that are neither 0 nor 1, so that leaving one out is seen."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(getattr(module, "running_mean", None), torch.Tensor):
            module.running_mean.copy_(0.1 * torch.randn(module.running_mean.shape, generator=generator))
            module.running_var.copy_(0.8 + 0.4 * torch.rand(module.running_var.shape, generator=generator))
        if isinstance(getattr(module, "bias", None), torch.Tensor):
            module.bias.data.add_(0.1 * torch.randn(module.bias.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def model():
    return give_character(tiny_model("MODEL.SPARSE_INST.DECODER.OUTPUT_IAM", True))


@pytest.mark.parametrize("name", ["sparse_inst_r18_giam", "sparse_inst_mobilenetv3_giam"])
def test_small_configs(monkeypatch, name):
    """tests/test_configs.py has the published ones."""
    # Images as small as these would never use Winograd's algorithm.
    monkeypatch.setattr(winograd, "MIN_TILES", 1)
    torch.manual_seed(0)
    cfg = load_config(get_config_file(name), ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])
    assert_optimized_equals(cfg, give_character(build_model(cfg).eval()))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", [(32, 32), (64, 96), (96, 64), (224, 32)])
def test_sizes_in_turn_and_batches(model, channels_last, size):
    optimized = optimize_for_inference(model, channels_last=channels_last)
    with torch.no_grad():
        for batch, (height, width) in ((1, size), (2, (64, 64)), (3, size)):
            images = torch.randn(batch, 3, height, width)
            assert_close(optimized.network(images), model.network(images))


def test_onnx_runtime_takes_a_single_row_of_cells(model):
    """The exported program was traced at a larger size, and exported files pad to two rows."""
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"the package {package} is not installed")
    optimized = optimize_for_inference(model, engine="onnxruntime")
    with torch.no_grad():
        for height, width in ((32, 32), (32, 320), (224, 32)):
            images = torch.randn(1, 3, height, width)
            assert_close(optimized.network(images), model.network(images))


def test_a_deformable_network_on_cuda_is_a_warning(monkeypatch, caplog):
    pytest.importorskip("onnxscript", reason="the package onnxscript is not installed")
    model = tiny_model()
    monkeypatch.setattr(onnxruntime, "ONNXRuntimeNetwork", lambda *args: model.network)
    monkeypatch.setattr(export, "onnx_bytes", lambda *args: b"")
    for is_deformable, providers in ((True, []), (False, ["CUDAExecutionProvider"]), (True, ["CUDAExecutionProvider"])):
        assert not caplog.messages
        target = "torchvision.deform_conv2d.default" if is_deformable else "aten.convolution.default"
        program = SimpleNamespace(graph=SimpleNamespace(nodes=[SimpleNamespace(target=target)]))
        monkeypatch.setattr(export, "export_program", lambda *args, program=program: program)
        optimize_for_inference(model, engine="onnxruntime", providers=providers)
    assert len(caplog.messages) == 1 and "Resize ONNX Runtime has no CUDA kernel for" in caplog.text


def test_predictions_are_those_of_the_plain_model(model):
    inputs = [random_input(50, 70), random_input(33, 64, seed=1)]
    with torch.no_grad():
        expected, found = model(inputs), optimize_for_inference(model)(inputs)
    for first, second in zip(expected, found):
        first, second = first["instances"], second["instances"]
        assert len(first) and len(first) == len(second)
        assert torch.allclose(first.scores, second.scores, atol=1e-4)
        assert (first.pred_masks == second.pred_masks).float().mean() > 0.999
        assert first.pred_iams.shape == second.pred_iams.shape


@pytest.mark.parametrize("norm", ["", "GN", "BN"])
def test_norms_of_encoder_and_decoder(norm):
    model = give_character(
        tiny_model(
            "MODEL.SPARSE_INST.ENCODER.NORM", norm, "MODEL.SPARSE_INST.DECODER.NORM", norm,
            "MODEL.SPARSE_INST.ENCODER.NUM_CHANNELS", 32, "MODEL.SPARSE_INST.DECODER.INST.DIM", 32,
            "MODEL.SPARSE_INST.DECODER.MASK.DIM", 32,
        )
    )  # fmt: skip
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert_close(optimize_for_inference(model).network(images), model.network(images))


def test_bfloat16_within_its_rounding(model):
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        outputs = optimize_for_inference(model, precision="bfloat16").network(images)
        assert_close({name: value.float() for name, value in outputs.items()}, model.network(images), 0.1)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_float16_on_a_cpu_is_float32_with_a_warning(model, caplog, precision):
    logging.getLogger("sparseinst").propagate = True
    with caplog.at_level(logging.WARNING):
        optimized = optimize_for_inference(model, precision=precision)
    assert ("float16 is slower than float32 on a CPU" in caplog.text) == (precision == "float16")
    expected = torch.bfloat16 if precision == "bfloat16" else torch.float32
    assert optimized.model.decoder.conv.weight.dtype == expected


def test_half_weights_are_what_autocast_makes_of_them(model, monkeypatch):
    images = torch.randn(2, 3, 64, 96)
    held = optimize_for_inference(model, precision="bfloat16")
    assert held.model.decoder.conv.weight.dtype == torch.bfloat16
    monkeypatch.setattr(optimization, "_store_weights_as", lambda model, dtype: None)
    converted = optimize_for_inference(model, precision="bfloat16").network(images)
    for name, value in held.network(images).items():
        assert torch.equal(value, converted[name])


@pytest.mark.parametrize("fuse", [True, False])
def test_the_model_itself_stays_as_it_is(model, fuse):
    before = {name: (value.clone(), value.stride()) for name, value in model.state_dict().items()}
    optimize_for_inference(model, fuse=fuse, precision="bfloat16")
    for name, value in model.state_dict().items():
        assert value.dtype == before[name][0].dtype and value.stride() == before[name][1]
        assert torch.equal(value, before[name][0])


def test_a_convolution_that_feeds_more_than_a_norm_keeps_it():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.relu = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()
            self.alone, self.its_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            x = self.conv(x)
            return self.its_norm(self.alone(self.norm(x) + self.relu(x)))

    module = give_character(Twice().eval())
    x = torch.randn(1, 3, 5, 5)
    with torch.no_grad():
        expected = module(x)
        assert fold_norms(module, lambda: module(x)) == 1
        assert torch.allclose(module(x), expected, atol=1e-5)
    assert isinstance(module.norm, nn.BatchNorm2d) and isinstance(module.its_norm, nn.Identity)


def test_a_norm_without_weights_is_folded():
    module = give_character(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False))).eval()
    with torch.no_grad():
        expected = module(x := torch.randn(1, 3, 5, 5))
        assert fold_norms(module, lambda: module(x)) == 1
        assert torch.allclose(module(x), expected, atol=1e-5)


def test_frozen_norms_of_timm_are_folded():
    """Unfolded, they hid the backbone's layers from the quantization, whose weights OpenVINO folds."""
    pytest.importorskip("timm", reason="the package timm (extra 'small-data') is not installed")
    model = build_model(load_config("small_data/efficientnet_lite0", ["MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu"]))
    fused = fused_copy(give_character(model).eval())
    assert not [name for name, _ in fused.named_buffers() if name.endswith("running_var")]
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert is_close(fused.network(images), model.network(images), model.ranks_instances)


def test_a_network_that_would_change_stays_as_it_is(model, caplog):
    """A convolution whose output is used beside its norm, between the modules."""

    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64).eval()

        def forward(self, x):
            x = self.conv(x)
            return self.norm(x) + 3 * x.tanh()

    other = copy.deepcopy(model)
    other.backbone.stem.conv1 = give_character(Hidden().eval())
    logging.getLogger("sparseinst").propagate = True
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        assert torch.equal(optimize_for_inference(other, channels_last=False).network(images)["pred_masks"],
                           other.network(images)["pred_masks"])  # fmt: skip
    assert "cannot be fused" in caplog.text


def with_offer(model, fuse):
    """Return a copy of the model whose first convolution is in a module with this ``fuse()``."""

    class Offering(nn.Module):
        def __init__(self, conv):
            super().__init__()
            self.conv = conv

        def forward(self, x):
            return self.conv(x)

    Offering.fuse = fuse
    other = copy.deepcopy(model)
    other.backbone.stem.conv1 = Offering(other.backbone.stem.conv1).eval()
    return other


def precise_offer(module):
    return nn.Sequential(module.conv)


def imprecise_offer(module):
    return nn.Sequential(module.conv, nn.AvgPool2d(3, 1, 1))


def failing_offer(module):
    raise RuntimeError("no such\nfusion")


def test_a_precise_offer_is_used(model, caplog):
    other = with_offer(model, precise_offer)
    images = torch.randn(1, 3, 64, 96)
    logging.getLogger("sparseinst").propagate = True
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        optimized = optimize_for_inference(other)
        assert_close(optimized.network(images), model.network(images))
    assert isinstance(optimized.model.backbone.stem.conv1, nn.Sequential) and not caplog.messages
    assert not any(module.training for module in optimized.modules())


@pytest.mark.parametrize(
    ("fuse", "reason"),
    [
        (imprecise_offer, "its outputs would change"),
        (lambda module: nn.Conv2d(3, 7, 1), "RuntimeError"),
        (failing_offer, "RuntimeError: no such fusion"),
        (lambda module, needed: module, "TypeError"),
        (lambda module: 3, "AttributeError"),
    ],
)
def test_a_wrong_offer_is_refused_with_one_warning(model, caplog, fuse, reason):
    other = with_offer(model, fuse)
    images = torch.randn(1, 3, 64, 96)
    logging.getLogger("sparseinst").propagate = True
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        found = optimize_for_inference(other, channels_last=False).network(images)
        assert all(torch.equal(value, found[name]) for name, value in other.network(images).items())
    assert len(caplog.messages) == 1 and f"cannot be fused, and runs as it is: {reason}" in caplog.messages[0]


def test_a_module_that_fuses_in_place(model, caplog):
    other = with_offer(model, lambda module: None)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        optimized = optimize_for_inference(other)
        assert_close(optimized.network(images), model.network(images))
    assert isinstance(optimized.model.decoder, FusedDecoder) and not caplog.messages


def test_an_offer_that_needs_its_norm():
    """Modules of timm offer to fold their own norm; an example is RepViT's ConvNorm."""
    pytest.importorskip("timm", reason="the package timm (extra 'timm') is not installed")
    model = give_character(
        tiny_model(
            "MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.NAME", "repvit_m0_9",
            "MODEL.TIMM.OUT_FEATURES", ["res3", "res4"],
        )
    )  # fmt: skip
    optimized = optimize_for_inference(model)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert_close(optimized.network(images), model.network(images))
    assert isinstance(optimized.model.decoder, FusedDecoder)
    assert not [module for module in optimized.modules() if isinstance(module, nn.BatchNorm2d)]


def test_an_image_size_that_the_network_demands(model):
    other = copy.deepcopy(model)
    other.size_divisibility = 320
    network = other.network
    other.network = lambda images: network(images) if images.shape[-2:] == (320, 320) else None
    optimized = optimize_for_inference(other)
    assert isinstance(optimized.model.decoder, FusedDecoder)
    assert len(optimized([random_input()])) == 1


def test_other_parts_stay_as_they_are(model):
    class MyEncoder(type(model.encoder)):
        pass

    other = copy.deepcopy(model)
    other.encoder.__class__ = MyEncoder
    fused = optimize_for_inference(other).model
    assert type(fused.encoder) is MyEncoder and isinstance(fused.decoder, FusedDecoder)
    linear = nn.Linear(2, 2)
    assert optimize_for_inference(linear) is linear


def test_it_cannot_be_trained(model):
    optimized = optimize_for_inference(model)
    assert not optimized.training and not any(p.requires_grad for p in optimized.parameters())
    assert not optimized.train().training and not any(module.training for module in optimized.modules())


def test_without_a_compiler_it_runs_as_it_is(model, monkeypatch, caplog):
    def no_compiler(function, **kwargs):
        def run(*args):
            raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nmore")

        return run

    monkeypatch.setattr(torch, "compile", no_compiler)
    optimized = optimize_for_inference(model, compile=True)
    images = torch.randn(1, 3, 64, 64)
    logging.getLogger("sparseinst").propagate = True
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert_close(optimized.network(images), model.network(images))
    assert len(caplog.messages) == 1 and "No working C++ compiler found" in caplog.messages[0]


@pytest.mark.parametrize("winograd_is_used", [False, True])
def test_openvino_gives_the_same_numbers_at_any_size(model, monkeypatch, winograd_is_used):
    pytest.importorskip("openvino", reason="the package openvino (extra 'openvino') is not installed")
    # The tiny model's convolutions are narrow.
    monkeypatch.setattr(winograd, "MIN_CHANNELS", 1)
    optimized = optimize_for_inference(model, engine="openvino", winograd=winograd_is_used)
    assert isinstance(optimized, OptimizedSegmenter)
    used = [module for module in optimized.modules() if isinstance(module, winograd.WinogradConv2d)]
    assert bool(used) is winograd_is_used
    with torch.no_grad():
        for batch, height, width in ((1, 64, 96), (2, 32, 64), (1, 160, 32)):
            images = torch.randn(batch, 3, height, width)
            assert_close(optimized.network(images), model.network(images))


def test_threads_of_openvino_are_not_pinned(model, monkeypatch):
    openvino = pytest.importorskip("openvino", reason="the package openvino (extra 'openvino') is not installed")
    found = []
    compile_model = openvino.Core.compile_model

    def compile_and_look(*arguments):
        program = compile_model(*arguments)
        found.append(program.get_property("ENABLE_CPU_PINNING"))
        return program

    monkeypatch.setattr(openvino.Core, "compile_model", compile_and_look)
    optimize_for_inference(model, engine="openvino")
    assert found == [False]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("PRECISION", "float8", "RUNTIME.PRECISION is 'float8'"),
        ("ENGINE", "tensorrt", "RUNTIME.ENGINE is 'tensorrt'"),
    ],
)
def test_refused_by_name(model, key, value, message):
    cfg = tiny_cfg(f"RUNTIME.{key}", value)
    with pytest.raises(ValueError, match=message):
        optimize_as_configured(cfg, model)


def test_openvino_takes_no_other_options(model):
    with pytest.raises(ValueError, match="runs on the CPU in float32 or bfloat16.*PRECISION float32 and COMPILE False"):
        optimize_for_inference(model, engine="openvino", precision="float16")


def test_bfloat16_of_openvino_needs_such_a_processor(model):
    """The numbers are compared where the processor has bfloat16; elsewhere one line says so."""
    openvino = pytest.importorskip("openvino", reason="the package openvino (extra 'openvino') is not installed")
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(ValueError, match="RUNTIME.PRECISION bfloat16 needs a processor with bfloat16"):
            optimize_for_inference(model, engine="openvino", precision="bfloat16")
        return
    images = torch.randn(1, 3, 64, 96)
    found = optimize_for_inference(model, engine="openvino", precision="bfloat16").network(images)
    for name, value in model.network(images).items():
        assert 0 < (found[name] - value).abs().max() <= 0.25 * value.abs().max()

"""PVTv2 against timm's, and the published names."""

import copy
import logging

import pytest
import torch
from detectron2.modeling import build_backbone
from torch import nn

from sparseinst.backbones.pvt import published_name, timm_name
from sparseinst.runtime.optimize import optimize_for_inference
from tests.tiny_model import random_input, tiny_cfg, tiny_model

timm = pytest.importorskip("timm", reason="the package timm is not installed (pip install 'sparseinst[timm]')")

PVT = ("MODEL.BACKBONE.NAME", "build_pyramid_vision_transformer", "MODEL.PVT.NAME", "b0")
ENCODER = ("MODEL.SPARSE_INST.ENCODER.IN_FEATURES", ["p2", "p3", "p4"])
MODELS = ["pvt_v2_b0", "pvt_v2_b1", "pvt_v2_b2", "pvt_v2_b3", "pvt_v2_b4", "pvt_v2_b5", "pvt_v2_b2_li"]


def build(*opts):
    torch.manual_seed(0)
    return build_backbone(tiny_cfg(*PVT, *opts)).eval()


@pytest.mark.parametrize("model", MODELS)
def test_names_go_both_ways(model):
    with torch.device("meta"):
        names = list(timm.create_model(model).state_dict())
    published = [published_name(name) for name in names]
    assert len(set(published)) == len(names) and [timm_name(name) for name in published] == names
    assert not any("stages" in name or "downsample" in name for name in published)


@pytest.mark.parametrize(("opts", "model"), [((), "pvt_v2_b0"), (("MODEL.PVT.LINEAR", True), "pvt_v2_b2_li")])
def test_it_is_timms(opts, model):
    """Whatever the NAME, LINEAR is b2."""
    theirs = timm.create_model(model, features_only=True).eval()
    for name, parameter in theirs.named_parameters():
        if "norm" in name or name.endswith("bias"):
            nn.init.uniform_(parameter)
    features = ["p1", "p2", "p3", "p4"]
    ours = build("MODEL.PVT.OUT_FEATURES", features, *opts)
    names = [published_name(name.replace("stages_", "stages.")) for name in theirs.state_dict()]
    ours.load_state_dict(dict(zip(names, theirs.state_dict().values())))
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        found = ours(images)
        assert list(found) == features
        for name, feature in zip(features, theirs(images)):
            torch.testing.assert_close(found[name], feature)
            shape = ours.output_shape()[name]
            assert (shape.channels, 64 // shape.stride) == feature.shape[1:3]


def test_linear_attention_exports_to_onnx_at_other_sizes(caplog):
    """PyTorch's exporter writes adaptive average pooling wrong, but for the size of the example."""
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"the package {package} is not installed")
    model = tiny_model(*PVT, "MODEL.PVT.LINEAR", True, "MODEL.PVT.OUT_FEATURES", ["p2", "p3", "p4"], *ENCODER)
    optimized = optimize_for_inference(copy.deepcopy(model), engine="onnxruntime")
    # A graph with other numbers would be replaced by PyTorch's network.
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    for size in ((64, 64), (96, 224)):
        images = torch.randn(1, 3, *size)
        with torch.no_grad():
            found, expected = (each.network(images)["pred_masks"] for each in (optimized, model))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_published_constants():
    backbone = build("MODEL.PVT.OUT_FEATURES", ["p1", "p2", "p3", "p4"])
    for name, part in backbone.named_modules():
        if isinstance(part, nn.LayerNorm):
            inner = "attn.norm" in name or "patch_embed" in name or "downsample" in name
            assert part.eps == (1e-5 if inner else 1e-6), name
    rates = [
        getattr(part, "drop_prob", 0.0)
        for name, part in backbone.named_modules()
        if name.split(".")[-1] == "drop_path1"
    ]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.1, 8))
    shapes = backbone.output_shape().values()
    assert [(shape.channels, shape.stride) for shape in shapes] == [(32, 4), (64, 8), (160, 16), (256, 32)]


def test_features_have_their_own_names_in_any_order():
    backwards, forwards = build("MODEL.PVT.OUT_FEATURES", ["p3", "p1"]), build("MODEL.PVT.OUT_FEATURES", ["p1", "p3"])
    backwards.load_state_dict(forwards.state_dict())
    assert not any(name.startswith("block4") for name in forwards.state_dict())
    images = torch.randn(1, 3, 64, 64)
    found, expected = backwards(images), forwards(images)
    assert found.keys() == expected.keys() == {"p1", "p3"}
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_it_trains_under_sparseinst():
    model = tiny_model(*PVT, "MODEL.SPARSE_INST.ENCODER.IN_FEATURES", ["p2", "p3", "p4"]).train()
    sum(model([random_input(num_instances=3), random_input(num_instances=2)]).values()).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_freeze_at():
    backbone = build("MODEL.BACKBONE.FREEZE_AT", 2)
    frozen = [name for name, parameter in backbone.named_parameters() if not parameter.requires_grad]
    assert frozen and all(name.startswith(("body.patch_embed.", "body.stages_0.")) for name in frozen)
    assert len(frozen) == len([n for n, _ in backbone.named_parameters() if "patch_embed" in n or "stages_0" in n])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("NAME", "b6", "NAME is 'b6'.*b0"), ("OUT_FEATURES", ["res3"], "OUT_FEATURES.*res3.*p1")],
)
def test_what_is_refused(key, value, message):
    with pytest.raises(ValueError, match=f"MODEL.PVT.{message}"):
        build(f"MODEL.PVT.{key}", value)

"""Any model of timm as a backbone: names, values, freezing, and what is said where it cannot be."""

import sys

import pytest
import torch
from detectron2.modeling import build_backbone, build_model

from sparseinst.backbones import TimmBackbone
from sparseinst.backbones.same_padding import replace_same_padding
from tests.tiny_model import random_input, tiny_cfg, tiny_model

timm = pytest.importorskip("timm", reason="the package timm is not installed (pip install 'sparseinst[timm]')")

# One of each way in which timm gives feature maps: its own classes, sequences taken apart (swin: channels last), a
# model wrapped, hooks.
MODELS = [
    "resnet18",
    "tf_efficientnet_lite0",
    "mobilenetv3_large_100",
    "convnext_atto",
    "swin_tiny_patch4_window7_224",
    "repvgg_a0",
    "regnetx_002",
    "densenet121",
    "dla34",
    "hrnet_w18_small",
    "hieradet_small",
    "xception41",
    "efficientvit_b0",
]
LEVELS = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
TIMM = ("MODEL.BACKBONE.NAME", "build_timm_backbone")
NORMS = {"": "BatchNorm", "BN": "BatchNorm", "FrozenBN": "FrozenBatchNorm", "SyncBN": "SyncBatchNorm"}


def build(*opts):
    torch.manual_seed(0)
    return build_backbone(tiny_cfg(*TIMM, *opts)).eval()


def norms(module):
    return {name: part for name, part in module.named_modules() if hasattr(part, "running_var")}


@pytest.mark.parametrize("model", MODELS)
def test_shapes_and_names(model):
    backbone = TimmBackbone(model, LEVELS).eval()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        features = backbone(images)
    assert list(features) == list(LEVELS)
    for name, feature in features.items():
        shape = backbone.output_shape()[name]
        assert shape.stride == LEVELS[name]
        assert feature.shape == (1, shape.channels, 64 // shape.stride, 96 // shape.stride)
    whole = timm.create_model(model)
    state = whole.state_dict()
    result = backbone.load_state_dict(state, strict=False)
    assert not result.missing_keys
    # Left over: the classifier, and what the last feature does not need.
    assert len(result.unexpected_keys) < 0.2 * len(state)
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize(
    "model", ["resnet18", "tf_efficientnet_lite0", "convnext_atto", "repvgg_a0", "swin_tiny_patch4_window7_224"]
)
def test_values_are_those_of_the_whole_model(model):
    whole = timm.create_model(model).eval()
    backbone = TimmBackbone(model, {"last": 32, "first": 8}).eval()
    backbone.load_state_dict(whole.state_dict(), strict=False)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        found = backbone(images)
        expected = whole.forward_intermediates(images, intermediates_only=True)
    by_size = {feature.shape[-1]: feature for feature in expected}  # of several of one size the last
    for name, size in (("first", 28), ("last", 7)):
        torch.testing.assert_close(found[name], by_size[size])


@pytest.mark.parametrize("levels", [["res3", "res4"], ["res2", "res3", "res4", "res5"]])
@pytest.mark.parametrize("model", ["tf_efficientnet_lite0", "mobilenetv3_large_100", "swin_tiny_patch4_window7_224"])
def test_under_sparseinst(model, levels):
    model = tiny_model(
        *TIMM, "MODEL.TIMM.NAME", model, "MODEL.TIMM.OUT_FEATURES", levels,
        "MODEL.SPARSE_INST.ENCODER.IN_FEATURES", levels, "MODEL.SPARSE_INST.CLS_THRESHOLD", 0.0,
    )  # fmt: skip
    inputs = [random_input(num_instances=3), random_input(64, 96, num_instances=2)]
    sum(model.train()(inputs).values()).backward()
    for name, parameter in model.backbone.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    with torch.no_grad():
        instances = model.eval()(inputs)[0]["instances"]
    assert torch.isfinite(instances.scores).all()


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), [(3, 2, 1), (5, 2, 1), ((3, 5), (2, 3), 1), (2, 3, 1), (3, 2, 2)]
)
def test_same_padding_is_that_of_timm(kernel, stride, dilation):
    conv = timm.layers.Conv2dSame(4, 6, kernel, stride, dilation=dilation, groups=2)
    sequence = torch.nn.Sequential(conv)
    replace_same_padding(sequence, timm.layers.Conv2dSame)
    assert type(sequence[0]) is not type(conv) and sequence[0].weight is conv.weight
    for size in ((8, 8), (9, 7), (1, 12), (13, 10)):
        images = torch.randn(2, 4, *size)
        assert torch.equal(sequence(images), conv(images))


def test_dynamic_sizes_stay_simple():
    """Nested expressions of timm's padding kept torch.export of an EfficientNet from ending."""
    backbone = TimmBackbone("tf_efficientnet_lite0", {"res2": 4}).eval()
    rows, columns = torch.export.Dim("rows", min=2), torch.export.Dim("columns", min=2)
    sizes = {0: None, 2: 32 * rows, 3: 32 * columns}
    program = torch.export.export(backbone, (torch.randn(1, 3, 64, 96),), dynamic_shapes=(sizes,))
    shapes = [str(node.meta["val"].shape) for node in program.graph.nodes if hasattr(node.meta.get("val"), "shape")]
    assert len(shapes) > 20 and not [shape for shape in shapes if "Ceil" in shape or "Max" in shape]


def test_order_of_the_features_does_not_matter():
    backwards = build("MODEL.TIMM.OUT_FEATURES", ["res5", "res2"])
    forwards = build("MODEL.TIMM.OUT_FEATURES", ["res2", "res5"])
    backwards.load_state_dict(forwards.state_dict())
    images = torch.randn(1, 3, 64, 64)
    found, expected = backwards(images), forwards(images)
    assert found["res5"].shape == (1, 512, 2, 2)
    assert all(torch.equal(found[name], expected[name]) for name in ("res2", "res5"))


def test_what_no_feature_needs_is_left_out():
    for model, last in (("resnet18", "layer4."), ("tf_efficientnet_lite0", "blocks.5."), ("regnetx_002", "s4.")):
        state = timm.create_model(model).state_dict()
        backbone = build("MODEL.TIMM.NAME", model, "MODEL.TIMM.OUT_FEATURES", ["res3", "res4"])
        assert any(name.startswith(last) for name in state)
        assert not any(name.startswith(last) for name in backbone.state_dict())
        sum(feature.sum() for feature in backbone(torch.randn(1, 3, 64, 64)).values()).backward()
        assert all(parameter.grad is not None for parameter in backbone.parameters())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("model", ["resnet18", "tf_efficientnet_lite0"])
def test_norms(model, norm):
    backbone = build("MODEL.TIMM.NAME", model, "MODEL.TIMM.NORM", norm)
    found = norms(backbone)
    assert found and all(type(part).__name__.startswith(NORMS[norm]) for part in found.values())
    if norm == "SyncBN":
        return  # needs a GPU
    plain = build("MODEL.TIMM.NAME", model)
    state = backbone.state_dict()
    if norm == "FrozenBN":
        assert all(part.weight.all() for part in found.values())  # a zero would cut its branch off for ever
        assert not any(".bn" in name for name, _ in backbone.named_parameters())
    backbone.load_state_dict({name: value for name, value in plain.state_dict().items() if name in state})
    images = torch.randn(2, 3, 64, 64)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    with torch.no_grad():
        for name, feature in backbone(images).items():
            torch.testing.assert_close(feature, plain(images)[name])
        backbone.train()(images)
    changed = [name for name, value in backbone.state_dict().items() if not torch.equal(value, before[name])]
    assert bool(changed) == (norm != "FrozenBN")


@pytest.mark.parametrize(
    ("model", "freeze_at", "frozen"),
    [
        ("resnet18", 0, ()),
        ("resnet18", 1, ("conv1.", "bn1.")),
        ("resnet18", 2, ("conv1.", "bn1.", "layer1.")),
        ("resnet18", 3, ("conv1.", "bn1.", "layer1.", "layer2.")),
        ("convnext_atto", 2, ("stem.", "stages.0.")),
        ("tf_efficientnet_lite0", 2, ("conv_stem.", "bn1.", "blocks.0.", "blocks.1.")),
        ("densenet121", 2, ("features.conv0.", "features.norm0.", "features.denseblock1.")),
        ("hieradet_small", 2, ("pos_embed", "patch_embed.", "blocks.0.")),
    ],
)
def test_freeze_at(model, freeze_at, frozen):
    backbone = build("MODEL.TIMM.NAME", model, "MODEL.BACKBONE.FREEZE_AT", freeze_at)
    # keep_vars: the parameters themselves, under timm's names; frozen batch norms have none.
    state = backbone.state_dict(keep_vars=True)
    trained = {name for name, value in state.items() if value.requires_grad}
    free = build("MODEL.TIMM.NAME", model).state_dict(keep_vars=True)
    assert trained == {name for name, value in free.items() if value.requires_grad and not name.startswith(frozen)}
    assert all(any(name.startswith(prefix) for name in free) for prefix in frozen)
    before = {name: value.clone() for name, value in state.items()}
    with torch.no_grad():
        backbone.train()(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(value, before[name]) for name, value in state.items() if name.startswith(frozen))


def test_a_model_that_cannot_be_frozen_in_part():
    with pytest.raises(ValueError, match="cannot be frozen in part.*FREEZE_AT to 0"):
        build("MODEL.TIMM.NAME", "hrnet_w18_small", "MODEL.BACKBONE.FREEZE_AT", 2)


def test_images_of_other_channels():
    opts = ("MODEL.PIXEL_MEAN", [1.0] * 4, "MODEL.PIXEL_STD", [1.0] * 4)
    assert build(*opts).body.conv1.in_channels == 4


def test_arguments_of_the_model():
    backbone = build("MODEL.TIMM.NAME", "convnext_atto", "MODEL.TIMM.ARGS", {"drop_path_rate": 0.3})
    assert max(getattr(part, "drop_prob", 0.0) for part in backbone.modules()) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="resnet18.*MODEL.TIMM.ARGS.*img_size"):
        build("MODEL.TIMM.ARGS", {"img_size": 64})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("nonsense", 1), ("checkpoint_path", "FILE"), ("pretrained", True), ("pretrained_cfg", {"file": "FILE"}),
        ("pretrained_cfg_overlay", {"file": "FILE"}), ("cache_dir", "FILE"), ("features_only", False),
        ("drop_rate", {"file": "FILE"}),
    ],
)  # fmt: skip
def test_arguments_that_read_files_are_refused(tmp_path, monkeypatch, name, value):
    """timm before 1.0.26 reads a checkpoint_path without weights_only, and runs its code."""
    file = str(tmp_path / "weights.pth")
    torch.save({"state_dict": {}}, file)
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("a file was read"))
    value = {key: file for key in value} if isinstance(value, dict) else file if value == "FILE" else value
    with pytest.raises(ValueError, match=rf"MODEL.TIMM.ARGS.*{name}.*must be"):
        build("MODEL.TIMM.ARGS", {name: value})


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("MODEL.TIMM.NAME", "resnet19"), "no model 'resnet19'.*resnet18"),
        (
            ("MODEL.TIMM.NAME", "vit_tiny_patch16_224"),
            "no res3 .stride 8., res5 .stride 32.; its maps have the strides 16",
        ),
        (("MODEL.TIMM.NAME", "crossvit_tiny_240"), "crossvit_tiny_240 has no res3.*strides none"),
        (("MODEL.TIMM.NAME", "levit_128s"), "levit_128s has no res3"),
        (("MODEL.TIMM.OUT_FEATURES", ["p3"]), r"MODEL.TIMM.OUT_FEATURES is \['p3'\].*res1, res2"),
        (("MODEL.TIMM.OUT_FEATURES", []), "MODEL.TIMM.OUT_FEATURES.*one or more"),
        (("MODEL.TIMM.NORM", "GN"), "resnet18 is 'GN'.*FrozenBN"),
    ],
)
def test_what_is_refused(opts, message):
    with pytest.raises(ValueError, match=message):
        build(*opts)


def test_without_timm(monkeypatch):
    for name in ("timm", "timm.layers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"sparseinst\[timm\]"):
        build_model(tiny_cfg(*TIMM))
    build_model(tiny_cfg())  # Detectron2's ResNet does not need it


def test_interfaces_of_timm_are_neither_private_nor_deprecated():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        warnings.simplefilter("error", FutureWarning)
        TimmBackbone("resnet18", LEVELS, norm="FrozenBN", freeze_at=2)
        TimmBackbone("swin_tiny_patch4_window7_224", LEVELS, norm="SyncBN")

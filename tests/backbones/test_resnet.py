"""Deformable ResNets against Detectron2's plain ones, ResNet-vd against timm's resnet*d."""

import importlib.util

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone, build_model
from torch import nn

from sparseinst.ops.deform_conv import DeformConv2d
from tests.tiny_model import random_input, tiny_cfg, tiny_model

DCN = ("MODEL.BACKBONE.NAME", "build_resnet_dcn_backbone")
VD = ("MODEL.BACKBONE.NAME", "build_resnet_vd_backbone", "MODEL.RESNETS.NORM", "FrozenBN")
R50 = ("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256, "MODEL.RESNETS.STRIDE_IN_1X1", False)
DEFORM = ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, False, True, True])


def build(*opts):
    torch.manual_seed(0)
    return build_backbone(tiny_cfg(*opts)).eval()


def deformable_blocks(backbone):
    return [name.removesuffix(".conv2") for name, part in backbone.named_modules() if isinstance(part, DeformConv2d)]


def assert_same(found, expected):
    """Equal but for the order of sums."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def randomize_norms(module):
    """Norms as after training, so that no branch is an identity."""
    for part in module.modules():
        if hasattr(part, "running_var"):
            for name, value in [*part.named_parameters(), *part.named_buffers()]:
                if value.is_floating_point():
                    nn.init.uniform_(value, 0.8, 1.2) if "mean" not in name else nn.init.normal_(value, std=0.1)


@pytest.mark.parametrize(
    "opts",
    [
        (),
        ("MODEL.RESNETS.NORM", "FrozenBN"),
        R50,
        (*R50, "MODEL.RESNETS.STRIDE_IN_1X1", True, "MODEL.RESNETS.NORM", "GN"),
        (*R50, "MODEL.RESNETS.NUM_GROUPS", 4, "MODEL.RESNETS.WIDTH_PER_GROUP", 8),
        (*R50, "MODEL.RESNETS.RES5_DILATION", 2, "MODEL.RESNETS.OUT_FEATURES", ["res4", "res5"]),
    ],
)
def test_without_offsets_dcn_is_detectron2s_resnet(opts):
    plain = build("MODEL.BACKBONE.NAME", "build_resnet_backbone", *opts)
    deformable = build(*DCN, *DEFORM, *opts)
    missing = deformable.load_state_dict(plain.state_dict(), strict=False)
    assert not missing.unexpected_keys and missing.missing_keys
    assert all("conv2_offset" in name for name in missing.missing_keys)
    assert deformable.output_shape() == plain.output_shape()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for name, feature in plain(images).items():
            assert_same(deformable(images)[name], feature)


def test_which_stages_are_deformable():
    assert deformable_blocks(build(*DCN)) == []
    last = ("MODEL.RESNETS.OUT_FEATURES", ["res2", "res5"])
    assert deformable_blocks(build(*DCN, *DEFORM, *last)) == ["res4.0", "res4.1", "res5.0", "res5.1"]
    # Without a feature of res5 there is no res5.
    assert deformable_blocks(build(*DCN, *DEFORM)) == ["res4.0", "res4.1"]
    assert deformable_blocks(build(*VD, *DEFORM, *last)) == [f"body.layer{i}.{j}" for i in (3, 4) for j in (0, 1)]
    assert deformable_blocks(build(*VD, *DEFORM)) == ["body.layer3.0", "body.layer3.1"]


def test_every_third_block_is_deformable():
    backbone = build(*DCN, *R50, *DEFORM, "MODEL.RESNETS.OUT_FEATURES", ["res5"], "MODEL.RESNETS.DEFORM_INTERVAL", 3)
    assert deformable_blocks(backbone) == ["res4.0", "res4.3", "res5.0"]


@pytest.mark.parametrize("builder", [DCN, VD])
def test_modulated_and_groups(builder):
    backbone = build(*builder, *DEFORM, "MODEL.RESNETS.DEFORM_MODULATED", True, "MODEL.RESNETS.DEFORM_NUM_GROUPS", 2)
    names = {name: value for name, value in backbone.state_dict().items() if "conv2_offset" in name}
    assert names and all(value.shape[0] == 27 * 2 for value in names.values())
    assert all(torch.isfinite(feature).all() for feature in backbone(torch.randn(1, 3, 64, 64)).values())


@pytest.mark.parametrize("builder", [DCN, VD])
def test_freeze_at(builder):
    opts = ("MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"], *DEFORM)
    backbone = build(*builder, *opts, "MODEL.BACKBONE.FREEZE_AT", 4)
    trained = {name.removeprefix("body.").split(".")[0] for name, p in backbone.named_parameters() if p.requires_grad}
    assert trained == {"res5"} if builder is DCN else {"layer4"}
    assert len(deformable_blocks(backbone)) == 4


@pytest.mark.parametrize("builder", [DCN, VD])
def test_a_deformable_model_trains_with_its_offsets(builder):
    model = tiny_model(*builder, *DEFORM).train()
    sum(model([random_input(num_instances=3)]).values()).backward()
    offsets = [(name, parameter) for name, parameter in model.named_parameters() if "offset" in name]
    assert len(offsets) == 4
    for name, parameter in offsets:
        assert torch.isfinite(parameter.grad).all() and parameter.grad.any(), name


def test_state_dict_returns():
    backbone = build(*DCN, *DEFORM)
    nn.init.normal_(backbone.res4[0].conv2.offset.weight)
    other = build(*DCN, *DEFORM)
    other.load_state_dict(backbone.state_dict())
    assert torch.equal(other.res4[0].conv2.offset.weight, backbone.res4[0].conv2.offset.weight)
    state = backbone.state_dict()
    del state["res4.0.conv2_offset.bias"]
    assert other.load_state_dict(state, strict=False).missing_keys == ["res4.0.conv2_offset.bias"]


@pytest.mark.skipif(
    importlib.util.find_spec("detectron2._C") is not None and torch.cuda.is_available(),
    reason="Detectron2's own operators may work here",
)
def test_the_stock_name_says_which_name_to_take():
    with pytest.raises(ImportError, match="DEFORM_ON_PER_STAGE.*build_resnet_backbone.*build_resnet_dcn_backbone"):
        build_model(tiny_cfg(*R50, *DEFORM))


def test_other_import_errors_stay_as_they_are(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ImportError, match="sparseinst.timm") as error:
        build_model(tiny_cfg(*VD))
    assert "DEFORM_ON_PER_STAGE" not in str(error.value)


@pytest.mark.parametrize("depth", [18, 50])
def test_vd_is_timms_resnet_d(depth):
    timm = pytest.importorskip("timm")
    theirs = timm.create_model(f"resnet{depth}d", features_only=True, out_indices=(1, 2, 3, 4)).eval()
    randomize_norms(theirs)
    features = ["res2", "res3", "res4", "res5"]
    images = torch.randn(1, 3, 64, 96)
    for opts in ((), DEFORM):  # offsets of zero change nothing
        ours = build(*VD, "MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.OUT_FEATURES", features, *opts)
        result = ours.load_state_dict(theirs.state_dict(), strict=False)
        assert all("conv2_offset" in name for name in result.missing_keys)
        assert all(name.endswith("num_batches_tracked") for name in result.unexpected_keys)
        with torch.no_grad():
            found, expected = ours(images), theirs(images)
        assert list(found) == features
        for name, feature in zip(features, expected):
            assert_same(found[name], feature)
            assert ours.output_shape()[name].channels == feature.shape[1]


@pytest.mark.parametrize("depth", [34, 101, 152])
def test_vd_of_other_depths(depth):
    backbone = build(*VD, "MODEL.RESNETS.DEPTH", depth)
    assert list(backbone.output_shape()) == ["res2", "res3", "res4"]


@pytest.mark.parametrize("norm", ["BN", "FrozenBN", "SyncBN"])
def test_vd_norms(norm):
    backbone = build(*VD, "MODEL.RESNETS.NORM", norm)
    names = {type(part).__name__ for part in backbone.modules() if "Norm" in type(part).__name__}
    assert names == {{"BN": "BatchNorm2d", "FrozenBN": "FrozenBatchNorm2d", "SyncBN": "SyncBatchNorm"}[norm]}


def test_zero_initialised_norms_train_or_are_one():
    trained, frozen = build(*VD, "MODEL.RESNETS.NORM", "BN"), build(*VD, *DEFORM)
    assert not trained.body.layer1[0].bn2.weight.any() and trained.body.layer1[0].bn2.weight.requires_grad
    norms = [part for part in frozen.modules() if hasattr(part, "running_var")]
    assert norms and all((norm.weight != 0).all() for norm in norms)
    in_part = build(*VD, "MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 2)
    assert (in_part.body.layer1[0].bn2.weight != 0).all() and not in_part.body.layer2[0].bn2.weight.any()
    assert not isinstance(in_part.body.layer1[0].bn2, nn.BatchNorm2d | FrozenBatchNorm2d)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("DEPTH", 26, "DEPTH is 26.*50"),
        ("NORM", "GN", "NORM is 'GN'.*FrozenBN"),
        ("NORM", "", "NORM is ''"),
        ("OUT_FEATURES", ["res3", "res6"], "OUT_FEATURES.*res6.*res5"),
        ("OUT_FEATURES", [], "OUT_FEATURES.*one or more"),
        ("RES5_DILATION", 2, "RES5_DILATION is 2"),
        ("NUM_GROUPS", 32, "NUM_GROUPS is 32"),
        ("DEFORM_ON_PER_STAGE", [True], "DEFORM_ON_PER_STAGE.*four stages"),
    ],
)
def test_what_vd_refuses(key, value, message):
    with pytest.raises(ValueError, match=f"MODEL.RESNETS.{message}"):
        build(*VD, f"MODEL.RESNETS.{key}", value)

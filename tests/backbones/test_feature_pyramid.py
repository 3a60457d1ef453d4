"""Feature pyramids around timm's models and deformable ResNets."""

import pytest
import torch
from detectron2.layers import ShapeSpec

from tests.checkpoint.sources import IMAGES, backbone_model

FEATURES = ["res2", "res3", "res4", "res5"]
TIMM = ("MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", "MODEL.TIMM.NAME", "tf_efficientnet_lite0", "MODEL.TIMM.NORM",
        "FrozenBN", "MODEL.FPN.OUT_CHANNELS", 16)  # fmt: skip


def pyramid(*opts):
    return backbone_model(*TIMM, *opts).backbone


@torch.no_grad()
def test_levels_of_a_timm_pyramid():
    pytest.importorskip("timm", reason="the model is this package's")
    backbone = pyramid("MODEL.TIMM.OUT_FEATURES", FEATURES, "MODEL.FPN.IN_FEATURES", FEATURES)
    strides = {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}
    assert backbone.output_shape() == {name: ShapeSpec(channels=16, stride=stride) for name, stride in strides.items()}
    features = backbone(IMAGES)
    # 96 x 64; p6 is every second pixel of p5.
    assert {name: tuple(level.shape[2:]) for name, level in features.items()} == {
        "p2": (24, 16), "p3": (12, 8), "p4": (6, 4), "p5": (3, 2), "p6": (2, 1),
    }  # fmt: skip
    assert torch.equal(features["p6"], features["p5"][..., ::2, ::2])
    # The coarsest level is a convolution of res5 alone.
    res5 = backbone.bottom_up(IMAGES)["res5"]
    torch.testing.assert_close(features["p5"], backbone.fpn_output5(backbone.fpn_lateral5(res5)))


@pytest.mark.parametrize(
    ("out_features", "in_features"),
    [(FEATURES[:3], FEATURES), (FEATURES, FEATURES[:3]), (FEATURES, FEATURES[::-1]), (FEATURES, [])],
)
def test_features_that_do_not_fit_are_told(out_features, in_features):
    pytest.importorskip("timm", reason="the model is this package's")
    with pytest.raises(ValueError, match=r"MODEL.FPN.IN_FEATURES is \[.*res2 \(stride 4\).*MODEL.TIMM"):
        pyramid("MODEL.TIMM.OUT_FEATURES", out_features, "MODEL.FPN.IN_FEATURES", in_features)


def test_a_deformable_resnet_has_the_same_check():
    opts = ("MODEL.BACKBONE.NAME", "build_resnet_dcn_fpn_backbone", "MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4"])
    with pytest.raises(ValueError, match="the last one of stride 32"):
        backbone_model(*opts)

"""Detectron2's own backbones under SparseInst, also those that have no name for a YAML file."""

import pytest
import torch
from detectron2.config import LazyCall, instantiate
from detectron2.modeling.backbone import (
    FPN,
    BasicStem,
    MViT,
    RegNet,
    ResNet,
    SimpleFeaturePyramid,
    SwinTransformer,
    ViT,
)
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.regnet import ResBottleneckBlock, SimpleStem

from sparseinst.modeling.sparse_inst.criterion import SparseInstCriterion
from sparseinst.modeling.sparse_inst.decoder import GroupIAMDecoder, InstanceBranch, MaskBranch
from sparseinst.modeling.sparse_inst.encoder import InstanceContextEncoder
from sparseinst.modeling.sparse_inst.matcher import SparseInstMatcher
from sparseinst.modeling.sparse_inst.model import SparseInst
from tests.tiny_model import NUM_CLASSES, random_input, tiny_cfg, tiny_model

RESNET = LazyCall(ResNet)(
    stem=LazyCall(BasicStem)(in_channels=3, out_channels=64, norm="BN"),
    stages=LazyCall(ResNet.make_default_stages)(depth=18, norm="BN"),
    out_features=["res3", "res4", "res5"],
)
# Each with the features that the encoder takes, finest first.
BACKBONES = {
    "ResNet": (RESNET, ["res3", "res4", "res5"]),
    "FPN": (
        LazyCall(FPN)(
            bottom_up=RESNET,
            in_features=["res3", "res4", "res5"],
            out_channels=16,
            top_block=LazyCall(LastLevelMaxPool)(),
        ),
        ["p3", "p4", "p5", "p6"],
    ),
    "RegNet": (
        LazyCall(RegNet)(
            stem_class=SimpleStem, stem_width=8, block_class=ResBottleneckBlock, depth=13, w_a=36.44, w_0=24, w_m=2.49,
            group_width=8, out_features=["s2", "s3", "s4"],
        ),
        ["s2", "s3", "s4"],
    ),
    "Swin": (
        LazyCall(SwinTransformer)(embed_dim=12, depths=[2, 2, 2, 2], num_heads=[1, 1, 2, 2], out_indices=[1, 2, 3]),
        ["p1", "p2", "p3"],
    ),
    "MViT": (
        LazyCall(MViT)(embed_dim=12, depth=4, num_heads=1, last_block_indexes=[0, 1, 2, 3]),
        ["scale3", "scale4", "scale5"],
    ),
    "ViTDet": (
        LazyCall(SimpleFeaturePyramid)(
            net=LazyCall(ViT)(
                img_size=128, patch_size=16, embed_dim=24, depth=2, num_heads=2, out_feature="last_feat",
                use_rel_pos=True, window_size=4, window_block_indexes=[0],
            ),
            in_feature="last_feat", out_channels=16, scale_factors=[2.0, 1.0, 0.5], norm="LN",
        ),
        ["p3", "p4", "p5"],
    ),
}  # fmt: skip


def build(name):
    torch.manual_seed(0)
    lazy_backbone, in_features = BACKBONES[name]
    backbone = instantiate(lazy_backbone)
    width = 16
    return SparseInst(
        backbone=backbone,
        encoder=InstanceContextEncoder(
            input_shape=backbone.output_shape(), in_features=in_features, num_channels=width
        ),
        decoder=GroupIAMDecoder(
            inst_branch=InstanceBranch(
                in_channels=width, dim=width, num_convs=1, num_masks=6, num_classes=NUM_CLASSES, kernel_dim=8,
                num_groups=2, with_fc=True,
            ),
            mask_branch=MaskBranch(in_channels=width, dim=width, num_convs=1, kernel_dim=8),
        ),
        criterion=SparseInstCriterion(matcher=SparseInstMatcher(alpha=0.8, beta=0.2)),
        pixel_mean=[123.675, 116.280, 103.530],
        pixel_std=[58.395, 57.120, 57.375],
    )  # fmt: skip


def check_step_and_prediction(model):
    inputs = [random_input(50, 70, num_instances=3), random_input(64, 96, num_instances=2, seed=1)]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    sum(model.train()(inputs).values()).backward()
    for name, parameter in model.backbone.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name
    touched = [parameter.grad is not None and parameter.grad.any() for parameter in model.backbone.parameters()]
    assert sum(touched) > 0.8 * len(touched)
    optimizer.step()
    model.eval()
    model.cls_threshold = 0.0
    with torch.no_grad():
        instances = model(inputs)[0]["instances"]
    assert instances.pred_masks.shape[1:] == (50, 70) and torch.isfinite(instances.scores).all()


@pytest.mark.parametrize("name", BACKBONES)
def test_it_trains_a_step_and_infers(name):
    check_step_and_prediction(build(name))


def test_fpn_by_name():
    model = tiny_model(
        "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone",
        "MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"],
        "MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"],
        "MODEL.FPN.OUT_CHANNELS", 16,
        "MODEL.SPARSE_INST.ENCODER.IN_FEATURES", ["p3", "p4"],
    )  # fmt: skip
    check_step_and_prediction(model)


def test_features_of_another_backbone_are_refused_by_name():
    opts = ("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4"])
    with pytest.raises(ValueError, match="ENCODER.IN_FEATURES.*p3"):
        tiny_model(*opts)
    assert tiny_cfg(*opts).MODEL.SPARSE_INST.ENCODER.IN_FEATURES == ["res3", "res4"]

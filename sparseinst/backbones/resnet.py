"""Deformable ResNet, and ResNet-vd (arXiv 1812.01187, "ResNet-D") with or without deformable convolutions."""

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, ResNet, build_resnet_backbone
from torch import nn

from sparseinst.backbones.feature_pyramid import build_feature_pyramid
from sparseinst.backbones.state_dict_names import rename_state_dict
from sparseinst.backbones.timm_backbone import TimmBackbone, select_strides
from sparseinst.ops.deform_conv import make_deformable, own_name, published_name

VD_DEPTHS = (18, 34, 50, 101, 152)
VD_STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
VD_NORMS = ("BN", "FrozenBN", "SyncBN")
# Keys that a ResNet-vd cannot follow, and the value that is its own. STRIDE_IN_1X1, which Detectron2 sets by default,
# is not among them: here the stride is always in the 3x3 convolution.
VD_FIXED = {"NUM_GROUPS": 1, "WIDTH_PER_GROUP": 64, "STEM_OUT_CHANNELS": 64, "RES5_DILATION": 1}


@BACKBONE_REGISTRY.register()
def build_resnet_dcn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Build Detectron2's ResNet with stages that are deformable without compiled operators (DEFORM_ON_PER_STAGE).

    Follows all keys of MODEL.RESNETS, DEFORM_MODULATED, DEFORM_NUM_GROUPS and DEFORM_INTERVAL included, and has the
    state-dict names of ``build_resnet_backbone``. ResNet-18 and -34 can be deformable too: in the second convolution of
    a block.

    Raises:
        ValueError: DEFORM_NUM_GROUPS does not divide the channels; not four stages.
    """
    plain_cfg = cfg.clone()
    plain_cfg.defrost()
    plain_cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False] * 4
    backbone = build_resnet_backbone(plain_cfg, input_shape)
    _make_stages_deformable(cfg, backbone, ("res2", "res3", "res4", "res5"))
    rename_state_dict(backbone, published_name, own_name)
    return backbone


@BACKBONE_REGISTRY.register()
def build_resnet_dcn_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build Detectron2's feature pyramid (p2 to p6) around the ResNet of `build_resnet_dcn_backbone`."""
    return build_feature_pyramid(cfg, build_resnet_dcn_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_resnet_vd_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    """Build ResNet-vd of MODEL.RESNETS.DEPTH: timm's resnet50d and so on, under timm's names.

    Follows DEPTH, NORM, OUT_FEATURES (res2 to res5), DEFORM_ON_PER_STAGE, DEFORM_MODULATED, DEFORM_NUM_GROUPS and
    DEFORM_INTERVAL of MODEL.RESNETS, and MODEL.BACKBONE.FREEZE_AT.

    Raises:
        ImportError: timm is not installed.
        ValueError: a key of MODEL.RESNETS that cannot be used.
    """
    resnets = cfg.MODEL.RESNETS
    if resnets.DEPTH not in VD_DEPTHS:
        raise ValueError(f"MODEL.RESNETS.DEPTH is {resnets.DEPTH}; a ResNet-vd has {', '.join(map(str, VD_DEPTHS))}")
    if resnets.NORM not in VD_NORMS:
        raise ValueError(f"MODEL.RESNETS.NORM is {resnets.NORM!r}; a ResNet-vd has {', '.join(VD_NORMS)}")
    for key, value in VD_FIXED.items():
        if resnets[key] != value:
            raise ValueError(f"MODEL.RESNETS.{key} is {resnets[key]}; a ResNet-vd has {value} and nothing else")
    backbone = TimmBackbone(
        f"resnet{resnets.DEPTH}d",
        select_strides("MODEL.RESNETS.OUT_FEATURES", resnets.OUT_FEATURES, VD_STRIDES),
        in_channels=input_shape.channels,
        norm=resnets.NORM,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        to_published=published_name,
        from_published=own_name,
    )
    _make_stages_deformable(cfg, backbone.body, ("layer1", "layer2", "layer3", "layer4"))
    return backbone


def _make_stages_deformable(cfg: CfgNode, resnet: nn.Module, stages: Sequence[str]) -> None:
    """Make stages deformable as configured; the last ones may be absent where no feature of theirs is asked for."""
    resnets = cfg.MODEL.RESNETS
    if len(resnets.DEFORM_ON_PER_STAGE) != len(stages):
        raise ValueError(
            f"MODEL.RESNETS.DEFORM_ON_PER_STAGE is {resnets.DEFORM_ON_PER_STAGE}; it must have a value for each of "
            "the four stages"
        )
    for name, is_deformable in zip(stages, resnets.DEFORM_ON_PER_STAGE):
        if is_deformable and hasattr(resnet, name):
            make_deformable(
                getattr(resnet, name),
                num_groups=resnets.DEFORM_NUM_GROUPS,
                modulated=resnets.DEFORM_MODULATED,
                interval=resnets.DEFORM_INTERVAL,
            )

"""Register the builders of further backbones with Detectron2."""

from sparseinst.backbones.cspnet import build_cspnet_backbone
from sparseinst.backbones.pvt import build_pyramid_vision_transformer
from sparseinst.backbones.resnet import (
    build_resnet_dcn_backbone,
    build_resnet_dcn_fpn_backbone,
    build_resnet_vd_backbone,
)
from sparseinst.backbones.timm_backbone import TimmBackbone, build_timm_backbone, build_timm_fpn_backbone

__all__ = [
    "TimmBackbone",
    "build_cspnet_backbone",
    "build_pyramid_vision_transformer",
    "build_resnet_dcn_backbone",
    "build_resnet_dcn_fpn_backbone",
    "build_resnet_vd_backbone",
    "build_timm_backbone",
    "build_timm_fpn_backbone",
]

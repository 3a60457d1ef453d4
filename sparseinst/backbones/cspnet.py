"""DarkNet-53 (arXiv 1804.02767) and CSPDarkNet-53 (arXiv 1911.11929): timm's, under timm's names."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from torch import nn

from sparseinst.backbones.timm_backbone import TimmBackbone, select_strides

NAMES = ("darknet53", "cspdarknet53")
STRIDES = {"csp0": 2, "csp1": 4, "csp2": 8, "csp3": 16, "csp4": 32}


@BACKBONE_REGISTRY.register()
def build_cspnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    """Build the network MODEL.CSPNET.NAME, with leaky ReLUs of MODEL.CSPNET.NEGATIVE_SLOPE.

    Raises:
        ImportError: timm is not installed.
        ValueError: a key of MODEL.CSPNET that cannot be used.
    """
    cspnet = cfg.MODEL.CSPNET
    if cspnet.NAME not in NAMES:
        raise ValueError(f"MODEL.CSPNET.NAME is {cspnet.NAME!r}; it must be one of {', '.join(NAMES)}")
    backbone = TimmBackbone(
        cspnet.NAME,
        select_strides("MODEL.CSPNET.OUT_FEATURES", cspnet.OUT_FEATURES, STRIDES),
        in_channels=input_shape.channels,
        norm=cspnet.NORM,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )
    for module in backbone.modules():
        if isinstance(module, nn.LeakyReLU):
            module.negative_slope = cspnet.NEGATIVE_SLOPE
    return backbone

"""Detectron2's feature pyramid around any backbone."""

from detectron2.config import CfgNode
from detectron2.modeling import FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool


def build_feature_pyramid(cfg: CfgNode, bottom_up: Backbone) -> FPN:
    """Build an FPN with an additional coarsest level, as ``build_resnet_fpn_backbone`` does; it has stride 64.

    Args:
        cfg: IN_FEATURES, OUT_CHANNELS, NORM and FUSE_TYPE of MODEL.FPN are read.
        bottom_up: its features of strides 4, 8, 16, 32 become p2, p3, p4, p5.

    Raises:
        ValueError: MODEL.FPN.IN_FEATURES has a feature that the backbone does not give, or none of stride 32.
    """
    fpn = cfg.MODEL.FPN
    shapes = bottom_up.output_shape()
    strides = [shapes[name].stride for name in fpn.IN_FEATURES if name in shapes]
    if len(strides) < len(fpn.IN_FEATURES) or strides != sorted(set(strides)) or strides[-1:] != [32]:
        found = ", ".join(f"{name} (stride {shape.stride})" for name, shape in shapes.items())
        raise ValueError(
            f"MODEL.FPN.IN_FEATURES is {list(fpn.IN_FEATURES)}; expected features of the backbone, finest first, the "
            f"last one of stride 32. The backbone gives {found}: see OUT_FEATURES of MODEL.RESNETS or MODEL.TIMM"
        )
    return FPN(
        bottom_up=bottom_up,
        in_features=fpn.IN_FEATURES,
        out_channels=fpn.OUT_CHANNELS,
        norm=fpn.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=fpn.FUSE_TYPE,
    )

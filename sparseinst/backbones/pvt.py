"""Pyramid Vision Transformer v2 (arXiv 2106.13797): timm's, under the names of its own publication."""

import re

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from torch import nn

from sparseinst.backbones.timm_backbone import TimmBackbone, select_strides
from sparseinst.ops.pooling import AdaptiveAveragePool

SIZES = ("b0", "b1", "b2", "b3", "b4", "b5")
STRIDES = {"p1": 4, "p2": 8, "p3": 16, "p4": 32}
# As published: from 0 in the first block to this in the last.
DROP_PATH_RATE = 0.1


@BACKBONE_REGISTRY.register()
def build_pyramid_vision_transformer(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    """Build PVTv2 of the size MODEL.PVT.NAME; with MODEL.PVT.LINEAR b2 with linear attention, for every NAME.

    Raises:
        ImportError: timm is not installed.
        ValueError: a key of MODEL.PVT that cannot be used.
    """
    pvt = cfg.MODEL.PVT
    if pvt.NAME not in SIZES:
        raise ValueError(f"MODEL.PVT.NAME is {pvt.NAME!r}; it must be one of {', '.join(SIZES)}")
    backbone = TimmBackbone(
        "pvt_v2_b2_li" if pvt.LINEAR else f"pvt_v2_{pvt.NAME}",
        select_strides("MODEL.PVT.OUT_FEATURES", pvt.OUT_FEATURES, STRIDES),
        in_channels=input_shape.channels,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        to_published=published_name,
        from_published=timm_name,
        model_args={"drop_path_rate": DROP_PATH_RATE},
    )
    for module in list(backbone.modules()):
        if isinstance(pool := getattr(module, "pool", None), nn.AdaptiveAvgPool2d):
            # Of linear attention: without tensors, and its export to ONNX is right at any size.
            module.pool = AdaptiveAveragePool(pool.output_size)
    return backbone


def published_name(name: str) -> str:
    """Return a timm tensor's name in the published state dicts, where stages count from 1 and are not nested."""
    name = re.sub(r"^patch_embed\.", "patch_embed1.", name)
    name = re.sub(r"^stages\.(\d+)\.downsample\.", lambda match: f"patch_embed{int(match[1]) + 1}.", name)
    name = re.sub(r"^stages\.(\d+)\.blocks\.", lambda match: f"block{int(match[1]) + 1}.", name)
    name = re.sub(r"^stages\.(\d+)\.norm\.", lambda match: f"norm{int(match[1]) + 1}.", name)
    return name.replace(".mlp.dwconv.", ".mlp.dwconv.dwconv.")


def timm_name(name: str) -> str:
    """Reverse :func:`published_name`."""
    name = re.sub(r"^patch_embed1\.", "patch_embed.", name)
    name = re.sub(r"^patch_embed(\d+)\.", lambda match: f"stages.{int(match[1]) - 1}.downsample.", name)
    name = re.sub(r"^block(\d+)\.", lambda match: f"stages.{int(match[1]) - 1}.blocks.", name)
    name = re.sub(r"^norm(\d+)\.", lambda match: f"stages.{int(match[1]) - 1}.norm.", name)
    return name.replace(".mlp.dwconv.dwconv.", ".mlp.dwconv.")

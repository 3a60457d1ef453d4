"""The heads of YOLACT: prototypes, predictions of anchors, and the IoU of masks (YOLACT++).

A is the number of anchors of a cell, N that of all anchors, k the number of prototypes; other letters:
sparseinst.structures.
"""

import itertools
from collections.abc import Mapping

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.utils.registry import Registry
from torch import nn
from torch.nn import functional as F

from sparseinst.config import registered
from sparseinst.modeling.yolact.fpn import init_conv

# Output channels of the strided convolutions of MaskIoUHead.
_MASK_IOU_WIDTHS = (8, 16, 32, 64, 128)

PROTOTYPE_NET_REGISTRY = Registry("PROTOTYPE_NET")
PROTOTYPE_NET_REGISTRY.__doc__ = """
Modules from the finest level (B, C, H, W) to prototypes (B, k, scale * H, scale * W), all at least 0, with the
attribute ``scale``. Built as ``Name(cfg, input_shape)`` with the ShapeSpec of the finest level.
"""
YOLACT_HEAD_REGISTRY = Registry("YOLACT_HEAD")
YOLACT_HEAD_REGISTRY.__doc__ = """
Modules from the levels to a dict with ``class_logits`` (B, N, K + 1), background last, ``box_deltas`` (B, N, 4) and
``coefficients`` (B, N, k) in [-1, 1]. Built as ``Name(cfg, input_shape, num_anchors)`` with the ShapeSpec of the levels
by name, finest first, and A.
"""


@PROTOTYPE_NET_REGISTRY.register()
class ProtoNet(nn.Module):
    """Compute prototypes from the finest level, at twice its size (YOLACT, section 3.1).

    Args:
        input_shape: of the finest level.
        num_prototypes: k.
        num_convs: convolutions before the upsampling; one follows.
        channels: their width.
    """

    scale = 2

    @configurable
    def __init__(
        self, input_shape: ShapeSpec, *, num_prototypes: int = 32, num_convs: int = 3, channels: int = 256
    ) -> None:
        super().__init__()
        self.num_convs = num_convs
        in_channels = input_shape.channels
        for index in range(1, num_convs + 2):
            setattr(self, f"conv{index}", nn.Conv2d(in_channels, channels, 3, padding=1))
            in_channels = channels
        self.predictor = nn.Conv2d(channels, num_prototypes, 1)
        self.apply(init_conv)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        node = cfg.MODEL.YOLACT
        return {
            "input_shape": input_shape,
            "num_prototypes": node.NUM_PROTOTYPES,
            "num_convs": node.PROTOTYPE_NET.NUM_CONVS,
            "channels": node.PROTOTYPE_NET.CHANNELS,
        }

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) to (B, k, 2 H, 2 W), at least 0."""
        for index in range(1, self.num_convs + 1):
            features = getattr(self, f"conv{index}")(features).relu()
        features = F.interpolate(features, scale_factor=self.scale, mode="bilinear", align_corners=False)
        features = getattr(self, f"conv{self.num_convs + 1}")(features).relu()
        return self.predictor(features).relu()


@YOLACT_HEAD_REGISTRY.register()
class YOLACTHead(nn.Module):
    """Predict classes, boxes and coefficients with the same weights on every level (YOLACT, section 3.2).

    Args:
        input_shape: of the levels by name, finest first.
        num_anchors: A.
        num_classes: K.
        num_prototypes: k.
        num_convs: convolutions before the predictors.
        channels: their width.
    """

    @configurable
    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        num_anchors: int,
        *,
        num_classes: int = 80,
        num_prototypes: int = 32,
        num_convs: int = 1,
        channels: int = 256,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_prototypes = num_prototypes
        self.in_features = list(input_shape)
        in_channels = next(iter(input_shape.values())).channels
        widths = [in_channels] + [channels] * num_convs
        self.tower = nn.ModuleList(nn.Conv2d(*pair, 3, padding=1) for pair in zip(widths, widths[1:]))
        self.cls_score = nn.Conv2d(widths[-1], num_anchors * (num_classes + 1), 3, padding=1)
        self.bbox_pred = nn.Conv2d(widths[-1], num_anchors * 4, 3, padding=1)
        self.coeff_pred = nn.Conv2d(widths[-1], num_anchors * num_prototypes, 3, padding=1)
        self.apply(init_conv)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec], num_anchors: int) -> dict:
        node = cfg.MODEL.YOLACT
        return {
            "input_shape": input_shape,
            "num_anchors": num_anchors,
            "num_classes": node.NUM_CLASSES,
            "num_prototypes": node.NUM_PROTOTYPES,
            "num_convs": node.NUM_CONVS,
            "channels": node.CHANNELS,
        }

    def forward(self, features: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the predictions of all anchors: levels in order, cells by rows, then the anchors of a cell."""
        outputs: dict[str, list[torch.Tensor]] = {"class_logits": [], "box_deltas": [], "coefficients": []}
        for name in self.in_features:
            level = features[name]
            for convolution in self.tower:
                level = convolution(level).relu()
            outputs["class_logits"].append(permute_to_N_HWA_K(self.cls_score(level), self.num_classes + 1))
            outputs["box_deltas"].append(permute_to_N_HWA_K(self.bbox_pred(level), 4))
            outputs["coefficients"].append(permute_to_N_HWA_K(self.coeff_pred(level).tanh(), self.num_prototypes))
        return {name: torch.cat(levels, dim=1) for name, levels in outputs.items()}


class MaskIoUHead(nn.Module):
    """Predict the IoU of a soft mask with its object, for each class (YOLACT++, section 6.3).

    Runs in post-processing, on the masks that NMS keeps.

    Args:
        num_classes: K.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        for index, pair in enumerate(itertools.pairwise((1, *_MASK_IOU_WIDTHS)), start=1):
            setattr(self, f"conv{index}", nn.Conv2d(*pair, 3, stride=2))
        self.predictor = nn.Conv2d(_MASK_IOU_WIDTHS[-1], num_classes, 1)
        self.apply(init_conv)

    def forward(self, mask_probs: torch.Tensor) -> torch.Tensor:
        """Map soft masks (n, Hp, Wp) in [0, 1] to IoUs (n, K), at least 0; both sides are at least 63 cells."""
        # Weights may be stored in 16 bits; no autocast runs here.
        features = mask_probs[:, None].to(self.predictor.weight.dtype)
        for index in range(1, len(_MASK_IOU_WIDTHS) + 1):
            features = getattr(self, f"conv{index}")(features).relu()
        return self.predictor(features).relu().amax((2, 3)).float()


def build_prototype_net(cfg: CfgNode, input_shape: ShapeSpec) -> nn.Module:
    """Build the module named by MODEL.YOLACT.PROTOTYPE_NET.NAME."""
    return registered(PROTOTYPE_NET_REGISTRY, cfg, "MODEL.YOLACT.PROTOTYPE_NET.NAME")(cfg, input_shape)


def build_yolact_head(cfg: CfgNode, input_shape: Mapping[str, ShapeSpec], num_anchors: int) -> nn.Module:
    """Build the head named by MODEL.YOLACT.HEAD."""
    return registered(YOLACT_HEAD_REGISTRY, cfg, "MODEL.YOLACT.HEAD")(cfg, input_shape, num_anchors)

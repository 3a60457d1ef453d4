"""A Detectron2 model that is not an InstanceSegmenter: its predictions follow from the colors of the pixels."""

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, Instances
from torch import nn
from torch.nn import functional as F

from sparseinst import add_sparse_inst_config


@META_ARCH_REGISTRY.register()
class RedSegmenter(nn.Module):
    """Red pixels are an instance of class 0 with score 0.9, blue ones of class 1 with score 0.3."""

    num_classes_key = "MODEL.SPARSE_INST.DECODER.NUM_CLASSES"
    mask_nms_key = "MODEL.SPARSE_INST.MASK_NMS_THRESHOLD"
    activation_maps_key = "MODEL.SPARSE_INST.DECODER.OUTPUT_IAM"

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.tensor([0.9, 0.3]))
        self.red_channel = cfg.INPUT.FORMAT.index("R")
        self.num_maps = cfg.MODEL.SPARSE_INST.DECODER.GROUPS if cfg.MODEL.SPARSE_INST.DECODER.OUTPUT_IAM else 0
        self.inputs: list[dict] = []

    def forward(self, batched_inputs: list[dict]) -> dict | list[dict]:
        if self.training:
            return {"loss_scores": (self.scores - 1).square().sum()}
        self.inputs = batched_inputs
        return [{"instances": self._segment(x)} for x in batched_inputs]

    def _segment(self, x: dict) -> Instances:
        image = x["image"].float()
        size = (x.get("height", image.shape[1]), x.get("width", image.shape[2]))
        red, green, blue = image[self.red_channel], image[1], image[2 - self.red_channel]
        masks = torch.stack([(red > 180) & (green < 90) & (blue < 90), (blue > 180) & (green < 90) & (red < 90)])
        masks = F.interpolate(masks[None].float(), size=size)[0] > 0.5
        found = masks.flatten(1).any(1)
        instances = Instances(size)
        boxes = [_tight_box(mask) for mask in masks[found]]
        instances.pred_boxes = Boxes(torch.stack(boxes) if boxes else torch.zeros(0, 4))
        instances.pred_masks = masks[found]
        instances.scores = self.scores.detach()[found]
        instances.pred_classes = torch.arange(2)[found]
        if self.num_maps:
            maps = F.interpolate(masks[None].float(), size=(8, 10))[0] * 8 - 4
            instances.pred_iams = maps[found][:, None].repeat(1, self.num_maps, 1, 1)
        return instances


def _tight_box(mask: torch.Tensor) -> torch.Tensor:
    ys, xs = mask.nonzero(as_tuple=True)
    return torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()


def red_segmenter_config() -> CfgNode:
    """Two classes, no weights, short side 60."""
    cfg = get_cfg()
    add_sparse_inst_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "RedSegmenter"
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.SPARSE_INST.DECODER.NUM_CLASSES = 2
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.MIN_SIZE_TEST = 60
    return cfg

"""A meta-architecture that shows how small one can be: it classifies each cell of 4x4 pixels.

The tests name this file in IMPORTS; nothing in the package knows it. Everything of one class is one instance.
"""

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, Instances
from torch import nn
from torch.nn import functional as F

from sparseinst.modeling.meta_arch import InstanceSegmenter, OutputOptions
from sparseinst.ops.mask_output import output_masks
from sparseinst.structures.gt_masks import gt_masks_tensor
from sparseinst.structures.rle_masks import RLEMasks


def add_config(cfg):
    cfg.MODEL.TOY_CLASSES = 3


@META_ARCH_REGISTRY.register()
class ToySegmenter(InstanceSegmenter):
    num_classes_key = "MODEL.TOY_CLASSES"

    @configurable
    def __init__(self, *, num_classes, **base):
        super().__init__(**base)
        self.convs = nn.Sequential(
            nn.Conv2d(3, 16, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 16, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(16, num_classes, 5, padding=2),
        )  # fmt: skip

    @classmethod
    def from_config(cls, cfg):
        model = cfg.MODEL
        return {"num_classes": model.TOY_CLASSES, "pixel_mean": model.PIXEL_MEAN, "pixel_std": model.PIXEL_STD,
                "output": OutputOptions.from_config(cfg)}  # fmt: skip

    def network(self, images):
        return {"class_logits": self.convs(images)}

    def prepare_targets(self, batched_inputs, images):
        height, width = images.tensor.shape[-2:]
        targets = torch.zeros(len(batched_inputs), self.convs[-1].out_channels, height // 4, width // 4)
        for target, x in zip(targets, batched_inputs):
            masks = F.pad(gt_masks_tensor(x["instances"]).float(), (0, width, 0, height))[:, :height, :width]
            masks = F.avg_pool2d(masks[:, None], 4)[:, 0]
            for mask, gt_class in zip(masks, x["instances"].gt_classes):
                target[gt_class] = target[gt_class].maximum(mask)
        return targets.to(self.device)

    def loss_counts(self, targets):
        return {"num_cells": targets.sum()}

    def losses(self, outputs, targets, counts=None):
        loss = F.binary_cross_entropy_with_logits(outputs["class_logits"], targets, reduction="sum")
        return {"loss_cells": loss / (counts or self.loss_counts(targets))["num_cells"].clamp(min=1)}

    def postprocess(self, outputs, batched_inputs, images):
        results = []
        for probs, x, size in zip(outputs["class_logits"].float().sigmoid(), batched_inputs, images.image_sizes):
            output_size = (x.get("height", size[0]), x.get("width", size[1]))
            scores, classes = probs.flatten(1).amax(1).sort(descending=True)
            classes = classes[scores > self.output.score_threshold]
            boxes, masks, found = output_masks(
                probs[classes], images.tensor.shape[-2:], size, output_size, 0.5, self.output.mask_format,
                self.output.max_mask_gib,
            )  # fmt: skip
            masks = RLEMasks(masks, output_size) if isinstance(masks, list) else masks
            instances = Instances(output_size, pred_boxes=Boxes(boxes), pred_masks=masks, scores=scores[found],
                                  pred_classes=classes[found])  # fmt: skip
            results.append({"instances": instances})
        return results

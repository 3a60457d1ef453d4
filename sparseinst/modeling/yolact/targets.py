"""Ground truth of YOLACT: boxes, masks on the prototypes' grid, labels of anchors. Letters: sparseinst.structures."""

from typing import NamedTuple

import torch
from detectron2.structures import BitMasks, Instances
from torch.nn import functional as F

from sparseinst.modeling.yolact.matcher import MatcherOptions, match
from sparseinst.ops.losses import semantic_masks
from sparseinst.structures.gt_masks import gt_masks_tensor, padded_masks


class AnchorTargets(NamedTuple):
    """Ground truth of one image, without crowds.

    Attributes:
        labels: (N,) int64: class of each anchor, K for background, -1 for no loss.
        gt_idx: (N,) int64: object of each anchor, where the label is below K.
        gt_boxes: (M, 4) x0, y0, x1, y1 in fractions of the image.
        gt_masks: (M, Hp, Wp) bool.
        num_classes: K.
        sem_seg: (K, H, W) bool on the finest level: the union of each class's masks; None where no head is trained.
    """

    labels: torch.Tensor
    gt_idx: torch.Tensor
    gt_boxes: torch.Tensor
    gt_masks: torch.Tensor
    num_classes: int
    sem_seg: torch.Tensor | None = None

    @property
    def is_positive(self) -> torch.Tensor:
        """Return which anchors have an object, (N,) bool."""
        return (self.labels >= 0) & (self.labels < self.num_classes)


def anchor_targets(
    instances: Instances,
    crowd_boxes: torch.Tensor | None,
    anchors: torch.Tensor,
    *,
    side: int,
    mask_size: tuple[int, int],
    sem_seg_size: tuple[int, int] | None,
    num_classes: int,
    options: MatcherOptions,
) -> AnchorTargets:
    """Return the targets of one image.

    Args:
        instances: ``gt_classes``, ``gt_masks`` and ``gt_boxes``, the boxes of the masks where these are absent.
        crowd_boxes: (n, 4) pixels; None: no crowd.
        anchors: (N, 4) in fractions of the image, on the device of the targets.
        side: of the square input, pixels.
        mask_size: of the prototypes.
        sem_seg_size: of the finest level; None: no target for semantic segmentation.
        num_classes: K.
        options: of the matcher.
    """
    device = anchors.device
    height, width = instances.image_size
    scale = torch.tensor([width, height, width, height], dtype=torch.float32, device=device)
    if instances.has("gt_boxes"):
        gt_boxes = instances.gt_boxes.tensor.to(device, torch.float32)
    else:
        # Boxes of empty masks are empty, too.
        gt_boxes = BitMasks(gt_masks_tensor(instances) > 0.5).get_bounding_boxes().tensor.to(device)
    gt_boxes = gt_boxes / scale
    is_large = ((gt_boxes[:, 2:] - gt_boxes[:, :2]) * side >= options.min_box_side).all(1)
    gt_boxes, gt_classes = gt_boxes[is_large], instances.gt_classes.to(device)[is_large]
    instances = instances[is_large.to(instances.gt_classes.device)]
    mask_parts, semantic_parts = [], []
    for masks in padded_masks(instances, (height, width), device):
        mask_parts.append(_resized(masks, mask_size))
        if sem_seg_size is not None:
            semantic_parts.append(_resized(masks, sem_seg_size))
    no_mask = torch.zeros((0, *mask_size), dtype=torch.bool, device=device)
    sem_seg = None
    if sem_seg_size is not None:
        no_semantic = torch.zeros((0, *sem_seg_size), dtype=torch.bool, device=device)
        sem_seg = semantic_masks(torch.cat([no_semantic, *semantic_parts]), gt_classes, num_classes)
    crowds = gt_boxes.new_zeros((0, 4)) if crowd_boxes is None else crowd_boxes.to(device, torch.float32) / scale
    labels, gt_idx = match(gt_boxes, gt_classes, crowds, anchors, num_classes, options)
    return AnchorTargets(labels, gt_idx, gt_boxes, torch.cat([no_mask, *mask_parts]), num_classes, sem_seg)


def _resized(masks: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(masks[:, None].float(), size=size, mode="bilinear", align_corners=False)[:, 0] > 0.5

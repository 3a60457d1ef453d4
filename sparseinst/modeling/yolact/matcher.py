"""Assign objects to anchors (YOLACT, section 4; SSD's matching). Letters: sparseinst.structures."""

from typing import NamedTuple

import torch
from detectron2.structures import Boxes, pairwise_ioa, pairwise_iou

# Label of an anchor without any loss.
NEUTRAL = -1


class MatcherOptions(NamedTuple):
    """Thresholds; see the keys of MODEL.YOLACT.MATCHER.

    Attributes:
        iou_thresholds: background below the first, positive from the second on.
        crowd_ioa: share of an anchor in a crowd above which it is neutral.
        min_box_side: objects with a shorter side are left out, pixels of the input.
    """

    iou_thresholds: tuple[float, float] = (0.4, 0.5)
    crowd_ioa: float = 0.7
    min_box_side: float = 4.0


def match(
    gt_boxes: torch.Tensor,
    gt_classes: torch.Tensor,
    crowd_boxes: torch.Tensor,
    anchors: torch.Tensor,
    num_classes: int,
    options: MatcherOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Assign the objects of one image to anchors.

    Every object gets one anchor of its own, even where their IoU is 0: see `forced_matches`. Detectron2's Matcher with
    ``allow_low_quality_matches`` leaves the second of two objects with the same best anchor without one.

    Args:
        gt_boxes: (M, 4) x0, y0, x1, y1, in the unit of the anchors.
        gt_classes: (M,) int64 in [0, K).
        crowd_boxes: (n, 4); they match no anchor.
        anchors: (N, 4).
        num_classes: K.
        options: thresholds.

    Returns:
        labels (N,) int64: the class of each anchor, K for background, NEUTRAL; gt_idx (N,) int64: the object of each
        anchor, which counts where the label is below K.
    """
    num_anchors = len(anchors)
    if len(gt_boxes):
        ious = pairwise_iou(Boxes(gt_boxes), Boxes(anchors))
        best, gt_idx = ious.max(0)
        forced = forced_matches(ious)
        gt_idx[forced] = torch.arange(len(gt_boxes), device=gt_idx.device)
        best[forced] = 2.0
    else:
        best = anchors.new_zeros(num_anchors)
        gt_idx = torch.zeros(num_anchors, dtype=torch.int64, device=anchors.device)
    low, high = options.iou_thresholds
    labels = torch.full_like(gt_idx, NEUTRAL)
    is_positive = best >= high
    labels[is_positive] = gt_classes[gt_idx[is_positive]]
    is_background = best < low
    if len(crowd_boxes):
        is_background &= pairwise_ioa(Boxes(crowd_boxes), Boxes(anchors)).amax(0) <= options.crowd_ioa
    labels[is_background] = num_classes
    return labels, gt_idx


def forced_matches(ious: torch.Tensor) -> torch.Tensor:
    """Return an anchor for each object: the largest IoU of all decides, then its object and its anchor are used up.

    Args:
        ious: (M, N); M is at most N.

    Returns:
        (M,) int64, all different.
    """
    ious = ious.clone()
    matched = torch.empty(len(ious), dtype=torch.int64, device=ious.device)
    best, anchor_of_best = ious.max(1)
    for _ in range(len(ious)):
        gt = best.argmax()
        anchor = anchor_of_best[gt]
        matched[gt] = anchor
        best[gt] = -2.0
        # Only objects whose best anchor was just taken need another one.
        ious.index_fill_(1, anchor[None], -1.0)
        rivals = ((anchor_of_best == anchor) & (best > -2.0)).nonzero().squeeze(1)
        best[rivals], anchor_of_best[rivals] = ious[rivals].max(1)
    return matched

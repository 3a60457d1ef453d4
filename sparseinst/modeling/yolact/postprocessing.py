"""From the network's outputs to the detections of one image. Letters: sparseinst.structures; n candidates."""

from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torchvision.ops import batched_nms

from sparseinst.modeling.yolact.anchors import BOX_TRANSFORM
from sparseinst.modeling.yolact.masks import crop_masks, mask_logits
from sparseinst.ops.dense_detections import chosen, dense_output
from sparseinst.ops.mask_output import output_masks
from sparseinst.structures.detections import Detections

# Candidates of each class that Fast NMS compares at first.
FIRST_CANDIDATES = 25


class DetectionOptions(NamedTuple):
    """Thresholds and limits; see the keys of MODEL.YOLACT.

    Attributes:
        score_threshold: the best class of a candidate has a score above this, in [0, 1].
        mask_threshold: a pixel belongs to the mask where its probability is above this, in (0, 1).
        nms_type: "fast", "cross_class" or "greedy".
        iou_threshold: of NMS, in [0, 1].
        top_k: candidates of each class that enter Fast NMS.
        second_threshold: Fast NMS drops detections whose score is not above ``score_threshold``.
        max_detections: most detections.
    """

    score_threshold: float = 0.05
    mask_threshold: float = 0.5
    nms_type: str = "fast"
    iou_threshold: float = 0.5
    top_k: int = 200
    second_threshold: bool = False
    max_detections: int = 100


class Kept(NamedTuple):
    """Hold the detections that NMS keeps, best first.

    Attributes:
        candidates: (m,) int64, indices of candidates.
        classes: (m,) int64.
        scores: (m,), descending.
    """

    candidates: torch.Tensor
    classes: torch.Tensor
    scores: torch.Tensor


def fast_nms(boxes: torch.Tensor, scores: torch.Tensor, options: DetectionOptions) -> Kept:
    """Drop each candidate that overlaps any better one of the class, a dropped one too (YOLACT, section 3.3).

    Every candidate competes in every class. The first candidates of each class are compared at first; classes whose
    other candidates are too bad to be among the best detections need no more, with the same result.

    Args:
        boxes: (n, 4).
        scores: (n, K).
        options: limits.
    """
    sorted_scores, order = scores.T.topk(min(options.top_k, len(scores)), dim=1)
    is_kept = sorted_scores > (options.score_threshold if options.second_threshold else 0)

    def compare(classes: torch.Tensor, depth: int) -> None:
        overlaps = _overlaps(boxes[order[classes, :depth]], options.iou_threshold)
        is_kept[classes, :depth] &= ~overlaps.triu(diagonal=1).any(1)

    all_classes = torch.arange(scores.shape[1], device=scores.device)
    compare(all_classes, FIRST_CANDIDATES)
    if order.shape[1] > FIRST_CANDIDATES:
        certain = _worst_of_best(sorted_scores[:, :FIRST_CANDIDATES][is_kept[:, :FIRST_CANDIDATES]], options)
        is_needed = sorted_scores[:, FIRST_CANDIDATES] >= certain
        compare(all_classes[is_needed], order.shape[1])
        is_kept[~is_needed, FIRST_CANDIDATES:] = False
    classes, rank = is_kept.nonzero(as_tuple=True)
    return _best(order[classes, rank], classes, sorted_scores[classes, rank], options.max_detections)


def cross_class_nms(boxes: torch.Tensor, scores: torch.Tensor, options: DetectionOptions) -> Kept:
    """Do `fast_nms` once for all candidates, each in its best class."""
    best, classes = scores.max(1)
    best, order = best.sort(descending=True, stable=True)
    best, order = best[: options.top_k], order[: options.top_k]
    kept = (~_overlaps(boxes[order], options.iou_threshold).triu(diagonal=1).any(0)).nonzero().squeeze(1)
    return _best(order[kept], classes[order[kept]], best[kept], options.max_detections)


def greedy_box_nms(boxes: torch.Tensor, scores: torch.Tensor, options: DetectionOptions, side: int) -> Kept:
    """Do ordinary NMS in each class, as the published code: boxes of ``side`` pixels, widths of x1 - x0 + 1.

    Candidates compete in the classes where their score is above the threshold; a box falls at the IoU threshold itself.
    """
    candidates, classes = (scores > options.score_threshold).nonzero(as_tuple=True)
    class_scores = scores[candidates, classes]
    # Double, because torchvision shifts the boxes of each class.
    pixels = boxes[candidates].double() * side
    pixels[:, 2:] += 1
    below = float(np.nextafter(options.iou_threshold, 0.0))
    kept = batched_nms(pixels, class_scores.double(), classes, below)
    return _best(candidates[kept], classes[kept], class_scores[kept], options.max_detections)


def _worst_of_best(scores: torch.Tensor, options: DetectionOptions) -> torch.Tensor:
    """Return the worst score of the best `max_detections`, 0 where there are fewer."""
    most = options.max_detections
    return scores.topk(most).values[-1] if len(scores) >= most else scores.new_zeros(())


def _overlaps(boxes: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Return which boxes (..., n, 4) have an IoU above the threshold, (..., n, n) bool."""
    first, second = boxes[..., :, None, :], boxes[..., None, :, :]
    sides = torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(first[..., :2], second[..., :2])
    intersections = sides.clamp_(min=0).prod(-1)
    areas = (boxes[..., 2:] - boxes[..., :2]).prod(-1)
    return intersections > iou_threshold * (areas[..., :, None] + areas[..., None, :] - intersections)


def _best(candidates: torch.Tensor, classes: torch.Tensor, scores: torch.Tensor, most: int) -> Kept:
    scores, order = scores.sort(descending=True, stable=True)
    order = order[:most]
    return Kept(candidates[order], classes[order], scores[:most])


def detect(
    outputs: dict[str, torch.Tensor],
    image: int,
    anchors: torch.Tensor,
    options: DetectionOptions,
    *,
    side: int,
    output_size: tuple[int, int],
    mask_iou_head: nn.Module | None = None,
    score_threshold: float = 0.0,
    mask_format: str = "bitmask",
    max_mask_gib: float = float("inf"),
) -> Detections:
    """Select candidates, apply NMS, assemble and crop the masks, and resize them.

    Args:
        outputs: of the network.
        image: index in the batch.
        anchors: (N, 4) x0, y0, x1, y1 in fractions of the image.
        options: thresholds and limits.
        side: of the square input, pixels.
        output_size: size of the masks that are returned.
        mask_iou_head: from soft masks to the IoU of each class, which multiplies the scores (YOLACT++).
        score_threshold: detections with a final score above this are kept.
        mask_format, max_mask_gib: as in `output_masks`.

    Returns:
        Detections, best first, without masks that are empty at the output size. Boxes are the predicted ones, clipped.
        ``prediction_idx`` numbers the anchors.

    Raises:
        MaskMemoryError: the boolean masks would take more than ``max_mask_gib``.
    """
    probs = outputs["class_logits"][image].float().softmax(1)[:, :-1]
    used = (probs.amax(1) > options.score_threshold).nonzero().squeeze(1)
    boxes = BOX_TRANSFORM.apply_deltas(outputs["box_deltas"][image, used].float(), anchors[used])
    if options.nms_type == "greedy":
        kept = greedy_box_nms(boxes, probs[used], options, side)
    else:
        nms = fast_nms if options.nms_type == "fast" else cross_class_nms
        kept = nms(boxes, probs[used], options)
    boxes, used, classes, scores = boxes[kept.candidates], used[kept.candidates], kept.classes, kept.scores

    prototypes = outputs["prototypes"][image].float()
    masks = mask_logits(prototypes, outputs["coefficients"][image, used].float()).sigmoid_()
    masks *= crop_masks(boxes, masks.shape[1:])
    if mask_iou_head is not None and len(masks):
        ious = mask_iou_head(masks).gather(1, classes[:, None])[:, 0]
        scores, order = (scores * ious.clamp(max=1)).sort(descending=True, stable=True)
        boxes, used, classes, masks = boxes[order], used[order], classes[order], masks[order]
    if score_threshold > 0:
        count = int((scores > score_threshold).sum())
        boxes, used, classes, scores, masks = (values[:count] for values in (boxes, used, classes, scores, masks))
    # One resize, from the prototypes' grid to the output, which undoes the change of the aspect ratio.
    _, found_masks, found = output_masks(
        masks, output_size, output_size, output_size, options.mask_threshold, mask_format, max_mask_gib
    )
    height, width = output_size
    boxes = boxes.clamp(0, 1) * boxes.new_tensor([width, height, width, height])
    return Detections(boxes[found], scores[found], classes[found], found_masks, used[found])


def dense_detections(
    outputs: dict[str, torch.Tensor],
    anchors: torch.Tensor,
    options: DetectionOptions,
    *,
    padded_size: tuple[int, int],
    max_detections: int,
    mask_iou_head: nn.Module | None = None,
    score_threshold: float = 0.0,
) -> dict[str, torch.Tensor]:
    """Do what `detect` does, for B images whose output has the padded size, with shapes that do not depend on the data.

    Args:
        outputs, anchors, mask_iou_head, score_threshold: as in `detect`.
        options: thresholds and limits, with Fast NMS or its variant across classes.
        padded_size: of the square input, and of the masks that are returned.
        max_detections: most detections that are returned, the best of the options' ``max_detections``.

    Returns:
        The dict of `InstanceSegmenter.dense_detections`.
    """
    probs = outputs["class_logits"].float().softmax(2)[..., :-1]
    best, best_classes = probs.max(2)
    is_used = best > options.score_threshold
    is_fast = options.nms_type == "fast"
    # The lists (B, lists, N) in which candidates compete: one for each class, or one for all.
    lists = torch.where(is_used[:, None], probs.transpose(1, 2) if is_fast else best[:, None], 0.0)
    least = options.score_threshold if is_fast and options.second_threshold else 0.0
    deltas = outputs["box_deltas"].float()
    boxes = BOX_TRANSFORM.apply_deltas(deltas.flatten(0, 1), anchors.expand(deltas.shape[0], -1, -1).flatten(0, 1))
    boxes = boxes.unflatten(0, deltas.shape[:2])

    scores, order = lists.topk(min(options.top_k, lists.shape[2]), dim=2)
    num_ranks, order = scores.shape[2], order.flatten(1)
    overlaps = _overlaps(chosen(boxes, order).unflatten(1, scores.shape[1:]), options.iou_threshold)
    # Ranks in place of `triu`, which engines lack for booleans.
    ranks = torch.arange(num_ranks, device=scores.device)
    is_dropped = (overlaps & (ranks[:, None] < ranks)).any(2)
    scores = torch.where((scores > least) & ~is_dropped, scores, 0.0).flatten(1)
    scores, position = scores.topk(min(options.max_detections, scores.shape[1]))
    used = order.gather(1, position)
    classes = position // num_ranks if is_fast else best_classes.gather(1, used)
    boxes = chosen(boxes, used)

    masks = mask_logits(outputs["prototypes"].float(), chosen(outputs["coefficients"].float(), used)).sigmoid()
    masks = masks * crop_masks(boxes.flatten(0, 1), masks.shape[2:]).unflatten(0, scores.shape)
    if mask_iou_head is not None:
        ious = mask_iou_head(masks.flatten(0, 1)).unflatten(0, scores.shape).gather(2, classes[..., None])[..., 0]
        scores, position = (scores * ious.clamp(max=1)).topk(scores.shape[1])
        boxes, classes, masks = chosen(boxes, position), classes.gather(1, position), chosen(masks, position)
    scores = torch.where(scores > score_threshold, scores, 0.0)
    height, width = padded_size
    boxes = boxes.clamp(0, 1) * boxes.new_tensor([width, height, width, height])
    return dense_output(scores, classes, masks, padded_size, options.mask_threshold, max_detections, boxes)

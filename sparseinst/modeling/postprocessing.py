"""From the decoder's output to detections of one image, as functions of tensors. Letters: see structures.py."""

import torch
from torch.nn import functional as F

from sparseinst.modeling.structures import Detections

MASKNESS_EPS = 1e-6
# Float pixels that are resized at once; 100 masks at 4K would take 3.3 GB.
MAX_PIXELS_AT_ONCE = 2**25


def class_scores(class_logits: torch.Tensor, objectness_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Best class of each prediction and its score: sqrt(p(class) * p(objectness)) (paper, section 3.5).

    Args:
        class_logits: (N, K).
        objectness_logits: (N,).

    Returns:
        scores (N,) float32 in [0, 1], classes (N,) int64.
    """
    class_probs, classes = class_logits.float().sigmoid().max(-1)
    return (class_probs * objectness_logits.float().sigmoid()).sqrt(), classes


def maskness(mask_probs: torch.Tensor, mask_threshold: float) -> torch.Tensor:
    """Mean probability of the pixels that are above the threshold: sum(p [p > t]) / (sum([p > t]) + 1e-6).

    Args:
        mask_probs: (n, Hm, Wm) in [0, 1].
        mask_threshold: t.

    Returns:
        (n,) in [0, 1]; 0 where no pixel is above it.
    """
    above = mask_probs > mask_threshold
    return (mask_probs * above).sum((1, 2)) / (above.sum((1, 2)) + MASKNESS_EPS)


def mask_nms(masks: torch.Tensor, classes: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Drop each mask that overlaps a better one of its class.

    Args:
        masks: (n, Hm, Wm) bool, best first.
        classes: (n,).
        iou_threshold: overlaps above this are dropped, in (0, 1].

    Returns:
        Indices of the masks that stay, ascending.
    """
    flat = masks.flatten(1).float()
    intersection = flat @ flat.T
    areas = flat.sum(1)
    union = areas[:, None] + areas[None, :] - intersection
    suppresses = ((intersection > iou_threshold * union) & (classes[:, None] == classes[None, :])).tolist()
    kept: list[int] = []
    for index in range(len(masks)):
        if not any(suppresses[better][index] for better in kept):
            kept.append(index)
    return torch.tensor(kept, dtype=torch.int64, device=masks.device)


def resize_masks(
    mask_probs: torch.Tensor,
    padded_size: tuple[int, int],
    image_size: tuple[int, int],
    output_size: tuple[int, int],
    mask_threshold: float,
) -> torch.Tensor:
    """Boolean masks at the output size: bilinear to the padded input, cropped, bilinear to the output, thresholded.

    Args:
        mask_probs: (n, Hm, Wm) in [0, 1], over the padded input.
        padded_size: size of the padded network input.
        image_size: size of the image in it, top left.
        output_size: size of the masks wanted.
        mask_threshold: a pixel belongs to the mask where its probability is above this.

    Returns:
        (n, height, width) bool.
    """
    pixels = padded_size[0] * padded_size[1] + output_size[0] * output_size[1]
    chunk = max(1, MAX_PIXELS_AT_ONCE // pixels)
    masks = torch.empty((len(mask_probs), *output_size), dtype=torch.bool, device=mask_probs.device)
    for start in range(0, len(mask_probs), chunk):
        probs = mask_probs[None, start : start + chunk]
        probs = F.interpolate(probs, size=padded_size, mode="bilinear", align_corners=False)
        probs = probs[:, :, : image_size[0], : image_size[1]]
        if tuple(output_size) != tuple(image_size):
            probs = F.interpolate(probs, size=output_size, mode="bilinear", align_corners=False)
        masks[start : start + chunk] = probs[0] > mask_threshold
    return masks


def masks_to_boxes(masks: torch.Tensor) -> torch.Tensor:
    """Tight boxes, without a loop over the masks.

    Args:
        masks: (n, height, width) bool, none empty.

    Returns:
        (n, 4) float32 (x0, y0, x1, y1) in pixels, x1 and y1 exclusive.
    """
    height, width = masks.shape[-2:]
    if len(masks) == 0:
        return masks.new_zeros((0, 4), dtype=torch.float32)
    columns = masks.any(1).to(torch.uint8)
    rows = masks.any(2).to(torch.uint8)
    return torch.stack(
        [
            columns.argmax(1),
            rows.argmax(1),
            width - columns.flip(1).argmax(1),
            height - rows.flip(1).argmax(1),
        ],
        dim=1,
    ).float()


def detect(
    class_logits: torch.Tensor,
    objectness_logits: torch.Tensor,
    mask_logits: torch.Tensor,
    *,
    padded_size: tuple[int, int],
    image_size: tuple[int, int],
    output_size: tuple[int, int],
    cls_threshold: float,
    mask_threshold: float,
    max_detections: int,
    mask_nms_threshold: float = 0.0,
) -> Detections:
    """Detections of one image: score, select, rescore by maskness, sort, resize the masks (paper, section 3.5).

    Args:
        class_logits: (N, K).
        objectness_logits: (N,).
        mask_logits: (N, Hm, Wm), over the padded input.
        padded_size: size of the padded network input.
        image_size: size of the image in it, top left.
        output_size: size of the masks wanted.
        cls_threshold: predictions with a score above this go on; the score before rescoring.
        mask_threshold: a pixel belongs to the mask where its probability is above this.
        max_detections: most detections, the best.
        mask_nms_threshold: IoU above which the worse of two masks of one class is dropped; 0: off.

    Returns:
        Detections, best first; masks that are empty at the output size are dropped.
    """
    scores, classes = class_scores(class_logits, objectness_logits)
    prediction_idx = (scores > cls_threshold).nonzero().squeeze(1)
    mask_probs = mask_logits[prediction_idx].float().sigmoid()
    scores = scores[prediction_idx] * maskness(mask_probs, mask_threshold)

    scores, order = scores.sort(descending=True, stable=True)
    if mask_nms_threshold > 0:
        order_kept = mask_nms(mask_probs[order] > mask_threshold, classes[prediction_idx[order]], mask_nms_threshold)
        scores, order = scores[order_kept], order[order_kept]
    scores, order = scores[:max_detections], order[:max_detections]
    prediction_idx = prediction_idx[order]

    masks = resize_masks(mask_probs[order], padded_size, image_size, output_size, mask_threshold)
    not_empty = masks.flatten(1).any(1)
    if not not_empty.all():
        scores, prediction_idx, masks = scores[not_empty], prediction_idx[not_empty], masks[not_empty]
    return Detections(masks_to_boxes(masks), scores, classes[prediction_idx], masks, prediction_idx)

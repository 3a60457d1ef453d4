"""Scores, overlaps and boxes of masks. Letters: sparseinst.structures."""

import torch
from torch.nn import functional as F

MASKNESS_EPS = 1e-6


def maskness(mask_probs: torch.Tensor, mask_threshold: float) -> torch.Tensor:
    """Return the mean probability of the pixels above the threshold: sum(p [p > t]) / (sum([p > t]) + 1e-6).

    Args:
        mask_probs: (n, Hm, Wm) in [0, 1].
        mask_threshold: t.

    Returns:
        (n,) in [0, 1]; 0 where no pixel is above the threshold.
    """
    probs_above = F.threshold(mask_probs, mask_threshold, 0.0)
    # Ceilings of the probabilities are 1; summing them takes an eighth of the time of summing booleans.
    return probs_above.sum((1, 2)) / (probs_above.ceil().sum((1, 2)) + MASKNESS_EPS)


def mask_nms(masks: torch.Tensor, classes: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Return the masks that remain after each mask is dropped that overlaps a better remaining mask of its class.

    Args:
        masks: (n, Hm, Wm) bool, best first.
        classes: (n,).
        iou_threshold: masks overlap where their IoU is above this, in (0, 1].

    Returns:
        Indices of the remaining masks, ascending.
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


def masks_to_boxes(masks: torch.Tensor) -> torch.Tensor:
    """Return tight boxes, without a loop over the masks.

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

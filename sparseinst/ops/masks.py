"""Scores, overlaps and boxes of masks. Letters: sparseinst.structures."""

import torch
from torch.nn import functional as F

MASKNESS_EPS = 1e-6
# Side of a tile of `mask_intersections`, and the number of masks from which tiles pay.
TILE = 16
TILED_FROM = 64


def maskness(mask_probs: torch.Tensor, mask_threshold: float) -> torch.Tensor:
    """Return the mean probability of the pixels above the threshold: sum(p [p > t]) / (sum([p > t]) + 1e-6).

    Args:
        mask_probs: (n, Hm, Wm) in [0, 1].
        mask_threshold: t.

    Returns:
        (n,) in [0, 1]; 0 where no pixel is above the threshold.
    """
    areas, sums = areas_and_sums(mask_probs, mask_threshold)
    return sums / (areas + MASKNESS_EPS)


def areas_and_sums(mask_probs: torch.Tensor, mask_threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the number (n,) of the pixels above the threshold, and the sum (n,) of their probabilities.

    Args:
        mask_probs: (n, Hm, Wm) in [0, 1].
        mask_threshold: in [0, 1).
    """
    probs_above = F.threshold(mask_probs, mask_threshold, 0.0)
    # Ceilings of the probabilities are 1; summing them takes an eighth of the time of summing booleans.
    return probs_above.ceil().sum((1, 2)), probs_above.sum((1, 2))


def mask_nms(masks: torch.Tensor, classes: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Return the masks that remain after each mask is dropped that overlaps a better remaining mask of its class.

    Args:
        masks: (n, Hm, Wm) bool, best first.
        classes: (n,).
        iou_threshold: masks overlap where their IoU is above this, in (0, 1].

    Returns:
        Indices of the remaining masks, ascending.
    """
    return greedy_nms(classes, mask_intersections(masks), iou_threshold)


def greedy_nms(classes: torch.Tensor, intersections: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Do `mask_nms` from the intersections (n, n) that `mask_intersections` returns."""
    if len(classes) == 0:
        return torch.zeros(0, dtype=torch.int64, device=classes.device)
    suppresses = same_objects(classes, intersections, iou_threshold).tolist()
    kept: list[int] = []
    for index in range(len(classes)):
        if not any(suppresses[better][index] for better in kept):
            kept.append(index)
    return torch.tensor(kept, dtype=torch.int64, device=classes.device)


def same_objects(classes: torch.Tensor, intersections: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Return whether each two masks have one class and an IoU above the threshold.

    Args:
        classes: (..., n).
        intersections: (..., n, n), see `mask_intersections`; n is at least 1.
        iou_threshold: in (0, 1].

    Returns:
        (..., n, n) bool.
    """
    # A mask shares most pixels with itself; OpenVINO converts no `diagonal`.
    areas = intersections.amax(-1)
    union = areas[..., :, None] + areas[..., None, :] - intersections
    return (intersections > iou_threshold * union) & (classes[..., :, None] == classes[..., None, :])


def matrix_nms(
    scores: torch.Tensor,
    classes: torch.Tensor,
    intersections: torch.Tensor,
    kernel: str = "gaussian",
    sigma: float = 2.0,
) -> torch.Tensor:
    """Lower the score of each mask by its overlap with better masks of its class (SOLOv2, section 3.3, equation 5).

    Args:
        scores: (..., n) in [0, 1], descending.
        classes: (..., n).
        intersections: (..., n, n), see `mask_intersections`; empty masks have the score 0.
        kernel: "gaussian": exp(-sigma * IoU ** 2); "linear": 1 - IoU.
        sigma: of the gaussian.

    Returns:
        (..., n) scores, in the given order.
    """
    if scores.shape[-1] == 0:
        return scores
    # As in `same_objects`.
    areas = intersections.amax(-1)
    # Of two empty masks it is 0 / 1.
    unions = (areas[..., :, None] + areas[..., None, :] - intersections).clamp(min=1)
    iou = (intersections / unions * (classes[..., :, None] == classes[..., None, :])).triu(diagonal=1)
    # How far each suppressor is suppressed itself.
    compensation = iou.amax(-2)[..., :, None]
    if kernel == "gaussian":
        decay = (-sigma * (iou.square() - compensation.square())).exp()
    else:
        # The third of equal masks would be 0 / 0.
        decay = (1 - iou) / (1 - compensation).clamp(min=1e-6)
    return scores * decay.amin(-2)


def pairwise_intersections(masks: torch.Tensor) -> torch.Tensor:
    """Return the number of pixels (..., n, n) that each two masks (..., n, Hm, Wm) bool share, as float32."""
    flat = masks.flatten(-2).float()
    return flat @ flat.transpose(-2, -1)


def mask_intersections(masks: torch.Tensor) -> torch.Tensor:
    """Do what `pairwise_intersections` does, for the masks of one image.

    On the CPU sum tile by tile over the masks that have pixels there, because most masks are small. Exports cannot: the
    shapes depend on the masks.

    Args:
        masks: (n, Hm, Wm) bool.

    Returns:
        (n, n) float32 whole numbers, exact below 2 ** 24; the areas are on the diagonal.
    """
    if masks.device.type != "cpu" or len(masks) < TILED_FROM:
        return pairwise_intersections(masks)
    result = torch.zeros(len(masks), len(masks))
    for rows in masks.split(TILE, dim=1):
        for tile in rows.split(TILE, dim=2):
            used = tile.flatten(1).any(1).nonzero().squeeze(1)
            if len(used):
                result[used[:, None], used] += pairwise_intersections(tile[used])
    return result


def masks_to_boxes(masks: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return tight boxes, without a loop over the masks.

    Args:
        masks: (n, height, width) bool, none empty.
        dtype: of the boxes; float32 is exact up to 2**24 pixels.

    Returns:
        (n, 4) ``dtype`` (x0, y0, x1, y1) in pixels, x1 and y1 exclusive.
    """
    height, width = masks.shape[-2:]
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
    ).to(dtype)

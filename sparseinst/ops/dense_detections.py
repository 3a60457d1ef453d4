"""Parts of post-processing whose shapes do not depend on the data, for exports. Letters: sparseinst.structures."""

import torch
from torch.nn import functional as F

from sparseinst.ops.masks import masks_to_boxes


def chosen(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return the rows (B, n, ...) of the indices (B, n) among the values (B, N, ...) of each image."""
    shape = values.shape[2:]
    return values.gather(1, indices.reshape(*indices.shape, *[1] * len(shape)).expand(-1, -1, *shape))


def dense_output(
    scores: torch.Tensor,
    classes: torch.Tensor,
    mask_probs: torch.Tensor,
    padded_size: tuple[int, int],
    mask_threshold: float,
    num_rows: int,
    boxes: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Resize the masks to the network's size; set the scores of masks that are empty there to 0; return the best.

    Args:
        scores: (B, n), descending; 0: no detection.
        classes: (B, n) int64.
        mask_probs: (B, n, Hm, Wm) in [0, 1], over the padded input.
        padded_size: size of the masks that are returned.
        mask_threshold: a pixel belongs to the mask where its probability is above this, in (0, 1).
        num_rows: most rows that are returned.
        boxes: (B, n, 4) in pixels; None: those of the masks.

    Returns:
        The dict of `InstanceSegmenter.dense_detections`.
    """

    def resized(mask_probs: torch.Tensor) -> torch.Tensor:
        return F.interpolate(mask_probs, size=padded_size, mode="bilinear", align_corners=False) > mask_threshold

    if num_rows < scores.shape[1]:
        scores, order = (scores * resized(mask_probs).flatten(2).any(2)).topk(num_rows)
        classes, mask_probs = classes.gather(1, order), chosen(mask_probs, order)
        boxes = boxes if boxes is None else chosen(boxes, order)
    masks = resized(mask_probs)
    if boxes is None:
        boxes = masks_to_boxes(masks.flatten(0, 1)).unflatten(0, scores.shape)
    return {
        "scores": scores * masks.flatten(2).any(2),
        "classes": classes,
        "boxes": boxes,
        "masks": masks.to(torch.uint8),
    }

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
    """Resize the masks to the network's size; return the best detections whose masks are not empty there.

    Args:
        scores: (B, n); 0: no detection.
        classes: (B, n) int64.
        mask_probs: (B, n, Hm, Wm) in [0, 1], over the padded input.
        padded_size: size of the masks that are returned.
        mask_threshold: a pixel belongs to the mask where its probability is above this, in (0, 1).
        num_rows: most rows that are returned.
        boxes: (B, n, 4) in pixels; None: those of the masks.

    Returns:
        The dict of `InstanceSegmenter.dense_detections`.
    """

    masks = F.interpolate(mask_probs, size=padded_size, mode="bilinear", align_corners=False) > mask_threshold
    num_images, num_masks = scores.shape
    scores, order = (scores * masks.flatten(2).any(2)).topk(min(num_rows, num_masks))
    # Rows of one list: `chosen` would make an index for each pixel.
    rows = order + num_masks * torch.arange(num_images, device=order.device)[:, None]
    masks = masks.flatten(0, 1).index_select(0, rows.flatten())
    boxes = masks_to_boxes(masks).unflatten(0, rows.shape) if boxes is None else chosen(boxes, order)
    return {
        "scores": scores,
        "classes": classes.gather(1, order),
        "boxes": boxes * (scores > 0)[..., None],
        "masks": masks.unflatten(0, rows.shape).to(torch.uint8),
    }

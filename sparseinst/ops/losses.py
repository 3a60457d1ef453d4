"""Scores and losses as functions of tensors, in float32. Letters: sparseinst.structures.

Source: equations of the paper (arXiv 2203.12827, section 3.4). The focal loss is fvcore's.
"""

import torch
import torch.nn.functional as F
from fvcore.nn import giou_loss

from sparseinst.ops.masks import masks_to_boxes

DICE_EPS = 1e-4
# Around the box of `box_bce_loss`: as a share of its size, and in cells.
BOX_MARGIN, MIN_BOX_MARGIN = 0.25, 2.0
IOU_EPS = 1e-6
# Of the Gaussians of a heat map, over the instance's own standard deviation in y and x.
CENTER_SPREAD = 0.5
# In cells: instances of less than a cell have a Gaussian, too.
MIN_SPREAD = 0.3


def pairwise_dice_score(mask_probs: torch.Tensor, gt_masks: torch.Tensor) -> torch.Tensor:
    """Return the DICE of every prediction with every instance: 2 sum(m t) / (sum(m^2) + sum(t^2) + 1e-4).

    Args:
        mask_probs: (N, P) in [0, 1]; P is the number of pixels.
        gt_masks: (M, P) in [0, 1].

    Returns:
        (N, M) in [0, 1].
    """
    # Squared norms, because summing squares would copy all masks.
    squares = [torch.linalg.vector_norm(masks, dim=1).square() for masks in (mask_probs, gt_masks)]
    # (M, P) @ (P, N) is faster than the transpose because M is small.
    intersection = (gt_masks @ mask_probs.T).T
    return 2 * intersection / (squares[0][:, None] + squares[1][None, :] + DICE_EPS)


def dice_loss(mask_probs: torch.Tensor, gt_masks: torch.Tensor) -> torch.Tensor:
    """Return 1 - DICE of each pair.

    Args:
        mask_probs: (P, ...) in [0, 1], one mask per pair.
        gt_masks: the same shape, in [0, 1].

    Returns:
        (P,) in [0, 1].
    """
    mask_probs, gt_masks = mask_probs.flatten(1), gt_masks.flatten(1)
    total = mask_probs.square().sum(1) + gt_masks.square().sum(1)
    return 1 - 2 * (mask_probs * gt_masks).sum(1) / (total + DICE_EPS)


def mask_bce_loss(mask_logits: torch.Tensor, gt_masks: torch.Tensor) -> torch.Tensor:
    """Return the binary cross-entropy, averaged over the pixels of each pair and summed over the pairs.

    Args:
        mask_logits: (P, ...) one mask per pair.
        gt_masks: the same shape, in [0, 1].

    Returns:
        A scalar, at least 0.
    """
    # One sum, because a mean of each pair would copy the masks twice, once in the backward pass.
    loss = F.binary_cross_entropy_with_logits(mask_logits, gt_masks, reduction="sum")
    return loss / mask_logits.flatten(1).shape[1]


def box_bce_loss(mask_logits: torch.Tensor, gt_masks: torch.Tensor) -> torch.Tensor:
    """Return the binary cross-entropy, averaged over the box of each pair's instance and summed over the pairs.

    The box is enlarged on each side by a quarter of its size, and by two cells at least. For a mask without a cell
    above 0.5 it is the image. In the mean over the image the outline of a small object counts little.

    Args:
        mask_logits: (P, H, W) one mask per pair.
        gt_masks: (P, H, W) in [0, 1].

    Returns:
        A scalar, at least 0.
    """
    left, top, right, bottom = masks_to_boxes(gt_masks > 0.5).unbind(1)
    windows = []
    for size, first, after_last in zip(gt_masks.shape[1:], (top, left), (bottom, right)):
        margin = (BOX_MARGIN * (after_last - first)).clamp(min=MIN_BOX_MARGIN)
        steps = torch.arange(size, device=gt_masks.device)
        windows.append((steps >= (first - margin)[:, None]) & (steps < (after_last + margin)[:, None]))
    window = windows[0][:, :, None] & windows[1][:, None]
    loss = F.binary_cross_entropy_with_logits(mask_logits, gt_masks, reduction="none")
    return ((loss * window).sum((1, 2)) / window.sum((1, 2))).sum()


@torch.no_grad()
def binary_mask_iou(
    mask_probs: torch.Tensor,
    gt_masks: torch.Tensor,
    prob_threshold: float = 0.4,
    gt_threshold: float = 0.5,
) -> torch.Tensor:
    """Return the IoU of each pair's thresholded masks, the objectness target: intersection / (union + 1e-6).

    It has no gradient.

    Args:
        mask_probs: (P, ...) in [0, 1], one mask per pair.
        gt_masks: the same shape, in [0, 1].
        prob_threshold: a pixel is predicted where its probability is at least this.
        gt_threshold: a pixel belongs to the instance where its target is above this.

    Returns:
        (P,) in [0, 1].
    """
    predicted = mask_probs.flatten(1) >= prob_threshold
    target = gt_masks.flatten(1) > gt_threshold
    # Booleans are summed as int64 by default, which takes longer than the rest of this function.
    intersection = (predicted & target).sum(1, dtype=torch.int32)
    union = (predicted | target).sum(1, dtype=torch.int32)
    return intersection / (union + IOU_EPS)


def masks_on_grid(gt_masks: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return targets (M, Hm, Wm) averaged over the cells of a coarser grid, (M, *size)."""
    return F.interpolate(gt_masks[:, None], size=size, mode="area")[:, 0]


@torch.no_grad()
def center_cells(gt_masks: torch.Tensor) -> torch.Tensor:
    """Return the cell of the center of each instance: the covered cell that is nearest to its center of mass.

    So it lies inside of rings, too.

    Args:
        gt_masks: (M, H, W) in [0, 1], the share of each cell that the instance covers.

    Returns:
        (M,) int64 in [0, H * W).
    """
    distances = []
    for marginal in (gt_masks.sum(2), gt_masks.sum(1)):
        steps = torch.arange(marginal.shape[1], dtype=torch.float32, device=gt_masks.device)
        mean = marginal @ steps / marginal.sum(1).clamp(min=IOU_EPS)
        distances.append((steps - mean[:, None]).square())
    is_covered = gt_masks >= 0.5 * gt_masks.flatten(1).amax(1)[:, None, None]
    distance = distances[0][:, :, None] + distances[1][:, None]
    return torch.where(is_covered, distance, torch.inf).flatten(1).argmin(1)


@torch.no_grad()
def center_heatmap(
    gt_masks: torch.Tensor, gt_classes: torch.Tensor, num_classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the heat map of the centers of one image's instances, see `center_cells`.

    Args:
        gt_masks: (M, H, W) in [0, 1], the share of each cell that the instance covers.
        gt_classes: (M,) int64 in [0, K).
        num_classes: K.

    Returns:
        (K, H, W) float32 in [0, 1]: Gaussians around the centers, the largest where they overlap; (K, H, W) bool: True
        at the centers.
    """
    height, width = gt_masks.shape[1:]
    heat = gt_masks.new_zeros((num_classes, height, width))
    is_center = torch.zeros_like(heat, dtype=torch.bool)
    if not len(gt_masks):
        return heat, is_center
    y, x = (torch.arange(size, dtype=torch.float32, device=gt_masks.device) for size in (height, width))
    area = gt_masks.sum((1, 2)).clamp(min=IOU_EPS)
    spread = []
    for marginal, steps in ((gt_masks.sum(2), y), (gt_masks.sum(1), x)):
        mean = marginal @ steps / area
        variance = (marginal * (steps - mean[:, None]).square()).sum(1) / area
        spread.append(CENTER_SPREAD * variance.sqrt().clamp(min=MIN_SPREAD)[:, None])
    cells = center_cells(gt_masks)
    rows, columns = cells // width, cells % width
    fall_y = ((y - rows[:, None]) / spread[0]).square()
    fall_x = ((x - columns[:, None]) / spread[1]).square()
    gaussians = torch.exp(-0.5 * (fall_y[:, :, None] + fall_x[:, None]))
    heat.scatter_reduce_(0, gt_classes[:, None, None].expand_as(gaussians), gaussians, "amax")
    is_center[gt_classes, rows, columns] = True
    return heat, is_center


def center_focal_loss(logits: torch.Tensor, heat: torch.Tensor, is_center: torch.Tensor) -> torch.Tensor:
    """Return the penalty-reduced focal loss of a heat map (CenterNet, arXiv 1904.07850, equation 1), summed.

    Args:
        logits: any shape.
        heat: the same shape, in [0, 1]; cells near a center count less as background.
        is_center: the same shape, bool.

    Returns:
        A scalar, at least 0.
    """
    probs = logits.sigmoid()
    centers = (1 - probs).square() * F.logsigmoid(logits)
    background = (1 - heat) ** 4 * probs.square() * F.logsigmoid(-logits)
    return -torch.where(is_center, centers, background).sum()


def center_box_loss(boxes: torch.Tensor, gt_masks: torch.Tensor) -> torch.Tensor:
    """Return the loss of boxes against the tight boxes of masks, summed: GIoU, and half of the smooth L1 of the edges.

    The edges' distances are in heights and widths of the true box. Pairs whose mask has no cell above 0.5 do not count.

    Args:
        boxes: (P, 4) center y, x, height, width in shares of the map.
        gt_masks: (P, H, W) in [0, 1].

    Returns:
        A scalar, at least 0.
    """
    is_inside = gt_masks > 0.5
    there = is_inside.flatten(1).any(1)
    height, width = gt_masks.shape[-2:]
    expected = masks_to_boxes(is_inside[there]) / gt_masks.new_tensor([width, height, width, height])
    center_y, center_x, height, width = boxes[there].unbind(1)
    found = torch.stack(
        [center_x - width / 2, center_y - height / 2, center_x + width / 2, center_y + height / 2], dim=1
    )
    size = (expected[:, 2:] - expected[:, :2]).repeat(1, 2)
    distance = F.smooth_l1_loss(found / size, expected / size, beta=0.1, reduction="sum")
    return giou_loss(found, expected, reduction="sum") + 0.5 * distance

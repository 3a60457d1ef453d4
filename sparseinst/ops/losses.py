"""Scores and losses as functions of tensors, in float32. Letters: sparseinst.structures.

Source: equations of the paper (arXiv 2203.12827, section 3.4). The focal loss is fvcore's.
"""

import torch
import torch.nn.functional as F
from torchvision.ops import generalized_box_iou_loss

DICE_EPS = 1e-4
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


@torch.no_grad()
def binary_mask_iou(
    mask_probs: torch.Tensor,
    gt_masks: torch.Tensor,
    prob_threshold: float = 0.4,
    gt_threshold: float | torch.Tensor = 0.5,
) -> torch.Tensor:
    """Return the IoU of each pair's thresholded masks, the objectness target: intersection / (union + 1e-6).

    The IoU has no gradient.

    Args:
        mask_probs: (P, ...) in [0, 1], one mask per pair.
        gt_masks: the same shape, in [0, 1].
        prob_threshold: a pixel is predicted where its probability is at least this.
        gt_threshold: a pixel belongs to the instance where its target is above this; a number, or (P, 1).

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
def center_heatmap(
    gt_masks: torch.Tensor,
    gt_classes: torch.Tensor,
    num_classes: int,
    num_cells: int = 1,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the heat map of the centers of one image's instances.

    The center is the covered cell that is nearest to the center of mass, so that it lies inside of rings, too.

    Args:
        gt_masks: (M, H, W) in [0, 1], the share of each cell that the instance covers.
        gt_classes: (M,) int64 in [0, K).
        num_classes: K.
        num_cells: C.
        weights: (M,) in [0, 1], the height of each instance's Gaussian; None: 1.

    Returns:
        (K, H, W) float32 in [0, 1]: Gaussians around the centers, the largest where they overlap; (M, C) int64 in
        [0, H * W): the covered cells that are nearest to the center of mass, the center first, and again where the
        instance covers fewer.
    """
    height, width = gt_masks.shape[1:]
    heat = gt_masks.new_zeros((num_classes, height, width))
    area = gt_masks.sum((1, 2)).clamp(min=IOU_EPS)
    distances, falls = [], []
    for marginal in (gt_masks.sum(2), gt_masks.sum(1)):
        steps = torch.arange(marginal.shape[1], dtype=torch.float32, device=gt_masks.device)
        mean = (marginal @ steps / area)[:, None]
        distances.append((steps - mean).square())
        variance = (marginal * distances[-1]).sum(1) / area
        falls.append((steps, CENTER_SPREAD * variance.sqrt().clamp(min=MIN_SPREAD)[:, None]))
    is_covered = gt_masks >= 0.5 * gt_masks.flatten(1).amax(1)[:, None, None]
    distance = distances[0][:, :, None] + distances[1][:, None]
    distance = torch.where(is_covered, distance, torch.inf).flatten(1)
    nearest = []
    for _ in range(num_cells):
        least, cells = distance.min(1)
        # Again the center where no covered cell is left.
        nearest.append(torch.where(least.isfinite(), cells, nearest[0]) if nearest else cells)
        distance = distance.scatter(1, cells[:, None], torch.inf)
    nearest = torch.stack(nearest, dim=1)
    cells = nearest[:, 0]
    fall_y, fall_x = (
        ((steps - center[:, None]) / spread).square()
        for (steps, spread), center in zip(falls, (cells // width, cells % width))
    )
    gaussians = torch.exp(-0.5 * (fall_y[:, :, None] + fall_x[:, None]))
    if weights is not None:
        gaussians = gaussians * weights[:, None, None]
    heat.scatter_reduce_(0, gt_classes[:, None, None].expand_as(gaussians), gaussians, "amax")
    return heat, nearest


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


def box_loss(boxes: torch.Tensor, gt_boxes: torch.Tensor) -> torch.Tensor:
    """Return GIoU loss plus half of the smooth L1 loss of the edges, in widths and heights of the true box, summed.

    Args:
        boxes: (P, 4) x0, y0, x1, y1.
        gt_boxes: (P, 4), with an area.

    Returns:
        A scalar, at least 0.
    """
    size = (gt_boxes[:, 2:] - gt_boxes[:, :2]).repeat(1, 2)
    distance = F.smooth_l1_loss(boxes / size, gt_boxes / size, beta=0.1, reduction="sum")
    return generalized_box_iou_loss(boxes, gt_boxes, reduction="sum") + 0.5 * distance


def semantic_masks(gt_masks: torch.Tensor, gt_classes: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Return the union of the masks of each class.

    Args:
        gt_masks: (M, H, W) bool.
        gt_classes: (M,) int64 in [0, K).
        num_classes: K.

    Returns:
        (K, H, W) bool.
    """
    union = torch.zeros((num_classes, *gt_masks.shape[1:]), device=gt_masks.device)
    return union.index_add_(0, gt_classes, gt_masks.float()) > 0


def sem_seg_loss(sem_seg_logits: torch.Tensor, sem_seg: torch.Tensor) -> torch.Tensor:
    """Return the binary cross-entropy of semantic segmentation: the mean over pixels, summed over classes and images.

    An auxiliary loss in training (YOLACT, section 4).

    Args:
        sem_seg_logits: (B, K, H, W).
        sem_seg: (B, K, H, W) bool; a pixel may belong to several classes or none.
    """
    loss = F.binary_cross_entropy_with_logits(sem_seg_logits, sem_seg.float(), reduction="sum")
    return loss / sem_seg_logits.shape[2:].numel()

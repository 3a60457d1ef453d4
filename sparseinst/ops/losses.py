"""Scores and losses as functions of tensors, in float32. Letters: sparseinst.structures.

Source: equations of the paper (arXiv 2203.12827, section 3.4). The focal loss is fvcore's.
"""

import torch
import torch.nn.functional as F

DICE_EPS = 1e-4
IOU_EPS = 1e-6
IAM_INSIDE_FLOOR = 1e-6


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


def activation_loss(iam_weights: torch.Tensor, gt_masks: torch.Tensor) -> torch.Tensor:
    """Return -log of the share of each pair's activation maps that lies inside the instance, averaged over groups.

    Not in the paper. A map that is spread over the image pools every object at once: masks can be learned from the
    pooled vector, classes cannot.

    Args:
        iam_weights: (P, G, H, W), each map summing to 1.
        gt_masks: (P, H, W) in [0, 1].

    Returns:
        (P,) in [0, -log(1e-6)]; the largest value where nothing lies inside.
    """
    inside = (iam_weights * gt_masks[:, None]).flatten(2).sum(2)
    return -inside.clamp(min=IAM_INSIDE_FLOOR, max=1.0).log().mean(1)

"""Scores and losses as functions of tensors, in float32. Letters: see structures.py.

Source: equations of the paper (arXiv 2203.12827, section 3.4). The focal loss is fvcore's.
"""

import torch
import torch.nn.functional as F

DICE_EPS = 1e-4
IOU_EPS = 1e-6
IAM_INSIDE_FLOOR = 1e-6


def pairwise_dice_score(mask_probs: torch.Tensor, gt_masks: torch.Tensor) -> torch.Tensor:
    """DICE of every prediction with every instance: 2 sum(m t) / (sum(m^2) + sum(t^2) + 1e-4).

    Args:
        mask_probs: (N, P) in [0, 1]; P is the number of pixels.
        gt_masks: (M, P) in [0, 1].

    Returns:
        (N, M) in [0, 1].
    """
    # Norms, squared again: to sum squares would take a copy of all masks.
    squares = [torch.linalg.vector_norm(masks, dim=1).square() for masks in (mask_probs, gt_masks)]
    # The few times the many: the other way round takes longer.
    intersection = (gt_masks @ mask_probs.T).T
    return 2 * intersection / (squares[0][:, None] + squares[1][None, :] + DICE_EPS)


def dice_loss(mask_probs: torch.Tensor, gt_masks: torch.Tensor) -> torch.Tensor:
    """1 - DICE of each pair.

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
    """Binary cross-entropy, mean over the pixels of each pair, summed over the pairs.

    Args:
        mask_logits: (P, ...) one mask per pair.
        gt_masks: the same shape, in [0, 1].

    Returns:
        A scalar, not negative.
    """
    # One sum over all: means of each pair would take two more copies of the masks, one of them in backward.
    loss = F.binary_cross_entropy_with_logits(mask_logits, gt_masks, reduction="sum")
    return loss / mask_logits.flatten(1).shape[1]


@torch.no_grad()
def binary_mask_iou(
    mask_probs: torch.Tensor,
    gt_masks: torch.Tensor,
    prob_threshold: float = 0.4,
    gt_threshold: float = 0.5,
) -> torch.Tensor:
    """IoU of each pair's thresholded masks, the objectness target: intersection / (union + 1e-6). No gradient.

    Args:
        mask_probs: (P, ...) in [0, 1], one mask per pair.
        gt_masks: the same shape, in [0, 1].
        prob_threshold: a pixel is predicted where its probability is at least this.
        gt_threshold: a pixel is the instance's where its target is above this.

    Returns:
        (P,) in [0, 1].
    """
    predicted = mask_probs.flatten(1) >= prob_threshold
    target = gt_masks.flatten(1) > gt_threshold
    # By default booleans are summed as int64, eight bytes for each, which takes longer than all the rest.
    intersection = (predicted & target).sum(1, dtype=torch.int32)
    union = (predicted | target).sum(1, dtype=torch.int32)
    return intersection / (union + IOU_EPS)


def masks_on_grid(gt_masks: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Targets (M, Hm, Wm) averaged over the cells of a coarser grid, (M, *size)."""
    return F.interpolate(gt_masks[:, None], size=size, mode="area")[:, 0]


def activation_loss(iam_weights: torch.Tensor, gt_masks: torch.Tensor) -> torch.Tensor:
    """How much of each pair's activation maps lies outside the instance: -log of the share inside, mean over groups.

    Not in the paper. A map that is spread over the picture pools every object at once, which masks can be learned from
    but classes cannot.

    Args:
        iam_weights: (P, G, H, W), each map summing to 1.
        gt_masks: (P, H, W) in [0, 1].

    Returns:
        (P,) not negative; at most -log(1e-6), where nothing lies inside.
    """
    inside = (iam_weights * gt_masks[:, None]).flatten(2).sum(2)
    return -inside.clamp(min=IAM_INSIDE_FLOOR, max=1.0).log().mean(1)

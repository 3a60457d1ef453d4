"""The training losses of SparseInst. Letters: sparseinst.structures."""

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.utils import comm
from detectron2.utils.registry import Registry
from fvcore.nn import sigmoid_focal_loss
from torch import nn
from torch.nn import functional as F

from sparseinst.config import registered
from sparseinst.modeling.sparse_inst.matcher import MatchedPairs, Matcher, build_sparse_inst_matcher
from sparseinst.ops.losses import (
    binary_mask_iou,
    dice_loss,
    mask_bce_loss,
)
from sparseinst.ops.precision import no_autocast
from sparseinst.structures.targets import InstanceTargets

SPARSE_INST_CRITERION_REGISTRY = Registry("SPARSE_INST_CRITERION")
SPARSE_INST_CRITERION_REGISTRY.__doc__ = """
Criteria: modules called as ``criterion(outputs, targets, counts)`` with the decoder's dict, one InstanceTargets for
each image, and the counts of the whole step or None; return a dict of weighted scalar losses. Built as ``Name(cfg)``.
"""

LOSS_ITEMS = ("labels", "masks")
# As published (arXiv 1708.02002).
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0


@SPARSE_INST_CRITERION_REGISTRY.register()
class SparseInstCriterion(nn.Module):
    """Match predictions with ground truth and compute four weighted losses (paper, equations 5 to 7).

    Everything runs in float32 under autocast too. ``loss_ce`` and ``loss_dice`` are sums divided by the number of
    instances; ``loss_mask`` and ``loss_objectness`` are means over the matched pairs.

    Args:
        matcher: assigns predictions to instances.
        items: which losses: "labels" (``loss_ce``), "masks" (``loss_mask``, ``loss_dice``, ``loss_objectness``).
        class_weight: weight of ``loss_ce``.
        mask_pixel_weight: weight of ``loss_mask``.
        mask_dice_weight: weight of ``loss_dice``.
        objectness_weight: weight of ``loss_objectness``.
        global_normalization: divide by the counts of all ranks together, see `divisors_over_ranks`.

    Raises:
        ValueError: an unknown item.
    """

    @configurable
    def __init__(
        self,
        *,
        matcher: Matcher,
        items: Sequence[str] = ("labels", "masks"),
        class_weight: float = 2.0,
        mask_pixel_weight: float = 5.0,
        mask_dice_weight: float = 2.0,
        objectness_weight: float = 1.0,
        global_normalization: bool = False,
    ) -> None:
        super().__init__()
        if not items or set(items) - set(LOSS_ITEMS):
            raise ValueError(f"MODEL.SPARSE_INST.LOSS.ITEMS is {tuple(items)}; known items are {LOSS_ITEMS}")
        self.matcher = matcher
        self.items = tuple(items)
        self.class_weight = class_weight
        self.mask_pixel_weight = mask_pixel_weight
        self.mask_dice_weight = mask_dice_weight
        self.objectness_weight = objectness_weight
        self.global_normalization = global_normalization

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        loss = cfg.MODEL.SPARSE_INST.LOSS
        return {
            "matcher": build_sparse_inst_matcher(cfg),
            "items": loss.ITEMS,
            "class_weight": loss.CLASS_WEIGHT,
            "mask_pixel_weight": loss.MASK_PIXEL_WEIGHT,
            "mask_dice_weight": loss.MASK_DICE_WEIGHT,
            "objectness_weight": loss.OBJECTNESS_WEIGHT,
            "global_normalization": loss.GLOBAL_NORMALIZATION,
        }

    def forward(
        self,
        outputs: dict[str, torch.Tensor],
        targets: list[InstanceTargets],
        counts: dict[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Compute the losses of one batch.

        Args:
            outputs: the decoder's dict.
            targets: ground truth of each image.
            counts: ``num_instances`` and ``num_matched`` of the whole step in this process, where this batch is a part
                of it (gradient accumulation). By default those of this batch.

        Returns:
            ``loss_ce`` where items has "labels"; ``loss_objectness``, ``loss_dice`` and ``loss_mask`` where it has
            "masks". Scalars, weighted. Without any instance the losses of pairs are 0, with a gradient of 0.
        """
        device = outputs["pred_logits"].device
        with no_autocast(device):
            pairs = self.matcher(outputs, targets)
            divisors = self.divisors(counts, targets, sum(len(pair.gt_idx) for pair in pairs), device)
            losses = {}
            if "labels" in self.items:
                class_logits = outputs["pred_logits"].float()
                losses["loss_ce"] = self.class_weight * _class_loss(class_logits, targets, pairs, divisors[0])
            # Only matched maps are copied to float32.
            gt_masks = torch.cat([target.gt_masks[pair.gt_idx] for target, pair in zip(targets, pairs)])
            if "masks" in self.items:
                mask_logits = matched_predictions(outputs["pred_masks"], pairs).float()
                objectness_logits = matched_predictions(outputs["pred_scores"], pairs)[:, 0].float()
                losses.update(self.mask_losses(mask_logits, objectness_logits, gt_masks, *divisors))
        return losses

    def divisors(
        self,
        counts: dict[str, torch.Tensor] | None,
        targets: list[InstanceTargets],
        num_matched: int,
        device: torch.device,
    ) -> tuple[float, float]:
        """Return what `divisors_over_ranks` returns for the counts of the step, or for this batch without any."""
        num_instances = sum(len(target.gt_classes) for target in targets)
        if counts is not None:
            num_instances, num_matched = int(counts["num_instances"]), int(counts["num_matched"])
        return divisors_over_ranks(num_instances, num_matched, device, self.global_normalization)

    def mask_losses(
        self,
        mask_logits: torch.Tensor,
        objectness_logits: torch.Tensor,
        gt_masks: torch.Tensor,
        num_instances: float,
        num_matched: float,
        gt_threshold: float | torch.Tensor = 0.5,
    ) -> dict[str, torch.Tensor]:
        """Compute the losses of pairs.

        Args:
            mask_logits: (P, H, W) float32, one mask per pair.
            objectness_logits: (P,) float32.
            gt_masks: (P, H, W) in [0, 1].
            num_instances, num_matched: divisors, see `divisors_over_ranks`.
            gt_threshold: of the objectness target, see `binary_mask_iou`.
        """
        # Sums over zero pairs are 0 and stay in the graph, so that every parameter gets a gradient.
        mask_probs = mask_logits.sigmoid()
        objectness_loss = F.binary_cross_entropy_with_logits(
            objectness_logits, binary_mask_iou(mask_probs, gt_masks, gt_threshold=gt_threshold), reduction="sum"
        )
        return {
            "loss_objectness": self.objectness_weight * objectness_loss / num_matched,
            "loss_dice": self.mask_dice_weight * dice_loss(mask_probs, gt_masks).sum() / num_instances,
            "loss_mask": self.mask_pixel_weight * mask_bce_loss(mask_logits, gt_masks) / num_matched,
        }


def _class_loss(
    class_logits: torch.Tensor, targets: list[InstanceTargets], pairs: list[MatchedPairs], num_instances: float
) -> torch.Tensor:
    idx = joint_prediction_idx(pairs, class_logits.shape[1])
    matched_classes = torch.cat([target.gt_classes[pair.gt_idx] for target, pair in zip(targets, pairs)])
    one_hot = class_logits.new_zeros((class_logits.shape[:2].numel(), class_logits.shape[2]))
    # new_ones, because a Python number would be copied to the device, which synchronizes.
    one_hot.index_put_((idx, matched_classes), one_hot.new_ones(len(idx)))
    one_hot = one_hot.view(class_logits.shape)
    loss = sigmoid_focal_loss(class_logits, one_hot, FOCAL_ALPHA, FOCAL_GAMMA, reduction="sum")
    return loss / num_instances


def joint_prediction_idx(pairs: list[MatchedPairs], num_maps: int) -> torch.Tensor:
    """Return (P,) int64: the matched predictions of all images, numbered through the batch; P pairs in all.

    Args:
        pairs: of each image.
        num_maps: predictions of each image.
    """
    return torch.cat([pair.prediction_idx + image * num_maps for image, pair in enumerate(pairs)])


def matched_predictions(predictions: torch.Tensor, pairs: list[MatchedPairs]) -> torch.Tensor:
    """Select the matched predictions of all images.

    One index_select for the batch: its backward pass fills one tensor of zeros, where a selection for each image would
    fill one for each.

    Args:
        predictions: (B, N, ...).
        pairs: of each image.

    Returns:
        (P, ...); P pairs in all.
    """
    return predictions.flatten(0, 1).index_select(0, joint_prediction_idx(pairs, predictions.shape[1]))


def divisors_over_ranks(
    num_instances: int, num_matched: int, device: torch.device, global_normalization: bool = False
) -> tuple[float, float]:
    """Return the divisors of the losses on this rank; all ranks call it together.

    Gradients are averaged over the ranks. As published, the number of instances is averaged over the ranks and matched
    pairs are counted on each rank alone, so a pair on a rank with few pairs weighs more; means below 1 count as 1. With
    ``global_normalization`` the averaged gradients equal the gradients of one process with all the images.

    Args:
        num_instances: ground-truth instances of this rank.
        num_matched: matched pairs of this rank.
        device: where the ranks exchange the numbers.
        global_normalization: use the matched pairs of all ranks.

    Returns:
        Divisor of the losses over instances, divisor of the losses over matched pairs; both positive.
    """
    num_ranks = comm.get_world_size()
    all_instances, all_matched = float(num_instances), float(num_matched)
    if num_ranks > 1:
        counts = torch.tensor([all_instances, all_matched], device=device)
        torch.distributed.all_reduce(counts)
        all_instances, all_matched = counts.tolist()
    if global_normalization:
        return max(1.0, all_instances) / num_ranks, max(1.0, all_matched) / num_ranks
    return max(1.0, all_instances / num_ranks), max(1.0, float(num_matched))


def build_sparse_inst_criterion(cfg: CfgNode) -> nn.Module:
    """Build the criterion named by MODEL.SPARSE_INST.LOSS.NAME."""
    return registered(SPARSE_INST_CRITERION_REGISTRY, cfg, "MODEL.SPARSE_INST.LOSS.NAME")(cfg)

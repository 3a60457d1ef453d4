"""The training losses of SOLO and SOLOv2. Letters: sparseinst.structures."""

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.utils.registry import Registry
from fvcore.nn import sigmoid_focal_loss
from torch import nn

from sparseinst.config import registered
from sparseinst.modeling.auxiliary import divisor_sums
from sparseinst.modeling.solo.heads import GridHead
from sparseinst.modeling.solo.targets import GridTargets
from sparseinst.ops.precision import no_autocast

SOLO_CRITERION_REGISTRY = Registry("SOLO_CRITERION")
SOLO_CRITERION_REGISTRY.__doc__ = """
Criteria of SOLO and SOLOv2: modules called as ``criterion(head, outputs, targets, counts)`` with the head, the
network's dict, the GridTargets of each image, and the counts of the whole step or None; return a dict of weighted
scalar losses. Built as ``Name(cfg, node_name)`` with "MODEL.SOLO" or "MODEL.SOLOV2".
"""

# Added to each sum of squares of the dice loss.
DICE_EPS = 1e-3


@SOLO_CRITERION_REGISTRY.register()
class SOLOCriterion(nn.Module):
    """Focal loss over all cells, and dice loss over the pairs of a positive cell and its object (SOLO, section 3.3.2).

    Everything runs in float32 under autocast too. ``loss_cate`` is a sum divided by the number of positive cells plus
    1; ``loss_mask`` is the mean over the pairs.

    Args:
        cate_weight: weight of ``loss_cate``.
        mask_weight: weight of ``loss_mask``.
        focal_alpha, focal_gamma: of the focal loss.
        global_normalization: divide by the counts of all ranks together.
    """

    @configurable
    def __init__(
        self,
        *,
        cate_weight: float = 1.0,
        mask_weight: float = 3.0,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        global_normalization: bool = False,
    ) -> None:
        super().__init__()
        self.cate_weight, self.mask_weight = cate_weight, mask_weight
        self.focal_alpha, self.focal_gamma = focal_alpha, focal_gamma
        self.global_normalization = global_normalization

    @classmethod
    def from_config(cls, cfg: CfgNode, node_name: str) -> dict:
        loss = cfg.MODEL[node_name.removeprefix("MODEL.")].LOSS
        return {
            "cate_weight": loss.CATE_WEIGHT,
            "mask_weight": loss.MASK_WEIGHT,
            "focal_alpha": loss.FOCAL_ALPHA,
            "focal_gamma": loss.FOCAL_GAMMA,
            "global_normalization": loss.GLOBAL_NORMALIZATION,
        }

    def forward(
        self,
        head: GridHead,
        outputs: dict[str, torch.Tensor],
        targets: Sequence[GridTargets],
        counts: dict[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Compute the losses of one batch.

        Args:
            head: computes the masks of positive cells.
            outputs: of the network.
            targets: of each image.
            counts: ``num_positive`` and ``num_pairs`` of the whole step in this process; None: those of this batch.

        Returns:
            ``loss_cate`` and ``loss_mask``: weighted scalars. Without any pair ``loss_mask`` is 0.
        """
        device = outputs["cate_logits"].device
        with no_autocast(device):
            counts = count_targets(targets) if counts is None else counts
            (num_positive, num_pairs), num_ranks = divisor_sums(
                counts, ("num_positive", "num_pairs"), device, self.global_normalization
            )
            losses = {
                "loss_cate": self._category_loss(outputs["cate_logits"], targets) / ((num_positive + 1) / num_ranks),
                "loss_mask": self._mask_loss(head, outputs, targets) / (max(1.0, num_pairs) / num_ranks),
            }
        return {
            "loss_cate": self.cate_weight * losses["loss_cate"],
            "loss_mask": self.mask_weight * losses["loss_mask"],
        }

    def _category_loss(self, logits: torch.Tensor, targets: Sequence[GridTargets]) -> torch.Tensor:
        categories = torch.stack([torch.cat([level.categories for level in image.levels]) for image in targets])
        one_hot = torch.zeros_like(logits, dtype=torch.float32)
        image, cell = (categories >= 0).nonzero(as_tuple=True)
        one_hot[image, categories[image, cell], cell] = 1.0
        return sigmoid_focal_loss(logits.float(), one_hot, self.focal_alpha, self.focal_gamma, reduction="sum")

    def _mask_loss(
        self, head: GridHead, outputs: dict[str, torch.Tensor], targets: Sequence[GridTargets]
    ) -> torch.Tensor:
        total = outputs["cate_logits"].new_zeros((), dtype=torch.float32)
        for image, target in enumerate(targets):
            for level, (pairs, stride) in enumerate(zip(target.levels, head.mask_strides)):
                if len(pairs.cells) == 0:
                    continue
                # A cell that several objects share has one mask.
                cells, position = pairs.cells.unique(return_inverse=True)
                probs = head.mask_probs(outputs, image, level, cells)
                total = total + dice_losses(probs, target.masks[stride], position, pairs.objects).sum()
        return total


def dice_losses(
    probs: torch.Tensor, masks: torch.Tensor, prob_idx: torch.Tensor, mask_idx: torch.Tensor
) -> torch.Tensor:
    """Return 1 - 2 sum(p t) / (sum(p^2) + 0.001 + sum(t^2) + 0.001) of each pair.

    Args:
        probs: (n, h, w) in [0, 1].
        masks: (M, h, w) bool.
        prob_idx, mask_idx: (P,) int64, the pairs.

    Returns:
        (P,) in [0, 1].
    """
    used, mask_position = mask_idx.unique(return_inverse=True)
    probs, masks = probs.flatten(1), masks.index_select(0, used).flatten(1).float()
    intersection = (probs @ masks.T)[prob_idx, mask_position]
    squares = probs.square().sum(1)[prob_idx] + masks.sum(1)[mask_position]
    return 1 - 2 * intersection / (squares + 2 * DICE_EPS)


def count_targets(targets: Sequence[GridTargets]) -> dict[str, torch.Tensor]:
    """Return ``num_positive``, the positive cells of a batch, and ``num_pairs``."""
    levels = [level for image in targets for level in image.levels]
    return {
        "num_positive": sum((level.categories >= 0).sum() for level in levels),
        "num_pairs": torch.tensor(sum(len(level.cells) for level in levels)),
    }


def build_solo_criterion(cfg: CfgNode, node_name: str) -> nn.Module:
    """Build the criterion named by MODEL.SOLO.LOSS.NAME or MODEL.SOLOV2.LOSS.NAME."""
    return registered(SOLO_CRITERION_REGISTRY, cfg, f"{node_name}.LOSS.NAME")(cfg, node_name)

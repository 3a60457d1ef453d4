"""Bipartite matching of predictions and ground truth. Letters: see structures.py."""

import torch
from detectron2.config import CfgNode, configurable
from detectron2.utils.registry import Registry
from scipy.optimize import linear_sum_assignment

from sparseinst.modeling.losses import pairwise_dice_score
from sparseinst.modeling.structures import InstanceTargets, MatchedPairs

SPARSE_INST_MATCHER_REGISTRY = Registry("SPARSE_INST_MATCHER")
SPARSE_INST_MATCHER_REGISTRY.__doc__ = """
Matchers: called as ``matcher(outputs, targets)`` with the decoder's dict and one InstanceTargets per image; return one
MatchedPairs per image. Built as ``Name(cfg)``.
"""


def matching_scores(
    class_logits: torch.Tensor,
    mask_logits: torch.Tensor,
    targets: InstanceTargets,
    alpha: float = 0.8,
    beta: float = 0.2,
) -> torch.Tensor:
    """Score of every prediction for every instance of one image: p(class)^beta * DICE^alpha (paper, equation 4).

    The paper ties the exponents (beta = 1 - alpha); the published code does not.

    Args:
        class_logits: (N, K).
        mask_logits: (N, Hm, Wm).
        targets: the image's ground truth.
        alpha: exponent of the DICE score.
        beta: exponent of the class probability.

    Returns:
        (N, M) float32 in [0, 1].
    """
    with torch.autocast(class_logits.device.type, enabled=False):
        class_probs = class_logits.float().sigmoid()[:, targets.gt_classes]
        dice = pairwise_dice_score(mask_logits.float().flatten(1).sigmoid(), targets.gt_masks.flatten(1))
        return class_probs**beta * dice**alpha


@SPARSE_INST_MATCHER_REGISTRY.register()
class SparseInstMatcher:
    """One-to-one assignment of largest total score, image by image, in float32.

    Args:
        alpha: exponent of the DICE score (MATCHER.ALPHA).
        beta: exponent of the class probability (MATCHER.BETA).
    """

    @configurable
    def __init__(self, *, alpha: float = 0.8, beta: float = 0.2) -> None:
        self.alpha = alpha
        self.beta = beta

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        matcher = cfg.MODEL.SPARSE_INST.MATCHER
        return {"alpha": matcher.ALPHA, "beta": matcher.BETA}

    @torch.no_grad()
    def __call__(self, outputs: dict[str, torch.Tensor], targets: list[InstanceTargets]) -> list[MatchedPairs]:
        """Match one batch.

        Args:
            outputs: the decoder's dict; ``pred_logits`` (B, N, K) and ``pred_masks`` (B, N, Hm, Wm) are read.
            targets: ground truth, one per image.

        Returns:
            One per image, min(N, M) pairs each, on the outputs' device.

        Raises:
            ValueError: a score is not finite.
        """
        device = outputs["pred_logits"].device
        scores = [
            matching_scores(class_logits, mask_logits, target, self.alpha, self.beta)
            for class_logits, mask_logits, target in zip(outputs["pred_logits"], outputs["pred_masks"], targets)
        ]
        # One copy to the host for the whole batch: every copy waits for the device.
        shapes = [tuple(score.shape) for score in scores]
        flat = torch.cat([score.flatten() for score in scores]).cpu()
        if not torch.isfinite(flat).all():
            raise ValueError(
                "The matching score is not finite: the model's class or mask logits are NaN or infinite. "
                "Lower SOLVER.BASE_LR, enable SOLVER.CLIP_GRADIENTS, or train without SOLVER.AMP."
            )
        pairs = []
        for (rows, columns), score in zip(shapes, flat.split([rows * columns for rows, columns in shapes])):
            prediction_idx, gt_idx = linear_sum_assignment(score.view(rows, columns).numpy(), maximize=True)
            pairs.append(
                MatchedPairs(
                    torch.as_tensor(prediction_idx, dtype=torch.int64, device=device),
                    torch.as_tensor(gt_idx, dtype=torch.int64, device=device),
                )
            )
        return pairs


def build_sparse_inst_matcher(cfg: CfgNode):
    """Build the matcher that MODEL.SPARSE_INST.MATCHER.NAME names."""
    return SPARSE_INST_MATCHER_REGISTRY.get(cfg.MODEL.SPARSE_INST.MATCHER.NAME)(cfg)

"""Bipartite matching of predictions and ground truth. Letters: sparseinst.structures."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.utils.registry import Registry
from scipy.optimize import linear_sum_assignment

from sparseinst.config import registered
from sparseinst.ops.losses import pairwise_dice_score
from sparseinst.ops.precision import no_autocast
from sparseinst.structures.targets import InstanceTargets

SPARSE_INST_MATCHER_REGISTRY = Registry("SPARSE_INST_MATCHER")
SPARSE_INST_MATCHER_REGISTRY.__doc__ = """
Matchers: called as ``matcher(outputs, targets)`` with the decoder's dict, in half precision under autocast, and one
InstanceTargets for each image; return one MatchedPairs for each image. Built as ``Name(cfg)``.
"""

# Replaces scores that are NaN or Inf; larger than the sum of all scores of an image, each of which is at most 1.
NOT_FINITE_SCORE = 1e6


class MatchedPairs(NamedTuple):
    """One-to-one assignment of one image: prediction ``prediction_idx[i]`` is matched with instance ``gt_idx[i]``.

    Attributes:
        prediction_idx: (min(N, M),) int64, in [0, N), ascending.
        gt_idx: (min(N, M),) int64, in [0, M).
    """

    prediction_idx: torch.Tensor
    gt_idx: torch.Tensor


Matcher = Callable[[dict[str, torch.Tensor], list[InstanceTargets]], list[MatchedPairs]]


def matching_scores(
    class_logits: torch.Tensor,
    mask_logits: torch.Tensor,
    targets: InstanceTargets,
    alpha: float = 0.8,
    beta: float = 0.2,
) -> torch.Tensor:
    """Score every prediction against every instance of one image: p(class)^beta * DICE^alpha (paper, equation 4).

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
    with no_autocast(class_logits.device):
        class_probs = class_logits[:, targets.gt_classes].float().sigmoid()
        dice = pairwise_dice_score(mask_logits.float().flatten(1).sigmoid(), targets.gt_masks.flatten(1))
        return class_probs**beta * dice**alpha


@SPARSE_INST_MATCHER_REGISTRY.register()
class SparseInstMatcher:
    """Assign predictions to instances one to one with the largest total score, image by image, in float32.

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
            targets: ground truth of each image.

        Returns:
            min(N, M) pairs for each image, on the outputs' device. Predictions whose score is NaN or Inf are matched
            first, so that they reach a loss.
        """
        scores = [
            matching_scores(class_logits, mask_logits, target, self.alpha, self.beta)
            for class_logits, mask_logits, target in zip(outputs["pred_logits"], outputs["pred_masks"], targets)
        ]
        return self.assign(scores)

    @staticmethod
    def assign(scores: list[torch.Tensor]) -> list[MatchedPairs]:
        """Assign each image's scores (N, M); the pairs are on the scores' device."""
        # One copy to the host for the whole batch, because every copy synchronizes.
        shapes = [tuple(score.shape) for score in scores]
        flat = torch.cat([score.flatten() for score in scores]).cpu()
        # linear_sum_assignment refuses NaN. An error in one of several processes would block the others; the NaN
        # reaches the losses, which all processes check together.
        flat = flat.nan_to_num(NOT_FINITE_SCORE, NOT_FINITE_SCORE, NOT_FINITE_SCORE)
        indices = [
            np.stack(linear_sum_assignment(score.view(rows, columns).numpy(), maximize=True))
            for (rows, columns), score in zip(shapes, flat.split([rows * columns for rows, columns in shapes]))
        ]
        # One copy back, which does not synchronize.
        joint = torch.from_numpy(np.concatenate(indices, axis=1)).to(scores[0].device, torch.int64, non_blocking=True)
        return [MatchedPairs(*pairs) for pairs in joint.split([part.shape[1] for part in indices], dim=1)]


def build_sparse_inst_matcher(cfg: CfgNode) -> Matcher:
    """Build the matcher named by MODEL.SPARSE_INST.MATCHER.NAME."""
    return registered(SPARSE_INST_MATCHER_REGISTRY, cfg, "MODEL.SPARSE_INST.MATCHER.NAME")(cfg)

"""Hold ground truth for matchers and criteria. Letters: sparseinst.structures."""

from typing import NamedTuple

import torch


class InstanceTargets(NamedTuple):
    """Ground truth of one image.

    Attributes:
        gt_classes: (M,) int64, in [0, K).
        gt_masks: (M, Hm, Wm) float32 in [0, 1]: the share of each cell of the mask grid that the instance covers.
    """

    gt_classes: torch.Tensor
    gt_masks: torch.Tensor

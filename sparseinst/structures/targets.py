"""The tuples that pass between the parts of the model, and the letters that every docstring here uses.

Letters
    B   images in a batch
    N   instance activation maps (IAMs), so predictions, per image
    G   groups: activation maps per instance
    M   ground-truth instances of one image
    K   classes
    C   channels
    D   dimension of mask kernels and mask features
    H, W    the decoder's grid, that of the encoder's output
    Hm, Wm  the mask grid: (H, W) times the decoder's scale factor

Sizes are (height, width). ``_logits`` are values before the sigmoid, ``_probs`` after it; ``_masks`` without either are
boolean, except a target's, which are fractions in [0, 1].

The decoder returns a dict with the published names: ``pred_logits`` (B, N, K) class logits, ``pred_masks``
(B, N, Hm, Wm) mask logits, ``pred_scores`` (B, N, 1) objectness logits and, where asked for, ``pred_iam``
(B, G * N, Hm, Wm) raw activation-map logits, group-major. In training it adds ``iam_weights`` (B, G * N, H, W), the
activation maps as they were pooled with, each summing to 1; only a criterion with LOSS.IAM_WEIGHT needs them.
"""

from typing import NamedTuple

import torch


class InstanceTargets(NamedTuple):
    """Ground truth of one image, as matcher and criterion take it.

    Attributes:
        gt_classes: (M,) int64, in [0, K).
        gt_masks: (M, Hm, Wm) float32 in [0, 1]: the share of each cell of the mask grid that the instance covers.
    """

    gt_classes: torch.Tensor
    gt_masks: torch.Tensor


class MatchedPairs(NamedTuple):
    """One-to-one assignment of one image: prediction ``prediction_idx[i]`` stands for instance ``gt_idx[i]``.

    Attributes:
        prediction_idx: (min(N, M),) int64, in [0, N), ascending.
        gt_idx: (min(N, M),) int64, in [0, M).
    """

    prediction_idx: torch.Tensor
    gt_idx: torch.Tensor


class LossNormalizer(NamedTuple):
    """What the losses of a step are divided by; positive, also where there are no instances.

    Attributes:
        num_instances: ground-truth instances, matched or not; of several ranks their mean.
        num_matched: matched pairs; of this rank, or of several their mean.
    """

    num_instances: float
    num_matched: float


class Detections(NamedTuple):
    """Predictions of one image, best first. n is at most N.

    Attributes:
        boxes: (n, 4) float32, (x0, y0, x1, y1) in pixels of the output, tight around the mask; x1, y1 exclusive.
        scores: (n,) float32 in [0, 1], descending.
        classes: (n,) int64 in [0, K).
        masks: (n, height, width) bool, at the output size, or a list of n compressed COCO RLEs; none is empty.
        prediction_idx: (n,) int64: which of the N predictions each one is.
    """

    boxes: torch.Tensor
    scores: torch.Tensor
    classes: torch.Tensor
    masks: torch.Tensor | list[dict]
    prediction_idx: torch.Tensor

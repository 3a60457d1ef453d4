"""From the decoder's outputs to the detections of one image. Letters: sparseinst.structures."""

import torch

from sparseinst.ops.mask_output import output_masks
from sparseinst.ops.masks import mask_nms, maskness
from sparseinst.structures.detections import Detections


def class_scores(class_logits: torch.Tensor, objectness_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best class of each prediction and its score: sqrt(p(class) * p(objectness)) (paper, section 3.5).

    Args:
        class_logits: (N, K).
        objectness_logits: (N,).

    Returns:
        scores (N,) float32 in [0, 1], classes (N,) int64.
    """
    class_probs, classes = class_logits.float().sigmoid().max(-1)
    return (class_probs * objectness_logits.float().sigmoid()).sqrt(), classes


def detect(
    class_logits: torch.Tensor,
    objectness_logits: torch.Tensor,
    mask_logits: torch.Tensor,
    *,
    padded_size: tuple[int, int],
    image_size: tuple[int, int],
    output_size: tuple[int, int],
    cls_threshold: float,
    mask_threshold: float,
    max_detections: int,
    mask_nms_threshold: float = 0.0,
    score_threshold: float = 0.0,
    mask_format: str = "bitmask",
    max_mask_gib: float = float("inf"),
) -> Detections:
    """Score, select, rescore by maskness, sort and resize the predictions of one image (paper, section 3.5).

    Args:
        class_logits: (N, K).
        objectness_logits: (N,).
        mask_logits: (N, Hm, Wm), over the padded input.
        padded_size: size of the padded network input.
        image_size: size of the image in it, at the top left.
        output_size: size of the masks that are returned.
        cls_threshold: predictions with a score above this are kept, before rescoring.
        mask_threshold: a pixel belongs to the mask where its probability is above this, in (0, 1).
        max_detections: most detections, the best ones.
        mask_nms_threshold: IoU above which the worse of two masks of one class is dropped; 0: off.
        score_threshold: predictions with a score above this are kept, after rescoring.
        mask_format, max_mask_gib: as in `output_masks`.

    Returns:
        Detections, best first, without masks that are empty at the output size.

    Raises:
        MaskMemoryError: the boolean masks would take more than ``max_mask_gib``.
    """
    scores, classes = class_scores(class_logits, objectness_logits)
    # Rescoring only lowers a score.
    prediction_idx = (scores > max(cls_threshold, score_threshold)).nonzero().squeeze(1)
    # In place, because indexing has copied the logits.
    mask_probs = mask_logits[prediction_idx].float().sigmoid_()
    scores = scores[prediction_idx] * maskness(mask_probs, mask_threshold)

    scores, order = scores.sort(descending=True, stable=True)
    if score_threshold > 0:
        scores = scores[scores > score_threshold]
        order = order[: len(scores)]
    if mask_nms_threshold > 0:
        order_kept = mask_nms(mask_probs[order] > mask_threshold, classes[prediction_idx[order]], mask_nms_threshold)
        scores, order = scores[order_kept], order[order_kept]
    scores, order = scores[:max_detections], order[:max_detections]
    prediction_idx = prediction_idx[order]

    boxes, masks, found = output_masks(
        mask_probs[order], padded_size, image_size, output_size, mask_threshold, mask_format, max_mask_gib
    )
    if len(found) < len(scores):
        scores, prediction_idx = scores[found], prediction_idx[found]
    return Detections(boxes, scores, classes[prediction_idx], masks, prediction_idx)

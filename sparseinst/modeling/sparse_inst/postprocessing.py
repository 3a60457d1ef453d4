"""From the decoder's outputs to the detections of one image. Letters: sparseinst.structures."""

import torch

from sparseinst.ops.dense_detections import chosen, dense_output
from sparseinst.ops.mask_output import output_masks
from sparseinst.ops.masks import mask_nms, maskness, pairwise_intersections, same_objects
from sparseinst.structures.detections import Detections


def class_scores(class_logits: torch.Tensor, objectness_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best class of each prediction and its score: sqrt(p(class) * p(objectness)) (paper, section 3.5).

    Args:
        class_logits: (..., N, K).
        objectness_logits: (..., N).

    Returns:
        scores (..., N) float32 in [0, 1], classes (..., N) int64.
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


def dense_detections(
    class_logits: torch.Tensor,
    objectness_logits: torch.Tensor,
    mask_logits: torch.Tensor,
    *,
    padded_size: tuple[int, int],
    cls_threshold: float,
    mask_threshold: float,
    max_detections: int,
    num_rows: int,
    mask_nms_threshold: float = 0.0,
    score_threshold: float = 0.0,
) -> dict[str, torch.Tensor]:
    """Do what `detect` does, for B images whose output has the padded size, with shapes that do not depend on the data.

    Args:
        class_logits: (B, N, K).
        objectness_logits: (B, N).
        mask_logits: (B, N, Hm, Wm).
        padded_size: size of the masks that are returned.
        cls_threshold, mask_threshold, max_detections, mask_nms_threshold, score_threshold: as in `detect`.
        num_rows: most detections that are returned.

    Returns:
        The dict of `InstanceSegmenter.dense_detections`, with n the smallest one of N, ``max_detections`` and
        ``num_rows``.
    """
    scores, classes = class_scores(class_logits, objectness_logits)
    mask_probs = mask_logits.float().sigmoid()
    rescored = scores * maskness(mask_probs.flatten(0, 1), mask_threshold).view_as(scores)
    is_kept = (scores > cls_threshold) & (rescored > score_threshold)
    # ONNX has topk, and no stable sort: only equal scores may change their order.
    scores, order = torch.where(is_kept, rescored, 0.0).topk(scores.shape[1])
    if mask_nms_threshold > 0:
        intersections = pairwise_intersections(chosen(mask_probs, order) > mask_threshold)
        overlaps = same_objects(classes.gather(1, order), intersections, mask_nms_threshold)
        # `greedy_nms` with fixed shapes: what the best remaining masks suppress, one mask after the other.
        remains = torch.ones_like(overlaps[:, 0])
        for index in range(scores.shape[1] - 1):
            suppressed = overlaps[:, index, index + 1 :] & remains[:, index : index + 1]
            remains = torch.cat([remains[:, : index + 1], remains[:, index + 1 :] & ~suppressed], dim=1)
        scores, second_order = (scores * remains).topk(scores.shape[1])
        order = order.gather(1, second_order)
    scores, order = scores[:, :max_detections], order[:, :max_detections]
    classes, mask_probs = classes.gather(1, order), chosen(mask_probs, order)
    return dense_output(scores, classes, mask_probs, padded_size, mask_threshold, num_rows)

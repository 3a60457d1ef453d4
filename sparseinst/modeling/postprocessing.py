"""From the decoder's output to detections of one image, as functions of tensors. Letters: see structures.py."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from sparseinst.modeling.mask_resize import MaskWindow, map_windows, masks_to_boxes, resize_masks
from sparseinst.modeling.mask_rle import encode_window
from sparseinst.modeling.structures import Detections

MASKNESS_EPS = 1e-6
MASK_FORMATS = ("bitmask", "rle")


class MaskMemoryError(ValueError):
    """The boolean masks of an image would take more memory than they may."""


def class_scores(class_logits: torch.Tensor, objectness_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Best class of each prediction and its score: sqrt(p(class) * p(objectness)) (paper, section 3.5).

    Args:
        class_logits: (N, K).
        objectness_logits: (N,).

    Returns:
        scores (N,) float32 in [0, 1], classes (N,) int64.
    """
    class_probs, classes = class_logits.float().sigmoid().max(-1)
    return (class_probs * objectness_logits.float().sigmoid()).sqrt(), classes


def maskness(mask_probs: torch.Tensor, mask_threshold: float) -> torch.Tensor:
    """Mean probability of the pixels that are above the threshold: sum(p [p > t]) / (sum([p > t]) + 1e-6).

    Args:
        mask_probs: (n, Hm, Wm) in [0, 1].
        mask_threshold: t.

    Returns:
        (n,) in [0, 1]; 0 where no pixel is above it.
    """
    probs_above = F.threshold(mask_probs, mask_threshold, 0.0)
    # Their ceilings are 1: counted so it takes an eighth of the time that a sum of booleans takes.
    return probs_above.sum((1, 2)) / (probs_above.ceil().sum((1, 2)) + MASKNESS_EPS)


def mask_nms(masks: torch.Tensor, classes: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Drop each mask that overlaps a better one of its class.

    Args:
        masks: (n, Hm, Wm) bool, best first.
        classes: (n,).
        iou_threshold: overlaps above this are dropped, in (0, 1].

    Returns:
        Indices of the masks that stay, ascending.
    """
    flat = masks.flatten(1).float()
    intersection = flat @ flat.T
    areas = flat.sum(1)
    union = areas[:, None] + areas[None, :] - intersection
    suppresses = ((intersection > iou_threshold * union) & (classes[:, None] == classes[None, :])).tolist()
    kept: list[int] = []
    for index in range(len(masks)):
        if not any(suppresses[better][index] for better in kept):
            kept.append(index)
    return torch.tensor(kept, dtype=torch.int64, device=masks.device)


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
    mask_format: str = "bitmask",
    max_mask_bytes: float = float("inf"),
) -> Detections:
    """Detections of one image: score, select, rescore by maskness, sort, resize the masks (paper, section 3.5).

    Args:
        class_logits: (N, K).
        objectness_logits: (N,).
        mask_logits: (N, Hm, Wm), over the padded input.
        padded_size: size of the padded network input.
        image_size: size of the image in it, top left.
        output_size: size of the masks wanted.
        cls_threshold: predictions with a score above this go on; the score before rescoring.
        mask_threshold: a pixel belongs to the mask where its probability is above this, in (0, 1).
        max_detections: most detections, the best.
        mask_nms_threshold: IoU above which the worse of two masks of one class is dropped; 0: off.
        mask_format: "bitmask": boolean masks; "rle": each is encoded and freed before the next one is made.
        max_mask_bytes: most memory that boolean masks may take.

    Returns:
        Detections, best first; masks that are empty at the output size are dropped.

    Raises:
        MaskMemoryError: the boolean masks would take more than ``max_mask_bytes``; nothing of them is allocated.
    """
    scores, classes = class_scores(class_logits, objectness_logits)
    prediction_idx = (scores > cls_threshold).nonzero().squeeze(1)
    # In place: the selection is a copy already.
    mask_probs = mask_logits[prediction_idx].float().sigmoid_()
    scores = scores[prediction_idx] * maskness(mask_probs, mask_threshold)

    scores, order = scores.sort(descending=True, stable=True)
    if mask_nms_threshold > 0:
        order_kept = mask_nms(mask_probs[order] > mask_threshold, classes[prediction_idx[order]], mask_nms_threshold)
        scores, order = scores[order_kept], order[order_kept]
    scores, order = scores[:max_detections], order[:max_detections]
    prediction_idx = prediction_idx[order]

    sizes = (padded_size, image_size, output_size)
    if mask_format == "rle":
        boxes, masks, found = _rle_masks(mask_probs[order], *sizes, mask_threshold)
    else:
        _check_mask_memory(len(order), output_size, max_mask_bytes)
        boxes, masks, found = _boolean_masks(mask_probs[order], *sizes, mask_threshold)
    if len(found) < len(scores):
        scores, prediction_idx = scores[found], prediction_idx[found]
    return Detections(boxes, scores, classes[prediction_idx], masks, prediction_idx)


def _boolean_masks(
    mask_probs: torch.Tensor,
    padded_size: tuple[int, int],
    image_size: tuple[int, int],
    output_size: tuple[int, int],
    mask_threshold: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Boxes and masks of those that are not empty, and which ones these are."""
    sizes = (padded_size, image_size, output_size)
    if mask_probs.device.type != "cpu":
        masks = resize_masks(mask_probs, *sizes, mask_threshold)
        found = masks.flatten(1).any(1).nonzero().squeeze(1)
        masks = masks if len(found) == len(masks) else masks[found]
        return masks_to_boxes(masks), masks, found
    # By NumPy: memory of which no more is filled with zeros than what is looked at.
    masks = np.zeros((len(mask_probs), *output_size), dtype=bool)

    def draw(index: int, window: MaskWindow) -> tuple[int, int, int, int]:
        x0, y0, x1, y1 = window.box
        masks[index, y0:y1, x0:x1] = window.pixels.numpy()
        return window.box

    boxes = map_windows(draw, mask_probs, *sizes, mask_threshold)
    found = [index for index, (x0, _, x1, _) in enumerate(boxes) if x0 < x1]
    for place, index in enumerate(found):
        # In place: a copy would be as large.
        if place < index:
            masks[place] = masks[index]
    boxes = [boxes[index] for index in found]
    found_masks = torch.from_numpy(masks[: len(found)])
    return _boxes_tensor(boxes), found_masks, torch.tensor(found, dtype=torch.int64)


def _rle_masks(
    mask_probs: torch.Tensor,
    padded_size: tuple[int, int],
    image_size: tuple[int, int],
    output_size: tuple[int, int],
    mask_threshold: float,
) -> tuple[torch.Tensor, list[dict], torch.Tensor]:
    """As :func:`_boolean_masks`, with the masks as compressed RLEs."""

    def encode(_: int, window: MaskWindow) -> tuple[tuple[int, int, int, int], dict] | None:
        return (window.box, encode_window(window, output_size)) if window.pixels.numel() else None

    encoded = map_windows(encode, mask_probs, padded_size, image_size, output_size, mask_threshold)
    found = [index for index, mask in enumerate(encoded) if mask is not None]
    boxes, rles = zip(*(encoded[index] for index in found)) if found else ((), ())
    device = mask_probs.device
    return _boxes_tensor(boxes).to(device), list(rles), torch.tensor(found, dtype=torch.int64, device=device)


def _boxes_tensor(boxes: Sequence[tuple[int, int, int, int]]) -> torch.Tensor:
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


def _check_mask_memory(num_masks: int, output_size: tuple[int, int], max_mask_bytes: float) -> None:
    height, width = output_size
    num_bytes = num_masks * height * width
    if num_bytes > max_mask_bytes:
        raise MaskMemoryError(
            f"{num_masks} boolean masks of {height}x{width} pixels take {num_bytes / 2**30:.2f} GiB, more than "
            f"MODEL.OUTPUT.MAX_MASK_GIB allows ({max_mask_bytes / 2**30:g}). Set "
            "MODEL.OUTPUT.MASK_FORMAT to rle, for which each mask is encoded and freed before the next one "
            "is made; or raise MAX_MASK_GIB where there is the memory, or lower MAX_DETECTIONS"
        )

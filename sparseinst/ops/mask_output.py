"""Masks of the output's size, as boolean tensors or as run-length encodings."""

from collections.abc import Sequence

import numpy as np
import torch

from sparseinst.ops.mask_resize import map_windows, resize_masks
from sparseinst.ops.mask_rle import encode_window
from sparseinst.ops.masks import masks_to_boxes
from sparseinst.structures.mask_memory import MaskMemoryError, check_mask_memory
from sparseinst.structures.mask_window import MaskWindow

__all__ = ["MASK_FORMATS", "MaskMemoryError", "output_masks"]

MASK_FORMATS = ("bitmask", "rle")
_REMEDY = (
    "Set MODEL.OUTPUT.MASK_FORMAT to rle, which encodes each mask before it computes the next one; or raise "
    "MAX_MASK_GIB, or return fewer detections"
)


def output_masks(
    mask_probs: torch.Tensor,
    padded_size: tuple[int, int],
    image_size: tuple[int, int],
    output_size: tuple[int, int],
    mask_threshold: float,
    mask_format: str = "bitmask",
    max_mask_gib: float = float("inf"),
) -> tuple[torch.Tensor, torch.Tensor | list[dict], torch.Tensor]:
    """Resize masks to the output, threshold them and drop those that are empty there.

    Args:
        mask_probs: (n, Hm, Wm) in [0, 1], over the padded input.
        padded_size: size of the padded network input.
        image_size: size of the image in it, at the top left.
        output_size: size of the masks that are returned.
        mask_threshold: a pixel belongs to the mask where its probability is above this, in (0, 1).
        mask_format: "bitmask", or "rle": each mask is encoded and freed before the next one is computed.
        max_mask_gib: most memory that boolean masks may take, in GiB.

    Returns:
        boxes (m, 4) float32, tight, in pixels, x1 and y1 exclusive; masks (m, height, width) bool, or m compressed COCO
        RLEs; indices (m,) int64 of the masks that are not empty.

    Raises:
        MaskMemoryError: the boolean masks would take more than ``max_mask_gib``; none of them is allocated.
    """
    sizes = (padded_size, image_size, output_size)
    if mask_format == "rle":
        return _rle_masks(mask_probs, *sizes, mask_threshold)
    check_mask_memory(len(mask_probs), output_size, max_mask_gib, _REMEDY)
    return _boolean_masks(mask_probs, *sizes, mask_threshold)


def _boolean_masks(
    mask_probs: torch.Tensor,
    padded_size: tuple[int, int],
    image_size: tuple[int, int],
    output_size: tuple[int, int],
    mask_threshold: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return boxes, boolean masks and indices of the masks that are not empty."""
    sizes = (padded_size, image_size, output_size)
    if mask_probs.device.type != "cpu":
        masks = resize_masks(mask_probs, *sizes, mask_threshold)
        found = masks.flatten(1).any(1).nonzero().squeeze(1)
        masks = masks if len(found) == len(masks) else masks[found]
        return masks_to_boxes(masks), masks, found
    # NumPy maps zeroed pages lazily, so pixels that no mask touches cost nothing.
    masks = np.zeros((len(mask_probs), *output_size), dtype=bool)

    def draw(index: int, window: MaskWindow | None) -> tuple[int, int, int, int] | None:
        if window is None:
            return None
        x0, y0, x1, y1 = window.box()
        masks[index, y0:y1, x0:x1] = window.mask
        return x0, y0, x1, y1

    boxes = map_windows(draw, mask_probs, *sizes, mask_threshold)
    found = [index for index, box in enumerate(boxes) if box is not None]
    for position, index in enumerate(found):
        # In place, because a copy would double the memory.
        if position < index:
            masks[position] = masks[index]
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
    """Return what `_boolean_masks` returns, with compressed RLEs."""

    def encode(_: int, window: MaskWindow | None) -> tuple[tuple[int, int, int, int], dict] | None:
        return None if window is None else (window.box(), encode_window(window, output_size))

    encoded = map_windows(encode, mask_probs, padded_size, image_size, output_size, mask_threshold)
    found = [index for index, mask in enumerate(encoded) if mask is not None]
    boxes, rles = zip(*(encoded[index] for index in found)) if found else ((), ())
    device = mask_probs.device
    return _boxes_tensor(boxes).to(device), list(rles), torch.tensor(found, dtype=torch.int64, device=device)


def _boxes_tensor(boxes: Sequence[tuple[int, int, int, int]]) -> torch.Tensor:
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)

"""Convert ground-truth masks of any of Detectron2's types to one tensor."""

import math
from collections.abc import Iterator

import torch
from detectron2.structures import BitMasks, Instances, PolygonMasks, polygons_to_bitmask

# Pixels of whole masks that `padded_masks` yields at once; at least one mask is.
PIXELS_AT_ONCE = 2**21


def gt_masks_tensor(instances: Instances) -> torch.Tensor:
    """Return ground-truth masks (M, h, w) of one image.

    Args:
        instances: with ``gt_masks``: PolygonMasks, BitMasks or a tensor; it may be absent where M is 0.

    Raises:
        ValueError: there are instances but no masks, or masks of another type or another size.
    """
    height, width = instances.image_size
    device = instances.gt_classes.device
    if not instances.has("gt_masks"):
        if len(instances):
            raise ValueError(
                f"{len(instances)} instances have no gt_masks, and the model is trained with masks. Give the "
                "annotations a segmentation, and leave MODEL.MASK_ON True so that the mapper keeps it"
            )
        return torch.zeros((0, height, width), dtype=torch.bool, device=device)
    masks = instances.gt_masks
    if isinstance(masks, PolygonMasks):
        bitmasks = [torch.from_numpy(polygons_to_bitmask(polygons, height, width)) for polygons in masks.polygons]
        masks = torch.stack(bitmasks) if bitmasks else torch.zeros((0, height, width), dtype=torch.bool)
    elif isinstance(masks, BitMasks):
        masks = masks.tensor
    elif not isinstance(masks, torch.Tensor):
        raise ValueError(f"gt_masks is a {type(masks).__name__}; expected PolygonMasks, BitMasks or a tensor")
    if masks.shape[-2:] != (height, width):
        raise ValueError(f"gt_masks are {tuple(masks.shape[-2:])} in an image of {(height, width)} (height, width)")
    return masks.to(device)


def padded_masks(instances: Instances, padded_size: tuple[int, int], device: torch.device) -> Iterator[torch.Tensor]:
    """Yield ground-truth masks of any type on the canvas of the padded input, a few at a time to bound the memory.

    Args:
        instances: as in `gt_masks_tensor`.
        padded_size: (height, width) of the canvas; the image is at its top left.
        device: of the canvas.

    Yields:
        (m, *padded_size), bool, or of the type of a tensor of fractions.
    """
    height, width = instances.image_size
    at_once = max(1, PIXELS_AT_ONCE // math.prod(padded_size))
    for start in range(0, len(instances), at_once):
        masks = gt_masks_tensor(instances[start : start + at_once]).to(device, non_blocking=True)
        dtype = masks.dtype if masks.is_floating_point() else torch.bool
        canvas = torch.zeros((len(masks), *padded_size), dtype=dtype, device=device)
        canvas[:, :height, :width] = masks
        yield canvas

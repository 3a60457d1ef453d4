"""Convert ground-truth masks of any of Detectron2's types to one tensor."""

import torch
from detectron2.structures import BitMasks, Instances, PolygonMasks, polygons_to_bitmask


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

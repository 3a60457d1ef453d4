"""Outputs that a trained SparseInst could return, for timing its post-processing without trained weights."""

import math

import torch

# Standard deviations of the logarithms of the objects' areas and aspect ratios.
AREA_SPREAD = 1.0
ASPECT_SPREAD = 0.4
# Mask logits are this inside an object and minus this outside; they change sign over about a cell.
MASK_LOGIT = 6.0


def draw_outputs(
    outputs: dict[str, torch.Tensor], num_objects: int, median_area: float, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Draw ellipses in place of the instances that a network with random weights finds.

    With random weights every prediction passes the threshold and has noise for a mask, so the time of post-processing
    would say little about a trained model.

    Args:
        outputs: of the network; give shapes, types and device. Entries other than logits, scores and masks are
            returned unchanged.
        num_objects: objects in each image; no other prediction passes the threshold.
        median_area: median of the objects' areas over the image's area; from 1 on every object fills the image.
        generator: of the CPU; determines positions and sizes.

    Raises:
        ValueError: a negative number of objects, or more objects than the network has masks.
    """
    logits, masks = outputs["pred_logits"], outputs["pred_masks"]
    num_images, num_masks, height, width = masks.shape
    if not 0 <= num_objects <= num_masks:
        raise ValueError(
            f"{num_objects} objects in an image: MODEL.SPARSE_INST.DECODER.NUM_MASKS allows 0 to {num_masks}"
        )
    shape = (num_images, num_objects, 1, 1)
    area = height * width * median_area * (AREA_SPREAD * torch.randn(shape, generator=generator)).exp()
    aspect = (ASPECT_SPREAD * torch.randn(shape, generator=generator)).exp()
    half_y, half_x = (area / math.pi * aspect).sqrt(), (area / math.pi / aspect).sqrt()
    y = torch.arange(height)[:, None] - height * torch.rand(shape, generator=generator)
    x = torch.arange(width) - width * torch.rand(shape, generator=generator)
    # In cells from the outline, positive inside.
    distance = (1 - torch.hypot(y / half_y, x / half_x)) * torch.minimum(half_y, half_x)
    if median_area >= 1:
        distance = torch.ones_like(distance)
    drawn = torch.full(masks.shape, -MASK_LOGIT)
    drawn[:, :num_objects] = distance.clamp(-1, 1) * MASK_LOGIT
    class_logits = torch.full_like(logits, -20.0)
    class_logits[:, :num_objects, 0] = 5.0
    return {
        **outputs,
        "pred_logits": class_logits,
        "pred_scores": torch.full_like(outputs["pred_scores"], 5.0),
        "pred_masks": drawn.to(masks),
    }

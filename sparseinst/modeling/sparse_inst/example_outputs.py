"""Outputs that a trained SparseInst could return, for timing its post-processing without trained weights."""

import torch

from sparseinst.modeling.auxiliary import MASK_LOGIT, draw_mask_logits


def draw_outputs(outputs: dict[str, torch.Tensor], num_objects: int, median_area: float) -> dict[str, torch.Tensor]:
    """Draw ellipses in place of the instances that a network with random weights finds.

    With random weights every prediction passes the threshold and has noise for a mask, so the time of post-processing
    would say little about a trained model.

    Args:
        outputs: of the network; give shapes, types and device. Entries other than logits, scores and masks are
            returned unchanged.
        num_objects: objects in each image; no other prediction passes the threshold.
        median_area: median of the objects' areas over the image's area; from 1 on every object fills the image.

    Raises:
        ValueError: a negative number of objects, or more objects than the network has masks.
    """
    logits, masks = outputs["pred_logits"], outputs["pred_masks"]
    num_images, num_masks, height, width = masks.shape
    if not 0 <= num_objects <= num_masks:
        raise ValueError(
            f"{num_objects} objects in an image: MODEL.SPARSE_INST.DECODER.NUM_MASKS allows 0 to {num_masks}"
        )
    drawn = torch.full(masks.shape, -MASK_LOGIT)
    drawn[:, :num_objects] = draw_mask_logits((num_images, num_objects, height, width), median_area)
    class_logits = torch.full_like(logits, -20.0)
    class_logits[:, :num_objects, 0] = 5.0
    return {
        **outputs,
        "pred_logits": class_logits,
        "pred_scores": torch.full_like(outputs["pred_scores"], 5.0),
        "pred_masks": drawn.to(masks),
    }

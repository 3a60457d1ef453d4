"""Outputs that a trained YOLACT could return, for timing post-processing without trained weights."""

import math

import torch

from sparseinst.modeling.auxiliary import MASK_LOGIT, draw_mask_logits
from sparseinst.modeling.yolact.anchors import BOX_TRANSFORM
from sparseinst.ops.masks import masks_to_boxes

# Class logits of the best and the worst candidate of an object; background has 0. Other classes underflow to a score of
# exactly 0, because Fast NMS would return every candidate in every class.
BEST_LOGIT, WORST_LOGIT, ABSENT_LOGIT = 5.0, 0.0, -200.0
CANDIDATES = 10


def draw_outputs(
    outputs: dict[str, torch.Tensor],
    anchors: torch.Tensor,
    num_objects: int,
    median_area: float,
) -> dict[str, torch.Tensor]:
    """Draw rectangles in place of the instances that a network with random weights finds.

    They have the areas of the ellipses that other models draw. Each object has CANDIDATES anchors with equal boxes;
    NMS keeps the first.

    Args:
        outputs: of the network; give shapes, types and device.
        anchors: (N, 4).
        num_objects: objects in each image.
        median_area: median of the objects' areas over the image's area.

    Raises:
        ValueError: more candidates than anchors.
    """
    class_logits, prototypes = outputs["class_logits"], outputs["prototypes"]
    batch, num_anchors, num_classes = class_logits.shape[0], class_logits.shape[1], class_logits.shape[2] - 1
    if not 0 <= num_objects <= num_anchors // CANDIDATES:
        raise ValueError(f"{num_objects} objects in an image: this model can draw 0 to {num_anchors // CANDIDATES}")
    height, width = prototypes.shape[-2:]
    logits = draw_mask_logits((batch, num_objects, height, width), median_area)
    # Objects of less than a cell have the cell that is nearest.
    masks = logits >= logits.amax((2, 3), keepdim=True).clamp(max=0)
    boxes = masks_to_boxes(masks.flatten(0, 1)).view(batch, num_objects, 4)
    centers, halves = (
        (boxes[..., :2] + boxes[..., 2:]) / 2,
        (boxes[..., 2:] - boxes[..., :2]) / 2 * (math.pi / 4) ** 0.5,
    )
    boxes = torch.cat([centers - halves, centers + halves], dim=2) / torch.tensor([width, height, width, height])

    used = torch.linspace(0, num_anchors - 1, num_objects * CANDIDATES).long()
    objects = torch.arange(num_objects * CANDIDATES) % max(1, num_objects)
    scores = torch.linspace(BEST_LOGIT, WORST_LOGIT, CANDIDATES).repeat_interleave(num_objects)
    drawn = {**outputs, **{name: torch.zeros_like(outputs[name]) for name in ("box_deltas", "coefficients")}}
    drawn["prototypes"] = torch.full_like(prototypes, MASK_LOGIT)
    drawn["coefficients"][:, used, 0] = 1.0
    for image in range(batch):
        deltas = BOX_TRANSFORM.get_deltas(anchors[used].cpu(), boxes[image, objects])
        drawn["box_deltas"][image, used] = deltas.to(drawn["box_deltas"])
    drawn["class_logits"] = torch.full_like(class_logits, ABSENT_LOGIT)
    drawn["class_logits"][:, :, num_classes] = 0.0
    drawn["class_logits"][:, used, objects % num_classes] = scores.to(class_logits)
    return drawn

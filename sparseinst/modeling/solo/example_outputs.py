"""Outputs that a trained SOLO or SOLOv2 could return, for timing post-processing without trained weights."""

import math

import torch

from sparseinst.modeling.auxiliary import draw_mask_logits
from sparseinst.modeling.solo.heads import GridHead, resize
from sparseinst.modeling.solo.postprocessing import DetectionOptions

# Category logits: of the cell that remains of each object, and of cells without an object.
BEST_LOGIT, BACKGROUND_LOGIT = 5.0, -20.0
# Score over the threshold of the other cells of an object, so low that NMS drops them.
SUPPRESSED_SHARE = 1.05


def draw_outputs(
    head: GridHead,
    outputs: dict[str, torch.Tensor],
    num_objects: int,
    options: DetectionOptions,
    median_area: float,
) -> dict[str, torch.Tensor]:
    """Draw ellipses in place of the instances that a network with random weights finds.

    Each object has the cells of one column of one level, so that every kind of head can draw it: the first cell scores
    high, cells of other rows score low and have the same mask.

    Args:
        head: of the model.
        outputs: of the network; give shapes, types and device.
        num_objects: objects in each image.
        options: as many cells as enter NMS are above the score threshold, where the columns have so many.
        median_area: median of the objects' areas over the image's area.

    Raises:
        ValueError: more objects than columns or channels.
    """
    columns = [(level, column) for level, size in enumerate(head.num_grids) for column in range(size)]
    features = outputs.get("mask_features", outputs.get("mask_features_0", outputs.get("mask_logits_x_0")))
    most = min(len(columns), len(columns) if "mask_logits_x_0" in outputs else features.shape[1])
    if not 0 <= num_objects <= most:
        raise ValueError(f"{num_objects} objects in an image: this head can draw 0 to {most}")
    columns = columns[:num_objects]
    cells = [(level, row, column) for row in range(0, max(head.num_grids), 2) for level, column in columns]
    cells = [each for each in cells if each[1] < head.num_grids[each[0]]][: max(num_objects, options.nms_pre)]
    starts = [sum(head.level_sizes[:level]) for level in range(len(head.num_grids))]
    objects = {column: index for index, column in enumerate(columns)}

    suppressed = min(0.999, SUPPRESSED_SHARE * options.score_threshold + 0.001)
    cate_logits = torch.full_like(outputs["cate_logits"], BACKGROUND_LOGIT)
    drawn = {**outputs, "cate_logits": cate_logits}
    batch, _, height, width = features.shape
    scale = 2 if "mask_features_0" in outputs else 1
    masks = draw_mask_logits((batch, num_objects, height * scale, width * scale), median_area)
    masks = masks.to(features)
    for name, output in outputs.items():
        if name.startswith("mask_"):
            drawn[name] = torch.zeros_like(output)
    if "kernels" in outputs:
        drawn["kernels"] = torch.zeros_like(outputs["kernels"])
        drawn["mask_features"][:, :num_objects] = masks
    for level in range(len(head.num_grids)):
        if f"mask_features_{level}" in outputs and num_objects:
            level_features = drawn[f"mask_features_{level}"]
            level_features[:, :num_objects] = resize(masks, level_features.shape[-2:])
        if f"mask_logits_y_{level}" in outputs:
            drawn[f"mask_logits_y_{level}"].fill_(float(masks.max()) if num_objects else 0.0)
    suppressed_logit = math.log(suppressed / (1 - suppressed))
    for number, (level, row, column) in enumerate(cells):
        index, cell = objects[level, column], row * head.num_grids[level] + column
        cate_logits[:, 0, starts[level] + cell] = BEST_LOGIT if number < num_objects else suppressed_logit
        if "kernels" in outputs:
            drawn["kernels"][:, index, starts[level] + cell] = 1.0
        elif f"mask_weights_{level}" in outputs:
            drawn[f"mask_weights_{level}"][:, cell, index] = 1.0
        elif number < num_objects:
            x_logits = drawn[f"mask_logits_x_{level}"]
            x_logits[:, column] = resize(masks[:, index : index + 1], x_logits.shape[-2:])[:, 0]
    return drawn

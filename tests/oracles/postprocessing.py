"""The published post-processing written naively: every mask is resized whole, twice."""

import torch
from detectron2.structures import Boxes, ImageList, Instances
from torch.nn import functional as F

from sparseinst.modeling.sparse_inst.model import SparseInst
from sparseinst.modeling.sparse_inst.postprocessing import class_scores
from sparseinst.ops.mask_resize import masks_to_boxes


def naive_postprocess(
    model: SparseInst, outputs: dict[str, torch.Tensor], batched_inputs: list[dict], images: ImageList
) -> list[dict]:
    """Score, threshold, rescore, resize, threshold; then, as our results: sorted, without empty masks, with boxes."""
    results = []
    for index, (x, image_size) in enumerate(zip(batched_inputs, images.image_sizes)):
        output_size = (x["height"], x["width"])
        scores, classes = class_scores(outputs["pred_logits"][index], outputs["pred_scores"][index, :, 0])
        kept = scores > model.cls_threshold
        scores, classes = scores[kept], classes[kept]
        probs = outputs["pred_masks"][index][kept].sigmoid()
        above = probs > model.mask_threshold
        scores = scores * (probs * above).sum((1, 2)) / (above.sum((1, 2)) + 1e-6)
        whole = F.interpolate(probs[:, None], images.tensor.shape[-2:], mode="bilinear", align_corners=False)
        whole = whole[..., : image_size[0], : image_size[1]]
        masks = F.interpolate(whole, output_size, mode="bilinear", align_corners=False)[:, 0] > model.mask_threshold
        order = scores.argsort(descending=True, stable=True)[: model.max_detections]
        order = order[masks[order].flatten(1).any(1)]
        masks = masks[order]
        instances = Instances(output_size, pred_boxes=Boxes(masks_to_boxes(masks)), pred_masks=masks)
        instances.scores, instances.pred_classes = scores[order], classes[order]
        results.append({"instances": instances})
    return results

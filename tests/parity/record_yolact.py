"""Record the numbers of a YOLACT config that the files in tests/parity/yolact hold of the published code."""

from unittest import mock

import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import nn

from sparseinst.config import load_config
from sparseinst.modeling.yolact.anchors import BOX_TRANSFORM
from sparseinst.modeling.yolact.postprocessing import DetectionOptions
from tests.parity.summary import summary
from tests.parity.yolact import filling
from tests.saved_model import no_random_weights

PARTS = ("protonet", "mask_iou_head", "head", "sem_seg_head")
VARIANTS = {
    "published": {},
    "low": {"score": 0.005, "nms": 0.3, "top_k": 40, "max_detections": 300},
    "strict": {"score": 0.5},
    "strict_second_threshold": {"score": 0.5, "second_threshold": True},
    "cross_class": {"cross": True},
    "greedy": {"fast": False},
}
NUM_RECORDED = 120
# Parameters whose gradient's norm is recorded; every block would be too many.
GRADIENTS = (
    "head.", "protonet.", "sem_seg_head.", "mask_iou_head.", "backbone.fpn_", "backbone.top_block.",
    "backbone.bottom_up.stem.conv1.weight", "backbone.bottom_up.stem.conv1.conv.weight",
    "backbone.bottom_up.res3.0.", "backbone.bottom_up.res5.2.", "backbone.bottom_up.stages.2.blocks.0.",
    "backbone.bottom_up.stages.4.conv_down.",
)  # fmt: skip
UNRECORDED = ("norm.weight", "norm.bias", "bn.weight", "bn.bias", "conv2_offset.bias")
OF_EACH_LOSS = (
    "backbone.fpn_output3.weight", "backbone.top_block.p7.weight", "protonet.conv1.weight", "protonet.predictor.weight",
    "head.tower.0.weight", "head.bbox_pred.weight", "head.cls_score.weight", "head.coeff_pred.weight",
    "sem_seg_head.predictor.weight", "mask_iou_head.conv1.weight",
)  # fmt: skip


def filled(model: nn.Module) -> nn.Module:
    """Fill a model by formula, in place, and return it."""
    state = {
        name: torch.from_numpy(filling.tensor(name, tuple(value.shape))) if value.dim() else value
        for name, value in model.state_dict().items()
    }
    model.load_state_dict(state)
    return model


def build(config: str) -> nn.Module:
    """Build the model of a config on the CPU and fill it by formula."""
    with no_random_weights():
        return filled(build_model(load_config(config, ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""]))).eval()


def inputs(model: nn.Module) -> list[dict]:
    """Return the two images, with their ground truth at the size of the square."""
    batch = []
    for index, (height, width) in enumerate(filling.SIZES):
        classes, masks, boxes, crowds = map(
            torch.from_numpy, filling.ground_truth(index, model.side, model.mask_iou_head is not None)
        )
        instances = Instances((model.side, model.side), gt_classes=classes, gt_masks=masks, gt_boxes=Boxes(boxes))
        batch.append(
            {
                "image": torch.from_numpy(filling.picture(index)),
                "height": height,
                "width": width,
                "instances": instances,
                "crowd_boxes": crowds,
            }
        )
    return batch


def record_evaluation(model: nn.Module, batch: list[dict]) -> dict:
    """Record features, outputs, candidates and detections of the first image."""
    images = model.preprocess(batch[:1])
    features = {}
    hook = model.backbone.bottom_up.register_forward_hook(lambda module, args, output: features.update(output))
    with torch.no_grad():
        outputs = model.network(images.tensor)
        levels = model.backbone(images.tensor)
    hook.remove()
    probs = outputs["class_logits"].softmax(2)
    best = probs[0, :, :-1].amax(1)
    recorded = {
        "backbone": {
            f"c{index}": summary(features[name]) for index, name in enumerate(model.backbone.in_features, start=3)
        },
        "fpn": {name: summary(level) for name, level in levels.items()},
        "prototypes": summary(outputs["prototypes"]),
        "class_probs": summary(probs),
        "box_deltas": summary(outputs["box_deltas"]),
        "coefficients": summary(outputs["coefficients"]),
        "candidates": {str(threshold): int((best > threshold).sum()) for threshold in (0.005, 0.05, 0.5)},
        "output_size": [batch[0]["height"], batch[0]["width"]],
        "variants": VARIANTS,
        "detections": {},
    }
    configured = model.detection
    for name, options in VARIANTS.items():
        is_cross = options.get("cross", False)
        model.detection = DetectionOptions(
            score_threshold=options.get("score", 0.05),
            nms_type="cross_class" if is_cross else "fast" if options.get("fast", True) else "greedy",
            iou_threshold=options.get("nms", 0.5),
            top_k=options.get("top_k", 200),
            second_threshold=options.get("second_threshold", False),
            # The published variant does not cut.
            max_detections=200 if is_cross else options.get("max_detections", 100),
        )
        with torch.no_grad():
            found = model.postprocess(outputs, batch[:1], images)[0]["instances"]
        recorded["detections"][name] = record_detections(found)
    model.detection = configured
    return recorded


def record_detections(found: Instances) -> dict:
    """Record the best detections, in the order of the classes' scores, as published."""
    recorded = {"count": len(found)}
    if found.has("pred_class_scores"):
        found = found[found.pred_class_scores.argsort(descending=True, stable=True)]
        recorded["mask_scores"] = found.scores[:NUM_RECORDED].tolist()
    found = found[:NUM_RECORDED]
    scores = found.pred_class_scores if found.has("pred_class_scores") else found.scores
    return recorded | {
        "scores": scores.tolist(),
        "classes": found.pred_classes.tolist(),
        "boxes": found.pred_boxes.tensor.tolist(),
        "areas": found.pred_masks.flatten(1).sum(1).tolist(),
    }


def record_priors(model: nn.Module) -> dict:
    """Record the anchors at the ends of the levels as center x, y, width, height."""
    anchors = model.anchors
    values = torch.cat([(anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2:] - anchors[:, :2]], dim=1)
    sizes = model.grid_sizes
    per_cell = len(anchors) // sum(size * size for size in sizes)
    starts = [per_cell * sum(size * size for size in sizes[:index]) for index in range(len(sizes) + 1)]
    rows = set()
    for start in starts:
        rows |= {row for row in (start - 1, start, start + 1, start + 2, start + per_cell - 1, start + per_cell)}
    rows = sorted(row for row in rows if 0 <= row < len(anchors))
    return {
        "count": len(anchors),
        "per_cell": per_cell,
        "feature_sizes": [[size, size] for size in sizes],
        "starts": starts,
        "rows": rows,
        "cx_cy_w_h": values[rows].tolist(),
        "summary": summary(values),
    }


def record_matching(model: nn.Module, batch: list[dict]) -> list[dict]:
    """Record the matching of each image."""
    recorded = []
    images = model.preprocess(batch)
    targets = model.prepare_targets(batch, images)
    without_crowds = model.prepare_targets([{**x, "crowd_boxes": None} for x in batch], images)
    for target, other in zip(targets, without_crowds):
        positive = target.is_positive.nonzero().squeeze(1)
        neutral = (target.labels == -1).nonzero().squeeze(1)
        gt_idx = target.gt_idx[positive]
        boxes, anchors = target.gt_boxes[gt_idx], model.anchors[positive]
        # With any object, before the forced match.
        ious = pairwise_iou(Boxes(target.gt_boxes), Boxes(anchors)).amax(0)
        recorded.append(
            {
                "num_positive": len(positive),
                "num_neutral": len(neutral),
                "num_background": int((target.labels == target.num_classes).sum()),
                "neutral_by_crowd": len(neutral) - int((other.labels == -1).sum()),
                "forced_below_threshold": [
                    {"prior": int(positive[index]), "gt": int(gt_idx[index]), "iou": float(ious[index])}
                    for index in (ious < model.matcher.iou_thresholds[1]).nonzero().squeeze(1)
                ],
                "positive_priors": positive.tolist(),
                "positive_gt": gt_idx.tolist(),
                "positive_classes": target.labels[positive].tolist(),
                "neutral_priors_sum": int(neutral.sum()),
                "box_targets": summary(BOX_TRANSFORM.get_deltas(anchors, boxes)),
            }
        )
    return recorded


def record_training(model: nn.Module, batch: list[dict]) -> dict:
    """Record outputs, losses and gradients of the batch; batch norms keep their statistics and are trained."""
    images = model.preprocess(batch)
    targets = model.prepare_targets(batch, images)
    # Only what is recorded needs a gradient.
    parameters = {
        name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, nn.Parameter)
    }
    for name, parameter in parameters.items():
        parameter.requires_grad_(name.startswith(GRADIENTS) and not name.endswith(UNRECORDED))
    model.train()
    for module in model.backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    outputs = model.network(images.tensor)
    counted = [[int(count) for count in counts] for counts in zip(*map(class_counts, targets))]
    recorded = {
        "class_logits": summary(outputs["class_logits"]),
        "sem_seg_logits": summary(outputs["sem_seg_logits"]),
        "num_positive": sum(counted[0]),
        # The criterion takes three negatives for each positive anchor where there are so many.
        "num_hard_negative": sum(min(3 * positive, background) for positive, background in zip(*counted)),
    }
    losses = model.losses(outputs, targets)
    recorded["losses"] = {name: loss.item() for name, loss in losses.items()}
    used = {name: parameters[name] for name in OF_EACH_LOSS if name in parameters}
    recorded["grad_norms_by_loss"] = {}
    for name, loss in losses.items():
        gradients = torch.autograd.grad(loss, list(used.values()), retain_graph=True)
        norms = {key: gradient.double().norm().item() for key, gradient in zip(used, gradients)}
        recorded["grad_norms_by_loss"][name] = {key: norm for key, norm in norms.items() if norm > 0}
    with torch.no_grad(), mock.patch("torch.randperm", lambda count, device: torch.arange(count, device=device)):
        model.criterion.max_train_masks, most = 10, model.criterion.max_train_masks
        first = model.losses(outputs, targets)
        recorded["losses_first_10_masks"] = {
            name: first[name].item() for name in ("loss_mask", "loss_mask_iou") if name in first
        }
        model.criterion.max_train_masks = most
    sum(losses.values()).backward()
    recorded["grad_norms"] = {
        name: parameter.grad.double().norm().item()
        for name, parameter in parameters.items()
        if parameter.grad is not None
    }
    model.eval().zero_grad()
    return recorded


def class_counts(target) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the positive anchors and the background of one image."""
    return target.is_positive.sum(), (target.labels == target.num_classes).sum()


def record_batch_norms(model: nn.Module, batch: list[dict]) -> dict:
    """Record the backbone's features and the stem's statistics after a pass with statistics of the batch."""
    images = model.preprocess(batch)
    backbone = model.backbone.bottom_up.train()
    with torch.no_grad():
        features = backbone(images.tensor)
    stem = {name: value for name, value in model.state_dict().items() if ".stem." in name and "running" in name}
    backbone.eval()
    return {
        "backbone_batch_norm_training": {
            f"c{index}": summary(features[name]) for index, name in enumerate(model.backbone.in_features, start=3)
        },
        "stem_statistics_after_one_step": {name: summary(value) for name, value in stem.items()},
    }


def record(config: str) -> dict:
    """Record everything of a config."""
    model = build(config)
    batch = inputs(model)
    state = model.state_dict()
    parameters = {
        name: sum(value.numel() for value in part.parameters())
        for name, part in model.named_children()
        if name in PARTS
    }
    bottom_up = sum(value.numel() for value in model.backbone.bottom_up.parameters())
    parameters |= {
        "bottom_up": bottom_up,
        "fpn": sum(value.numel() for value in model.backbone.parameters()) - bottom_up,
    }
    return {
        "size": model.side,
        "num_tensors": sum(value.dim() > 0 for value in state.values()),
        "parameters": parameters,
        "input": [summary(image) for image in model.preprocess(batch).tensor],
        "priors": record_priors(model),
        **record_evaluation(model, batch),
        "matching": record_matching(model, batch),
        **record_training(model, batch),
        **record_batch_norms(model, batch),
    }

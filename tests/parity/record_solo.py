"""Record the numbers of a SOLO or SOLOv2 config that the files in tests/parity/solo hold of the published code."""

import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from torch import nn

from sparseinst.config import load_config
from sparseinst.modeling.solo.postprocessing import DetectionOptions, candidate_cells
from sparseinst.ops.deform_conv import published_name
from tests.parity.solo import filling
from tests.parity.summary import summary
from tests.saved_model import no_random_weights

FILLED = ("backbone.", "head.", "mask_feature_head.")
GRADIENTS = ("head.", "mask_feature_head.", "backbone.fpn_", "backbone.bottom_up.res3.0.", "backbone.bottom_up.res5.1.")
THRESHOLDS = {
    "published": {"nms_pre": 500, "score_thr": 0.1, "update_thr": 0.05, "kernel": "gaussian", "max_per_img": 100},
    "low": {"nms_pre": 120, "score_thr": 0.06, "update_thr": 0.01, "kernel": "gaussian", "max_per_img": 60},
    "linear": {"nms_pre": 500, "score_thr": 0.1, "update_thr": 0.05, "kernel": "linear", "max_per_img": 100},
}
for thresholds in THRESHOLDS.values():
    thresholds.update(mask_thr=0.5, sigma=2.0)


def build(config: str) -> nn.Module:
    """Build the model of a config on the CPU and fill it by formula."""
    with no_random_weights():
        return filled(build_model(load_config(config, ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""]))).eval()


def filled(model: nn.Module) -> nn.Module:
    """Fill a model by formula, in place, and return it."""
    state = {
        name: torch.from_numpy(filling.tensor(name, tuple(value.shape)))
        if name.startswith(FILLED) and value.dim()
        else value
        for name, value in model.state_dict().items()
    }
    model.load_state_dict(state)
    return model


def inputs(with_instances: bool) -> list[dict]:
    """Return the two images, with their ground truth or not."""
    batch = []
    for index, (_, (height, width)) in enumerate(filling.SIZES):
        image = torch.from_numpy(filling.image(index))
        x = {"image": image, "height": height, "width": width}
        if with_instances:
            classes, masks, boxes = filling.ground_truth(index)
            x["instances"] = Instances(
                tuple(image.shape[1:]),
                gt_classes=torch.from_numpy(classes),
                gt_masks=BitMasks(torch.from_numpy(masks)),
                gt_boxes=Boxes(torch.from_numpy(boxes)),
            )
        batch.append(x)
    return batch


def record_outputs(model: nn.Module, features: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor]) -> dict:
    """Record features and head outputs of a batch."""
    head = model.head
    with torch.no_grad():
        splits = {
            name: outputs[name].split(head.level_sizes, dim=2) for name in ("cate_logits", "kernels") if name in outputs
        }
        recorded = {
            "fpn": {name: summary(feature) for name, feature in features.items()},
            **{
                name: [summary(part.unflatten(2, (size, size))) for part, size in zip(parts, head.num_grids)]
                for name, parts in splits.items()
            },
        }
        levels = range(len(head.num_grids))
        if "mask_features_0" in outputs:
            recorded["mask_logits"] = [summary(all_mask_logits(model, outputs, level)) for level in levels]
        for axis in "xy":
            if f"mask_logits_{axis}_0" in outputs:
                recorded[f"mask_logits_{axis}"] = [summary(outputs[f"mask_logits_{axis}_{level}"]) for level in levels]
        if "mask_features" in outputs:
            recorded["mask_features"] = summary(outputs["mask_features"])
    return recorded


def all_mask_logits(model: nn.Module, outputs: dict[str, torch.Tensor], level: int) -> torch.Tensor:
    """Return SOLO's mask logits of every cell of a level, (B, S * S, h, w)."""
    cells = torch.arange(model.head.level_sizes[level])
    return torch.stack([model.head.mask_logits(outputs, image, level, cells) for image in range(2)])


def record_training(model: nn.Module) -> tuple[dict, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Record targets, losses and gradients of a batch; return the backbone's features and the outputs with them.

    The norms are frozen or of groups, so that the outputs are those of the model in evaluation mode.
    """
    batch = inputs(with_instances=True)
    targets = model.prepare_targets(batch, model.preprocess(batch))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name.startswith(GRADIENTS))
    features, outputs = {}, {}
    network = model.network
    model.network = lambda images: outputs.update(network(images)) or outputs
    hook = model.backbone.register_forward_hook(lambda module, args, output: features.update(output))
    losses = model.train()(batch)
    hook.remove()
    model.network = network
    recorded = {
        "targets": [
            [
                {
                    "cells": level.cells.tolist(),
                    "categories": level.categories[level.cells].tolist(),
                    "mask_sums": target.masks[stride][level.objects].flatten(1).sum(1).tolist(),
                    "unique": len(level.cells.unique()),
                }
                for level, stride in zip(target.levels, model.head.mask_strides)
            ]
            for target in targets
        ],
        "num_positive": int(model.loss_counts(targets)["num_positive"]),
    }
    sum(losses.values()).backward()
    recorded["losses"] = {name: loss.item() for name, loss in losses.items()}
    recorded["grad_norms"] = {
        published_name(name): parameter.grad.double().norm().item()
        for name, parameter in sorted(model.named_parameters())
        if name.startswith(GRADIENTS) and parameter.grad is not None
    }
    model.eval()
    return recorded, *({name: value.detach() for name, value in found.items()} for found in (features, outputs))


def record_detections(model: nn.Module, outputs: dict[str, torch.Tensor], batch: list[dict], images) -> dict:
    """Record candidates and detections of a batch under each set of thresholds."""
    recorded: dict = {"candidates": {}, "detections": {}, "thresholds": THRESHOLDS}
    for name, values in THRESHOLDS.items():
        model.detection = DetectionOptions(
            score_threshold=values["score_thr"],
            mask_threshold=values["mask_thr"],
            nms_kernel=values["kernel"],
            nms_sigma=values["sigma"],
            nms_pre=values["nms_pre"],
            update_threshold=values["update_thr"],
            max_detections=values["max_per_img"],
        )
        with torch.no_grad():
            results = [x["instances"] for x in model.postprocess(outputs, batch, images)]
            cells = [
                candidate_cells(logits, model.head.num_grids, values["score_thr"])[0]
                for logits in outputs["cate_logits"]
            ]
        recorded["candidates"][name] = [len(each) for each in cells]
        recorded["detections"][name] = [
            {
                "count": len(found),
                "scores": found.scores.tolist(),
                "classes": found.pred_classes.tolist(),
                "areas": found.pred_masks.flatten(1).sum(1).tolist(),
                "boxes": found.pred_boxes.tensor.tolist(),
            }
            for found in results
        ]
    return recorded


def record(config: str) -> dict:
    """Record everything of a config."""
    model = build(config)
    batch = inputs(with_instances=False)
    images = model.preprocess(batch)
    counts = {
        "backbone": model.backbone.bottom_up,
        "fpn": model.backbone,
        "head": model.head,
        "mask_feature_head": model.mask_feature_head or nn.Identity(),
    }
    numbers = {name: sum(p.numel() for p in module.parameters()) for name, module in counts.items()}
    numbers["fpn"] -= numbers["backbone"]
    numbers["backbone_frozen_norms"] = numbers["backbone"]
    # With the affine parameters of the frozen norms.
    numbers["backbone"] += sum(
        value.numel()
        for name, value in model.backbone.bottom_up.named_buffers()
        if name.endswith(("norm.weight", "norm.bias"))
    )
    training, features, outputs = record_training(model)
    return {
        "num_tensors": len(model.state_dict()),
        "parameters": numbers,
        **record_outputs(model, features, outputs),
        **record_detections(model, outputs, batch, images),
        **training,
    }

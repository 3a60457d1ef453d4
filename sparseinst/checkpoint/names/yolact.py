"""YOLACT and YOLACT++: names of the official code."""

import torch

from sparseinst.checkpoint.names import detectron2
from sparseinst.checkpoint.names.source import KeyHint, Recipe, Source, State, by_patterns, number
from sparseinst.checkpoint.names.timm import DARKNET

_CLASSES = ("head.cls_score.weight", "head.cls_score.bias")
_BOXES = "head.bbox_pred.bias"


def _folded_biases(converted: State, _: State) -> dict[str, torch.Tensor | None]:
    """Fold the biases of deformable convolutions into the means of the norms after them."""
    changed: dict[str, torch.Tensor | None] = {}
    for name, bias in converted.items():
        mean = name.removesuffix("bias") + "norm.running_mean"
        if name.endswith(".conv2.bias") and mean in converted:
            changed |= {mean: converted[mean] - bias, name: None}
    return changed


def _background_last(converted: State, target: State) -> dict[str, torch.Tensor | None]:
    """Move the background of each anchor behind the classes, as Detectron2 has it."""
    if MODEL.signs - target.keys() or not converted.keys() >= {*_CLASSES, _BOXES}:
        return {}
    num_anchors = max(1, len(converted[_BOXES]) // 4)
    if any(len(converted[name]) % num_anchors for name in _CLASSES):
        return {}
    return {name: converted[name].unflatten(0, (num_anchors, -1)).roll(-1, dims=1).flatten(0, 1) for name in _CLASSES}


MODEL = Source("YOLACT", frozenset({"head.cls_score.weight", "head.coeff_pred.weight", "protonet.conv1.weight"}))
_OFFICIAL = by_patterns(
    # Duplicates in old files, and layers that a newer version dropped.
    (r"^backbone\.layer\d.*|^fpn\.downsample_layers\.([2-9]|\d\d)\..*", ""),
    (r"^backbone\.", "backbone.bottom_up."),
    (r"^fpn\.lat_layers\.(\d)\.", lambda match: f"backbone.fpn_lateral{5 - int(match[1])}."),
    (r"^fpn\.pred_layers\.(\d)\.", lambda match: f"backbone.fpn_output{5 - int(match[1])}."),
    (r"^fpn\.downsample_layers\.(\d)\.", number("backbone.top_block.p{}.", 6)),
    (r"^proto_net\.10\.", "protonet.predictor."),
    (r"^proto_net\.8\.", "protonet.conv4."),
    (r"^proto_net\.([024])\.", lambda match: f"protonet.conv{int(match[1]) // 2 + 1}."),
    (r"^prediction_layers\.0\.upfeature\.0\.", "head.tower.0."),
    (r"^prediction_layers\.0\.conf_layer\.", "head.cls_score."),
    (r"^prediction_layers\.0\.bbox_layer\.", "head.bbox_pred."),
    (r"^prediction_layers\.0\.mask_layer\.", "head.coeff_pred."),
    (r"^semantic_seg_conv\.", "sem_seg_head.predictor."),
    (r"^maskiou_net\.maskiou_net\.10\.", "mask_iou_head.predictor."),
    (r"^maskiou_net\.maskiou_net\.(\d)\.", lambda match: f"mask_iou_head.conv{int(match[1]) // 2 + 1}."),
)
_SIGNS = frozenset({"prediction_layers.0.conf_layer.weight", "proto_net.0.weight"})

MODELS = (
    MODEL,
    Source(
        "YOLACT of the official code, DarkNet",
        _SIGNS | {"backbone._preconv.0.weight"},
        renamings={MODEL.family: _OFFICIAL},
        adapt=_background_last,
        recipe=Recipe("RGB", (0.0, 0.0, 0.0), (255.0, 255.0, 255.0), stride_in_1x1=False),
    ),
    Source(
        "YOLACT of the official code",
        _SIGNS,
        renamings={MODEL.family: _OFFICIAL},
        adapt=_background_last,
        recipe=Recipe("RGB", (123.68, 116.78, 103.94), (58.40, 57.12, 57.38), stride_in_1x1=False),
    ),
)
SOURCES = (
    Source(
        "ResNet of YOLACT",
        frozenset({"conv1.weight", "layers.0.0.conv1.weight"}),
        renamings={
            detectron2.RESNET.family: by_patterns(
                (r"^(?!layers)", "stem."),
                (r"^layers\.(\d)\.", number("res{}.", 2)),
                (r"\bbn(\d)\.", r"conv\1.norm."),
                (r"\bdownsample\.0\.", "shortcut."),
                (r"\bdownsample\.1\.", "shortcut.norm."),
                (r"\.conv2\.conv_offset_mask\.", ".conv2_offset."),
            )
        },
        adapt=_folded_biases,
    ),
    Source(
        "DarkNet of YOLACT",
        frozenset({"_preconv.0.weight", "layers.0.0.0.weight"}),
        renamings={
            DARKNET.family: by_patterns(
                (r"^_preconv\.", "stem.conv1."),
                (r"^layers\.(\d)\.0\.(?=\d)", r"stages.\1.conv_down."),
                (r"^layers\.(\d)\.(\d+)\.", lambda match: f"stages.{match[1]}.blocks.{int(match[2]) - 1}."),
                (r"(conv1|conv2|conv_down)\.0\.", r"\1.conv."),
                (r"(conv1|conv2|conv_down)\.1\.", r"\1.bn."),
            )
        },
    ),
)

_ANCHORS = "MODEL.YOLACT.ANCHOR_SCALES and ANCHOR_RATIOS"
# The first that fits is the hint.
KEY_HINTS = (
    KeyHint(r"^head\.cls_score\.", f"MODEL.YOLACT.NUM_CLASSES, or {_ANCHORS}", first_axis=True),
    KeyHint(r"^head\.bbox_pred\.", _ANCHORS, first_axis=True),
    KeyHint(r"^head\.coeff_pred\.", f"MODEL.YOLACT.NUM_PROTOTYPES, or {_ANCHORS}", first_axis=True),
    KeyHint(r"^protonet\.predictor\.", "MODEL.YOLACT.NUM_PROTOTYPES", first_axis=True),
    KeyHint(r"^(sem_seg_head|mask_iou_head)\.predictor\.", "the model's NUM_CLASSES", first_axis=True),
    KeyHint(r"^protonet\.", "MODEL.YOLACT.PROTOTYPE_NET.CHANNELS, or MODEL.FPN.OUT_CHANNELS"),
    KeyHint(r"^head\.(tower|cls_score|bbox_pred|coeff_pred)\.", "MODEL.YOLACT.CHANNELS, or MODEL.FPN.OUT_CHANNELS"),
    KeyHint(r"^mask_iou_head\.", "MODEL.YOLACT.MASK_IOU_ON", is_presence=True),
    KeyHint(r"^sem_seg_head\.", "SEM_SEG_WEIGHT of the model's LOSS", is_presence=True),
    KeyHint(r"^backbone\.top_block\.", "MODEL.YOLACT.ANCHOR_SIZES", is_presence=True),
    KeyHint(r"^protonet\.conv", "MODEL.META_ARCHITECTURE, or MODEL.YOLACT.PROTOTYPE_NET.NUM_CONVS", is_presence=True),
    KeyHint(r"^head\.(cls_score|coeff_pred)\.", "MODEL.META_ARCHITECTURE", is_presence=True),
    KeyHint(r"^head\.tower\.", "MODEL.YOLACT.NUM_CONVS", is_presence=True),
)

"""YOLACT models that are small enough for tests: a ResNet-18, 16 channels, 8 prototypes, an input of 64 pixels."""

import torch
from detectron2.modeling import build_model
from torch import nn

from sparseinst.config import load_config

NUM_CLASSES = 3
SIDE = 64


def tiny_opts() -> list:
    """Return KEY VALUE overrides of configs/yolact/yolact_resnet50.yaml."""
    return [
        "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.RESNETS.DEPTH", 18,
        "MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.FPN.OUT_CHANNELS", 16, "INPUT.SQUARE_SIZE", SIDE,
        "MODEL.YOLACT.ANCHOR_SIZES", [8, 16, 24, 32, 48], "MODEL.YOLACT.NUM_CLASSES", NUM_CLASSES,
        "MODEL.YOLACT.CHANNELS", 16, "MODEL.YOLACT.PROTOTYPE_NET.CHANNELS", 16, "MODEL.YOLACT.NUM_PROTOTYPES", 8,
        "MODEL.YOLACT.SQUARE_ANCHORS", False, "DATALOADER.NUM_WORKERS", 0,
    ]  # fmt: skip


# YOLACT++ needs prototypes of 63 cells.
PLUS = (
    "MODEL.YOLACT.MASK_IOU_ON", True, "INPUT.SQUARE_SIZE", 256, "MODEL.BACKBONE.NAME", "build_resnet_dcn_backbone",
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, True, True, True], "MODEL.RESNETS.DEFORM_MODULATED", True,
    "MODEL.YOLACT.ANCHOR_SIZES", [16, 32, 64, 96, 160], "MODEL.YOLACT.ANCHOR_SCALES", [1.0, 1.26, 1.587],
)  # fmt: skip


def tiny_yolact_cfg(*opts):
    """Return the config, with KEY, VALUE, ... on top."""
    return load_config("yolact/yolact_resnet50", [*tiny_opts(), *opts])


def tiny_yolact(*opts, seed: int = 0) -> nn.Module:
    """Return the model in eval mode, with random weights."""
    torch.manual_seed(seed)
    return build_model(tiny_yolact_cfg(*opts)).eval()


def spread_scores(model: nn.Module) -> nn.Module:
    """Let the random scores and IoUs differ more, in place, and return the model."""
    torch.manual_seed(1)
    nn.init.normal_(model.head.cls_score.weight, std=0.1)
    if model.mask_iou_head is not None:
        nn.init.constant_(model.mask_iou_head.predictor.bias, 0.5)
    return model

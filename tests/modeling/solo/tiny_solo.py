"""SOLO models that are small enough for tests: a ResNet-18 with a pyramid of 16 channels, five small grids."""

import torch
from detectron2.modeling import build_model
from torch import nn

from sparseinst.config import load_config

NUM_CLASSES = 3
GRIDS = [10, 8, 6, 4, 3]
RANGES = [[1, 24], [12, 48], [24, 96], [48, 192], [96, 2048]]
# Architecture, head and deformable convolutions of each variant.
VARIANTS = {
    "solo": ("SOLO", "SOLOHead", ""),
    "decoupled": ("SOLO", "DecoupledSOLOHead", ""),
    "decoupled_light": ("SOLO", "DecoupledSOLOLightHead", ""),
    "decoupled_light_dcn": ("SOLO", "DecoupledSOLOLightHead", "last"),
    "solov2": ("SOLOv2", "SOLOv2Head", ""),
    "solov2_dcn": ("SOLOv2", "SOLOv2Head", "all"),
}


def tiny_opts(variant: str) -> list:
    """Return KEY VALUE overrides of configs/solo/Base-SOLO.yaml."""
    architecture, head, deform = VARIANTS[variant]
    node = f"MODEL.{architecture.upper()}"
    opts = [
        "MODEL.META_ARCHITECTURE", architecture, "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "",
        "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.NORM", "BN",
        "MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.FPN.OUT_CHANNELS", 16,
        "INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MIN_SIZE_TEST", 64, "DATALOADER.NUM_WORKERS", 0,
        f"{node}.NUM_CLASSES", NUM_CLASSES, f"{node}.NUM_GRIDS", GRIDS, f"{node}.SCALE_RANGES", RANGES,
        f"{node}.NUM_CONVS", 2, f"{node}.CHANNELS", 32, f"{node}.HEAD", head, f"{node}.DEFORM", deform,
        f"{node}.DEFORM_MODULATED", deform == "all",
    ]  # fmt: skip
    if architecture == "SOLOv2":
        opts += [f"{node}.KERNEL_DIM", 32, f"{node}.MASK_FEATURES.CHANNELS", 32, f"{node}.MASK_FEATURES.DEFORM", deform]
    return opts


def tiny_solo_cfg(variant: str, *opts):
    """Return the config of a variant, with KEY, VALUE, ... on top."""
    return load_config("solo/Base-SOLO", [*tiny_opts(variant), *opts])


def tiny_solo(variant: str, *opts, seed: int = 0) -> nn.Module:
    """Return the model in eval mode, with random weights whose masks and scores differ from one another."""
    torch.manual_seed(seed)
    return spread_predictions(build_model(tiny_solo_cfg(variant, *opts)).eval())


def spread_predictions(model: nn.Module) -> nn.Module:
    """Draw random weights of the heads whose masks and scores differ from one another, in place; return the model."""
    for name, parameter in model.head.named_parameters():
        if name.endswith("weight") and parameter.dim() == 4:
            nn.init.kaiming_normal_(parameter)
        if "pred" in name and name.endswith("bias"):
            nn.init.constant_(parameter, -1.0 if "cate" in name else 0.0)
    if model.mask_feature_head is not None:
        for parameter in model.mask_feature_head.parameters():
            if parameter.dim() == 4:
                nn.init.kaiming_normal_(parameter)
    return model

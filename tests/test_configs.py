"""The published configs, each at its full width: build, train a step, infer, save, load, optimize."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from sparseinst import add_sparse_inst_config, get_config_file
from sparseinst.engine.optimizer import build_optimizer
from sparseinst.runtime.rewrites import winograd
from tests.parity import filling
from tests.runtime.optimized import assert_optimized_equals
from tests.saved_model import no_random_weights, save_and_load
from tests.tiny_model import random_input

PUBLISHED = [
    "sparse_inst_r50_base",
    "sparse_inst_r50vd_base",
    "sparse_inst_r50_giam",
    "sparse_inst_r50_giam_soft",
    "sparse_inst_r50_giam_aug",
    "sparse_inst_r50_giam_fp16",
    "sparse_inst_r50_dcn_giam_aug",
    "sparse_inst_r50vd_giam",
    "sparse_inst_r50vd_giam_aug",
    "sparse_inst_r50vd_dcn_giam",
    "sparse_inst_r50vd_dcn_giam_aug",
    "sparse_inst_r101_giam",
    "sparse_inst_r101_dcn_giam",
    "sparse_inst_cspdarknet53_giam",
    "sparse_inst_darknet53_giam",
    "sparse_inst_pvt_b1_giam",
    "sparse_inst_pvt_b2_li_giam",
]
# Configs of the same MODEL and optimizer: the step runs on one of them.
SAME_MODEL = {
    "sparse_inst_r50_giam_aug": "sparse_inst_r50_giam",
    "sparse_inst_r50_giam_fp16": "sparse_inst_r50_giam",
    "sparse_inst_r50vd_giam_aug": "sparse_inst_r50vd_giam",
    "sparse_inst_r50vd_dcn_giam_aug": "sparse_inst_r50vd_dcn_giam",
}
# Configs that differ from another one in the backbone's depth and weights alone: the step runs on one R101.
OF_ANOTHER_DEPTH = {"sparse_inst_r101_giam": "sparse_inst_r50_giam"}
STEPPED = [config for config in PUBLISHED if config not in SAME_MODEL and config not in OF_ANOTHER_DEPTH]


def load(config):
    cfg = get_cfg()
    add_sparse_inst_config(cfg)
    cfg.merge_from_file(get_config_file(config))
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def test_all_published_configs_are_there():
    assert len(set(PUBLISHED)) == 17
    for config in PUBLISHED:
        get_config_file(config)


@pytest.mark.parametrize("config", PUBLISHED)
def test_what_a_name_promises(config):
    cfg = load(config)
    assert cfg.OUTPUT_DIR == f"output/{config}"
    assert cfg.INPUT.CROP.ENABLED == config.endswith("_aug") == (cfg.INPUT.MASK_FORMAT == "polygon")
    if config.endswith("_aug"):
        assert cfg.INPUT.CROP.TYPE == "absolute_range" and tuple(cfg.INPUT.CROP.SIZE) == (384, 600)
    assert cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE == [False, False, *["dcn" in config] * 2]
    assert cfg.SOLVER.AMP.ENABLED == config.endswith("_fp16")
    if "r101" in config:
        assert cfg.MODEL.RESNETS.DEPTH == 101 and cfg.MODEL.WEIGHTS.endswith("R-101.pkl")


@pytest.mark.parametrize("config", PUBLISHED)
def test_weights_are_those_of_the_backbone(config):
    cfg = load(config)
    scheme, _, name = cfg.MODEL.WEIGHTS.partition("://")
    if scheme == "timm":
        timm = pytest.importorskip("timm", reason="the package timm is not installed (pip install 'sparseinst[timm]')")
        assert name in timm.list_pretrained()
        with torch.device("meta"):
            state = timm.create_model(name.split(".")[0]).state_dict()
        expected = [
            tuple(value.shape)
            for tensor, value in state.items()
            if not tensor.startswith(("head.", "fc.")) and not tensor.endswith("num_batches_tracked")
        ]
        found = [
            tuple(value.shape)
            for tensor, value in build_model(cfg).backbone.state_dict().items()
            if "conv2_offset" not in tensor and not tensor.endswith("num_batches_tracked")
        ]
        assert sorted(found) == sorted(expected)
    else:
        assert scheme == "detectron2" and name.startswith("ImageNetPretrained/torchvision/R-")


@pytest.mark.parametrize("pair", [*SAME_MODEL.items(), *OF_ANOTHER_DEPTH.items()], ids=lambda pair: pair[0])
def test_configs_of_the_same_model(pair):
    cfg, other = map(load, pair)
    cfg.SOLVER.AMP.ENABLED = False
    if pair[0] in OF_ANOTHER_DEPTH:
        cfg.MODEL.DEVICE = "meta"
        assert len(build_model(cfg).backbone.res4) == 23
        cfg.MODEL.DEVICE = other.MODEL.DEVICE
        cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.WEIGHTS = other.MODEL.RESNETS.DEPTH, other.MODEL.WEIGHTS
    assert (cfg.MODEL, cfg.SOLVER) == (other.MODEL, other.SOLVER)


@pytest.mark.parametrize("config", STEPPED)
def test_a_step_an_answer_and_a_checkpoint(config, tmp_path, monkeypatch):
    torch.manual_seed(0)
    cfg = load(config)
    with no_random_weights():
        model = build_model(cfg)
    # As at first they are, norms of zero end residual branches: nothing behind them would have a gradient.
    model.load_state_dict(
        {
            name: torch.from_numpy(filling.tensor(name, tuple(value.shape), 0.6))
            for name, value in model.state_dict().items()
        }
    )
    inputs = [random_input(64, 96, num_instances=3), random_input(50, 90, num_instances=2, seed=1)]
    optimizer = build_optimizer(cfg, model)
    losses = model.train()(inputs)
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad, name  # FREEZE_AT is 0
        assert torch.isfinite(parameter.grad).all(), name
        # A number added to all logits of a softmax changes nothing.
        assert parameter.grad.any() or name.endswith("softmax_bias"), name
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), name
        assert not torch.equal(parameter, before[name]) or name.endswith("softmax_bias"), name

    x = {**inputs[1], "height": 100, "width": 180}
    model.zero_grad()
    save_and_load(model, x, tmp_path)

    # Images as small as these would never use Winograd's algorithm.
    monkeypatch.setattr(winograd, "MIN_TILES", 1)
    assert_optimized_equals(cfg, model)

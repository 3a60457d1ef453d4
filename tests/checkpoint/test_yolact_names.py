"""Published files of YOLACT and YOLACT++ in models of the configs."""

import logging
from functools import cache
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from sparseinst.checkpoint import (
    SparseInstCheckpointer,
    checkpointer_from_config,
    convert,
    describe_names,
    measure_coverage,
)
from sparseinst.checkpoint.published import CHECKPOINTS, terms_of_use
from sparseinst.config import load_config
from tests.modeling.yolact.tiny_yolact import tiny_yolact

STATE_DICTS = Path(__file__).resolve().parents[1] / "state_dicts" / "yolact"
CONFIGS = {
    "yolact_r50": "yolact_resnet50",
    "yolact_r101": "yolact_base",
    "yolact_r101_400": "yolact_im400",
    "yolact_r101_700": "yolact_im700",
    "yolact_darknet53": "yolact_darknet53",
    "yolact_plus_r50": "yolact_plus_resnet50",
    "yolact_plus_r101": "yolact_plus_base",
}


def read(stem):
    """The tensors of a published file, without values."""
    state = {}
    for line in (STATE_DICTS / f"{stem}.txt").read_text().splitlines():
        name, _, rest = line.partition(" ")
        shape, _, dtype = rest.rpartition(" ")
        size = [int(number) for number in shape.strip("()").split(",") if number]
        state[name] = torch.empty(size, dtype=getattr(torch, dtype), device="meta")
    return state


@cache
def model(config):
    """A model of a config without values."""
    return build_model(load_config(f"yolact/{config}", ["MODEL.DEVICE", "meta"])).eval()


@pytest.mark.parametrize("stem", CONFIGS)
def test_official_files_fit_exactly(stem):
    state, target = read(stem), model(CONFIGS[stem]).state_dict()
    # What old files have besides.
    state |= {
        "backbone.layer1.0.conv1.weight": torch.zeros(1),
        "fpn.downsample_layers.2.weight": torch.zeros(1),
        "fpn.downsample_layers.3.bias": torch.zeros(1),
    }
    converted = convert(state, target)
    coverage = measure_coverage("file.pth", converted, target)
    assert (coverage.missing, coverage.left_over, coverage.classifier, coverage.mismatched) == ([], [], [], [])
    assert describe_names(state).startswith("YOLACT of the official code")
    # Each file tensor goes to one place, and only the biases of deformable convolutions are folded.
    folded = {name for name in state if name.endswith(".conv2.bias")}
    assert len(folded) == {"yolact_plus_r50": 13, "yolact_plus_r101": 11}.get(stem, 0)
    used = set(converted.origins.values())
    assert folded.isdisjoint(used) and len(used) == len(converted.origins) == len(state) - 3 - len(folded)


@pytest.mark.parametrize(
    ("stem", "pairs"),
    [
        (
            "yolact_plus_r50",
            {
                "backbone.bottom_up.stem.conv1.norm.weight": "backbone.bn1.weight",
                "backbone.bottom_up.res2.0.shortcut.norm.bias": "backbone.layers.0.0.downsample.1.bias",
                "backbone.bottom_up.res4.5.conv3.weight": "backbone.layers.2.5.conv3.weight",
                "backbone.bottom_up.res5.2.conv2_offset.bias": "backbone.layers.3.2.conv2.conv_offset_mask.bias",
                "backbone.fpn_lateral5.weight": "fpn.lat_layers.0.weight",
                "backbone.fpn_lateral3.bias": "fpn.lat_layers.2.bias",
                "backbone.fpn_output5.weight": "fpn.pred_layers.0.weight",
                "backbone.top_block.p7.bias": "fpn.downsample_layers.1.bias",
                "protonet.conv1.weight": "proto_net.0.weight",
                "protonet.conv3.weight": "proto_net.4.weight",
                "protonet.conv4.weight": "proto_net.8.weight",
                "protonet.predictor.weight": "proto_net.10.weight",
                "head.tower.0.weight": "prediction_layers.0.upfeature.0.weight",
                "head.coeff_pred.bias": "prediction_layers.0.mask_layer.bias",
                "sem_seg_head.predictor.weight": "semantic_seg_conv.weight",
                "mask_iou_head.conv5.weight": "maskiou_net.maskiou_net.8.weight",
                "mask_iou_head.predictor.bias": "maskiou_net.maskiou_net.10.bias",
            },
        ),
        (
            "yolact_darknet53",
            {
                "backbone.bottom_up.stem.conv1.conv.weight": "backbone._preconv.0.weight",
                "backbone.bottom_up.stem.conv1.bn.running_var": "backbone._preconv.1.running_var",
                "backbone.bottom_up.stages.2.conv_down.bn.bias": "backbone.layers.2.0.1.bias",
                "backbone.bottom_up.stages.3.blocks.0.conv1.conv.weight": "backbone.layers.3.1.conv1.0.weight",
                "backbone.bottom_up.stages.4.blocks.3.conv2.bn.weight": "backbone.layers.4.4.conv2.1.weight",
            },
        ),
    ],
)
def test_origins(stem, pairs):
    origins = convert(read(stem), model(CONFIGS[stem]).state_dict()).origins
    assert {name: origins[name] for name in pairs} == pairs


def test_the_background_goes_behind_the_classes():
    target = tiny_yolact().state_dict()
    num_classes = 3
    state = {
        "backbone.conv1.weight": torch.zeros(1),
        "proto_net.0.weight": torch.zeros(1),
        "prediction_layers.0.bbox_layer.bias": torch.zeros(12),
        "prediction_layers.0.conf_layer.weight": torch.zeros(12, 16, 3, 3),
        # Of three anchors, each background, then the classes.
        "prediction_layers.0.conf_layer.bias": torch.tensor([90.0, 0, 1, 2, 91, 10, 11, 12, 92, 20, 21, 22]),
    }
    bias = convert(state, target).tensors["head.cls_score.bias"]
    assert bias.view(3, num_classes + 1).tolist() == [[0, 1, 2, 90], [10, 11, 12, 91], [20, 21, 22, 92]]
    # Ours stay as they are.
    assert torch.equal(convert(target, target).tensors["head.cls_score.bias"], target["head.cls_score.bias"])


def test_a_folded_bias_changes_no_number():
    torch.manual_seed(0)
    features, bias = torch.randn(2, 4, 5, 5), torch.randn(4)
    norm = torch.nn.BatchNorm2d(4).eval()
    torch.nn.init.normal_(norm.running_mean)
    expected = norm(features + bias[:, None, None])
    tiny = tiny_yolact("MODEL.BACKBONE.NAME", "build_resnet_dcn_backbone").state_dict()
    state = {
        "conv1.weight": torch.zeros(1), "layers.0.0.conv1.weight": torch.zeros(1),
        "layers.1.0.conv2.bias": bias, "layers.1.0.bn2.running_mean": norm.running_mean,
    }  # fmt: skip
    converted = convert(state, tiny).tensors
    norm.running_mean = converted["backbone.bottom_up.res3.0.conv2.norm.running_mean"]
    assert "backbone.bottom_up.res3.0.conv2.bias" not in converted
    assert torch.allclose(norm(features), expected, atol=1e-6)


def test_another_model_takes_the_backbone_alone():
    target = build_model(load_config("sparse_inst_r50_giam", ["MODEL.DEVICE", "meta"])).state_dict()
    coverage = measure_coverage("file.pth", convert(read("yolact_r50"), target), target)
    assert coverage.backbone_share == 1 and coverage.left_over


def test_values_arrive_by_the_checkpointer(tmp_path):
    # A file of the tiny model in published names: the backbone is torchvision's, as in the initial weights.
    source, target = tiny_yolact(seed=0), tiny_yolact(seed=1)
    names = {
        "head.tower.0": "prediction_layers.0.upfeature.0", "head.bbox_pred": "prediction_layers.0.bbox_layer",
        "head.coeff_pred": "prediction_layers.0.mask_layer", "head.cls_score": "prediction_layers.0.conf_layer",
        "protonet.predictor": "proto_net.10", "protonet.conv4": "proto_net.8", "protonet.conv3": "proto_net.4",
        "protonet.conv2": "proto_net.2", "protonet.conv1": "proto_net.0", "sem_seg_head.predictor": "semantic_seg_conv",
        "backbone.top_block.p6": "fpn.downsample_layers.0", "backbone.top_block.p7": "fpn.downsample_layers.1",
        **{f"backbone.fpn_lateral{level}": f"fpn.lat_layers.{5 - level}" for level in (3, 4, 5)},
        **{f"backbone.fpn_output{level}": f"fpn.pred_layers.{5 - level}" for level in (3, 4, 5)},
        "backbone.bottom_up.stem.conv1.norm": "backbone.bn1", "backbone.bottom_up.stem.conv1": "backbone.conv1",
        **{f".conv{n}.norm.": f".bn{n}." for n in (1, 2)}, ".shortcut.norm.": ".downsample.1.",
        ".shortcut.": ".downsample.0.",
        **{f"backbone.bottom_up.res{n}": f"backbone.layers.{n - 2}" for n in (2, 3, 4, 5)},
    }  # fmt: skip
    state = {}
    for name, value in source.state_dict().items():
        if name.startswith("head.cls_score."):
            value = value.unflatten(0, (3, 4)).roll(1, dims=1).flatten(0, 1)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        state[name] = value
    torch.save(state, tmp_path / "yolact_54_800000.pth")
    SparseInstCheckpointer(target).load(str(tmp_path / "yolact_54_800000.pth"))
    for name, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[name]), name


def test_a_file_of_other_classes_starts_a_training(tmp_path, caplog):
    torch.save(tiny_yolact("MODEL.YOLACT.NUM_CLASSES", 5).state_dict(), tmp_path / "five.pth")
    with caplog.at_level(logging.WARNING):
        SparseInstCheckpointer(tiny_yolact(), min_backbone_coverage=0.9).resume_or_load(
            str(tmp_path / "five.pth"), resume=False
        )
    skipped = [record.getMessage() for record in caplog.records if "Not loaded" in record.getMessage()]
    assert len(skipped) == 4 and all("NUM_CLASSES" in text for text in skipped)
    with pytest.raises(ValueError, match="NUM_CLASSES"):
        SparseInstCheckpointer(tiny_yolact()).load(str(tmp_path / "five.pth"))


def test_weights_of_another_setting_are_told(tmp_path, caplog):
    cfg = load_config("yolact/yolact_darknet53", ["MODEL.DEVICE", "meta"])
    network = model("yolact_darknet53")
    checkpointer = checkpointer_from_config(cfg, network)
    converted = convert(read("yolact_darknet53"), network.state_dict())
    checkpointer.coverage = measure_coverage("file.pth", converted, network.state_dict())
    for mean, is_told in ((0.0, False), (120.0, True)):
        network.pixel_mean = torch.full((3, 1, 1), mean)
        with caplog.at_level(logging.WARNING):
            checkpointer._check_recipe(converted)
        assert ("MODEL.PIXEL_MEAN [0.0, 0.0, 0.0]" in caplog.text) == is_told


def test_addresses():
    addresses = {name: address for name, address in CHECKPOINTS.items() if name.startswith("yolact/")}
    assert addresses == {
        "yolact/yolact_resnet50": "hf://dbolya/yolact-resnet50/yolact_resnet50_54_800000.pth",
        "yolact/yolact_darknet53": "hf://dbolya/yolact-darknet53/yolact_darknet53_54_800000.pth",
        "yolact/yolact_base": "hf://dbolya/yolact-base/yolact_base_54_800000.pth",
        "yolact/yolact_im700": "hf://dbolya/yolact-im700/yolact_im700_54_800000.pth",
        "yolact/yolact_plus_resnet50": "hf://dbolya/yolact-plus-resnet50/yolact_plus_resnet50_54_800000.pth",
        "yolact/yolact_plus_base": "hf://dbolya/yolact-plus-base/yolact_plus_base_54_800000.pth",
    }
    assert not any(map(terms_of_use, addresses.values()))

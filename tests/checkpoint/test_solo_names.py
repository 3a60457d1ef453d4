"""Published files of SOLO and SOLOv2, under the names of three projects, in models of the configs."""

import logging
import re
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
from sparseinst.checkpoint import checkpointer as checkpointer_module
from sparseinst.checkpoint.entries import RAW, Weights
from sparseinst.checkpoint.files import WeightsFile
from sparseinst.config import load_config
from tests.checkpoint.sources import BackboneOnly

STATE_DICTS = Path(__file__).resolve().parents[1] / "state_dicts" / "solo"
OFFICIAL = sorted(path.stem for path in STATE_DICTS.glob("*solo*.txt") if not path.stem.startswith("adelaidet"))
TINY = [
    "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.FPN.OUT_CHANNELS", 32,
    "MODEL.SOLOV2.CHANNELS", 32, "MODEL.SOLOV2.NUM_CONVS", 1, "MODEL.SOLOV2.KERNEL_DIM", 32,
    "MODEL.SOLOV2.MASK_FEATURES.CHANNELS", 32, "MODEL.DEVICE", "cpu",
]  # fmt: skip


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
    return build_model(load_config(config, ["MODEL.DEVICE", "meta"])).eval()


@pytest.fixture
def load_stored(monkeypatch, tmp_path):
    """Load a published file, without values, by a checkpointer: a real file would be 200 MB."""
    path = tmp_path / "file.pth"
    path.touch()

    def load(checkpointer, stem):
        content = {"state_dict": read(stem)}
        monkeypatch.setattr(checkpointer_module, "read_weights_file", lambda *_: WeightsFile("PyTorch", content))
        sets = {RAW: Weights("state_dict", content["state_dict"], "the entry state_dict")}
        monkeypatch.setattr(checkpointer_module, "find_weight_sets", lambda *_: sets)
        monkeypatch.setattr(checkpointer_module, "count_nonfinite", lambda _: {})
        checkpointer.load(str(path))

    return load


def config_of(stem):
    return f"solov2/{stem}_3x" if stem.startswith("solov2") else f"solo/{stem}_3x"


def mmdetection_name(ours, heads):
    """mmdetection's name of a tensor of ours; written the other way around than the table."""
    name = ours.replace(".bottom_up.stem.conv1.norm.", ".bn1.").replace(".bottom_up.stem.", ".")
    name = re.sub(r"\.bottom_up\.res(\d)\.", lambda match: f".layer{int(match[1]) - 1}.", name)
    name = re.sub(r"\.conv(\d)\.norm\.", r".bn\1.", name) if name.startswith("backbone.layer") else name
    name = name.replace(".shortcut.norm.", ".downsample.1.").replace(".shortcut.", ".downsample.0.")
    name = name.replace(".conv2_offset.", ".conv2.conv_offset.")
    for part, theirs in (("lateral", "lateral_convs"), ("output", "fpn_convs")):
        name = re.sub(rf"backbone.fpn_{part}(\d)", lambda match: f"neck.{theirs}.{int(match[1]) - 2}.conv", name)  # noqa: B023
    if "_tower" in name or name.startswith("mask_feature_head."):
        owner, _, tensor = name.rpartition(".")
        part = {"norm": ".gn", "offset": ".conv.conv_offset"}.get(owner.rpartition(".")[2], ".conv")
        name = f"{owner.removesuffix('.norm').removesuffix('.offset')}{part}.{tensor}"
    for pattern, theirs in heads:
        name = re.sub(f"^{pattern}", theirs, name)
    return name


OFFICIAL_HEADS = (
    (r"head\.mask_tower", "bbox_head.ins_convs"),
    (r"head\.(kernel|cate)_tower", r"bbox_head.\1_convs"),
    (r"head\.mask_pred(_[xy])", r"bbox_head.dsolo_ins_list\1"),
    (r"head\.mask_pred", "bbox_head.solo_ins_list"),
    (r"head\.cate_pred", "bbox_head.CATE"),
    (r"head\.kernel_pred", "bbox_head.solo_kernel"),
    (r"mask_feature_head\.levels\.(\d)\.", r"mask_feat_head.convs_all_levels.\1.conv"),
    (r"mask_feature_head\.output", "mask_feat_head.conv_pred.0"),
)
MMDETECTION_HEADS = (
    (r"head\.mask_tower", "mask_head.mask_convs"),
    (r"head\.kernel_tower", "mask_head.kernel_convs"),
    (r"head\.cate_tower", "mask_head.cls_convs"),
    (r"head\.mask_pred", "mask_head.conv_mask_list"),
    (r"head\.cate_pred", "mask_head.conv_cls"),
    (r"head\.kernel_pred", "mask_head.conv_kernel"),
    (r"mask_feature_head\.levels\.(\d)\.", r"mask_head.mask_feature_head.convs_all_levels.\1.conv"),
    (r"mask_feature_head\.output", "mask_head.mask_feature_head.conv_pred"),
)


def assert_exact(state, config):
    """Nothing missing, nothing left over. Returns what was converted."""
    target = model(config).state_dict()
    converted = convert(state, target)
    coverage = measure_coverage("file.pth", converted, target)
    assert (coverage.missing, coverage.left_over, coverage.classifier) == ([], [], [])
    assert all(converted.tensors[name] is state[converted.origins[name]] for name in target)
    return converted


@pytest.mark.parametrize("stem", OFFICIAL)
def test_official_files_fit_exactly(stem):
    converted = assert_exact(read(stem), config_of(stem))
    assert converted.model_family == "SOLO or SOLOv2 of the official code"
    cate = "dsolo_cate" if stem.startswith("decoupled") else "solo_cate"
    for ours, origin in converted.origins.items():
        if not ours.endswith("num_batches_tracked"):
            assert origin == mmdetection_name(ours, OFFICIAL_HEADS).replace("CATE", cate)


def test_files_of_early_releases():
    # Offsets under the names of the first releases of mmdetection, and those of modulated convolutions.
    for stem, old, new in (
        ("solov2_light_512_dcn_r50", r"\.conv2\.conv_offset\.", ".conv2_offset."),
        ("solov2_r101_dcn", r"\.conv2\.conv_offset\.", ".conv2.conv_offset_mask."),
    ):
        assert_exact({re.sub(old, new, name): value for name, value in read(stem).items()}, config_of(stem))


def test_adelaidet_fits_exactly():
    state = read("adelaidet_solov2_r50")
    converted = assert_exact(state, "solov2/adelaidet_r50_3x")
    assert converted.model_family == "SOLOv2 of AdelaiDet"
    for ours, origin in (
        ("head.cate_tower.0.weight", "ins_head.cate_tower.0.weight"),
        ("head.cate_tower.3.norm.bias", "ins_head.cate_tower.10.bias"),
        ("head.kernel_tower.2.weight", "ins_head.kernel_tower.6.weight"),
        ("head.kernel_tower.2.norm.weight", "ins_head.kernel_tower.7.weight"),
        ("head.kernel_pred.bias", "ins_head.kernel_pred.bias"),
        ("mask_feature_head.levels.3.1.weight", "mask_head.convs_all_levels.3.conv1.0.weight"),
        ("mask_feature_head.levels.3.2.norm.bias", "mask_head.convs_all_levels.3.conv2.1.bias"),
        ("mask_feature_head.output.norm.weight", "mask_head.conv_pred.1.weight"),
        ("backbone.fpn_lateral5.weight", "backbone.fpn_lateral5.weight"),
    ):
        assert converted.origins[ours] == origin


@pytest.mark.parametrize("stem", ["solo_r50", "decoupled_solo_r50", "decoupled_solo_light_r50", "solov2_light_448_r18"])
def test_mmdetection_fits_exactly(stem):
    config = config_of(stem)
    state = {mmdetection_name(name, MMDETECTION_HEADS): value for name, value in model(config).state_dict().items()}
    state |= {"backbone.bn1.num_batches_tracked": torch.zeros(())}
    assert len(state) == len(model(config).state_dict()) + 1
    converted = assert_exact(state, config)
    assert converted.model_family == "SOLO or SOLOv2 of mmdetection"
    assert describe_names(state) == "SOLO or SOLOv2 of mmdetection; ResNet of torchvision or timm"


def test_another_model_takes_the_backbone_alone():
    sparse_inst = build_model(load_config("sparse_inst_r50_giam", ["MODEL.DEVICE", "meta"]))
    for stem in ("solo_r50", "adelaidet_solov2_r50"):
        target = sparse_inst.state_dict()
        coverage = measure_coverage("file.pth", convert(read(stem), target), target)
        assert coverage.backbone_share == 1 and coverage.left_over
        assert all(not name.startswith("backbone.") for name in coverage.missing)


@pytest.mark.parametrize(
    ("stem", "config", "keys"),
    [
        ("solov2_light_512_dcn_r50", "solov2/solov2_light_512_dcn_r50_3x", []),
        # v1 in v2 and back, deformable in ordinary and back.
        ("solov2_light_512_dcn_r50", "DEFORM_MODULATED", ["MODEL.RESNETS.DEFORM_MODULATED"]),
        ("solov2_light_512_dcn_r50", "HEAD_MODULATED", ["DEFORM_MODULATED of MODEL.SOLO or MODEL.SOLOV2"]),
        ("solov2_light_512_dcn_r50", "PLAIN", ["MODEL.RESNETS.DEFORM_ON_PER_STAGE", "DEFORM of MODEL.SOLO"]),
        ("solov2_light_448_r50", "solov2/solov2_light_512_dcn_r50_3x",
         ["MODEL.RESNETS.DEFORM_ON_PER_STAGE", "NUM_CONVS of MODEL.SOLO"]),
        ("solo_r50", "solov2/solov2_r50_3x", ["MODEL.META_ARCHITECTURE"]),
        ("solo_r50", "solo/decoupled_solo_r50_3x", ["MODEL.SOLO.HEAD"]),
        ("solov2_light_448_r50", "solov2/solov2_r50_3x", ["CHANNELS of MODEL.SOLO"]),
    ],
)  # fmt: skip
def test_files_of_another_kind_name_the_key(stem, config, keys, load_stored, caplog):
    deformable = "solov2/solov2_light_512_dcn_r50_3x"
    opts = {
        "DEFORM_MODULATED": ["MODEL.RESNETS.DEFORM_MODULATED", True],
        "HEAD_MODULATED": ["MODEL.SOLOV2.DEFORM_MODULATED", True],
        "PLAIN": ["MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False] * 4, "MODEL.SOLOV2.DEFORM", ""],
    }.get(config)
    cfg = load_config(deformable if opts else config, [*(opts or ()), "MODEL.DEVICE", "meta"])
    network = build_model(cfg)
    texts = []
    try:
        with caplog.at_level(logging.WARNING):
            load_stored(SparseInstCheckpointer(network), stem)
    except ValueError as error:
        texts.append(str(error))
        assert "\n" not in str(error)
    texts += [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert bool(texts) == bool(keys)
    for key in keys:
        assert any(key in text for text in texts), (key, texts)


def test_offsets_without_a_place_are_told_at_the_start_of_a_training(tmp_path, caplog):
    opts = ["MODEL.BACKBONE.NAME", "build_resnet_dcn_fpn_backbone", "MODEL.SOLOV2.DEFORM", "last"]
    opts += ["MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, False, False, True]]
    source, target = (build_model(load_config("solov2/solov2_r50_3x", [*TINY, *each])) for each in (opts, []))
    torch.save(source.state_dict(), tmp_path / "deformable.pth")
    with caplog.at_level(logging.WARNING):
        SparseInstCheckpointer(target, min_backbone_coverage=0.9).resume_or_load(
            str(tmp_path / "deformable.pth"), resume=False
        )
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "MODEL.RESNETS.DEFORM_ON_PER_STAGE" in warning and "DEFORM of MODEL.SOLO or MODEL.SOLOV2" in warning
    assert "8, the first: backbone.bottom_up.res5.0.conv2_offset.weight" in warning


@pytest.mark.parametrize(
    ("stem", "config", "opts", "keys"),
    [
        ("adelaidet_solov2_r50", "solov2/adelaidet_r50_3x", [], []),
        ("solov2_r50", "solov2/solov2_r50_3x", [], []),
        ("adelaidet_solov2_r50", "solov2/solov2_r50_3x", [],
         ["INPUT.FORMAT BGR", "MODEL.PIXEL_MEAN [103.53, 116.28, 123.675]", "MODEL.PIXEL_STD [1.0, 1.0, 1.0]",
          "MODEL.RESNETS.STRIDE_IN_1X1 True"]),
        ("solov2_r50", "solov2/adelaidet_r50_3x", [],
         ["INPUT.FORMAT RGB", "MODEL.PIXEL_MEAN [123.675", "MODEL.PIXEL_STD [58.395", "STRIDE_IN_1X1 False"]),
        ("adelaidet_solov2_r50", "solov2/adelaidet_r50_3x", ["INPUT.FORMAT", "RGB"], ["INPUT.FORMAT BGR"]),
    ],
)  # fmt: skip
def test_weights_of_another_setting_are_told_once(stem, config, opts, keys, load_stored, caplog):
    cfg = load_config(config, [*opts, "MODEL.DEVICE", "meta"])
    network = build_model(cfg)
    network.pixel_mean, network.pixel_std = (
        torch.tensor(value)[:, None, None] for value in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    )
    with caplog.at_level(logging.WARNING):
        load_stored(checkpointer_from_config(cfg, network), stem)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == bool(keys)
    for key in ("INPUT.FORMAT", "PIXEL_MEAN", "PIXEL_STD", "STRIDE_IN_1X1"):
        assert any(key in expected for expected in keys) == any(key in text for text in warnings)
    assert all(key in warnings[0] for key in keys)


@pytest.mark.parametrize("stem", ["solov2_light_448_r18", "solov2_light_512_dcn_r50", "solov2_r101_dcn"])
def test_imagenet_weights_fill_the_backbone(stem):
    # A pyramid and offsets have no ImageNet weights; a training of a published config starts nevertheless.
    target = model(config_of(stem)).state_dict()
    inner = {
        name.removeprefix("backbone.bottom_up."): value
        for name, value in target.items()
        if "bottom_up" in name and "offset" not in name
    }
    assert measure_coverage("file.pth", convert(inner, target), target).backbone_share == 1
    del inner["stem.conv1.weight"]
    assert measure_coverage("file.pth", convert(inner, target), target).backbone_share < 1


def test_values_arrive(tmp_path):
    source = build_model(load_config("solov2/solov2_r50_3x", TINY))
    for index, tensor in enumerate(source.state_dict().values()):
        if tensor.is_floating_point():
            tensor.fill_(index)
    state = {mmdetection_name(name, MMDETECTION_HEADS): value for name, value in source.state_dict().items()}
    torch.save({"meta": {}, "state_dict": state}, tmp_path / "mmdetection.pth")
    target = build_model(load_config("solov2/solov2_r50_3x", TINY))
    SparseInstCheckpointer(target).load(str(tmp_path / "mmdetection.pth"))
    for name, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[name]), name


def test_a_backbone_is_not_taken_for_a_model():
    target = BackboneOnly(model("solo/solo_r50_3x").backbone).state_dict()
    assert measure_coverage("file.pth", convert(read("solo_r50"), target), target).backbone_share == 1

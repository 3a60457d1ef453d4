"""Config files with the keys of AdelaiDet's SOLOv2: one warning a file translates them, or one line refuses them."""

import logging

import pytest
import yaml

from sparseinst.config import get_config_file, load_config
from sparseinst.config.renamed_keys import renamed_keys

# A user's file: every key of MODEL.SOLOV2, each with a value that is not its default.
ADELAIDET = """
MODEL:
  WEIGHTS: "SOLOv2_R50_3x.pth"
  SOLOV2:
    INSTANCE_IN_FEATURES: ["p2", "p3", "p4", "p5"]
    FPN_INSTANCE_STRIDES: [8, 8, 16, 32]
    FPN_SCALE_RANGES: ((1, 56), (28, 112), (56, 224), (112, 448))
    SIGMA: 0.25
    INSTANCE_IN_CHANNELS: 128
    INSTANCE_CHANNELS: 64
    NUM_INSTANCE_CONVS: 2
    USE_DCN_IN_INSTANCE: True
    TYPE_DCN: "DCNv2"
    NUM_GRIDS: [20, 18, 12, 8]
    NUM_CLASSES: 3
    NUM_KERNELS: 32
    NORM: "none"
    USE_COORD_CONV: True
    PRIOR_PROB: 0.02
    MASK_IN_FEATURES: ["p2", "p3", "p4"]
    MASK_IN_CHANNELS: 128
    MASK_CHANNELS: 48
    NUM_MASKS: 32
    NMS_PRE: 400
    SCORE_THR: 0.2
    UPDATE_THR: 0.06
    MASK_THR: 0.4
    MAX_PER_IMG: 50
    NMS_TYPE: "mask"
    NMS_KERNEL: "linear"
    NMS_SIGMA: 3
    LOSS:
      FOCAL_USE_SIGMOID: True
      FOCAL_ALPHA: 0.3
      FOCAL_GAMMA: 1.5
      FOCAL_WEIGHT: 2.0
      DICE_WEIGHT: 4.0
"""
TRANSLATED = {
    "NUM_CLASSES": 3, "HEAD": "SOLOv2Head", "IN_FEATURES": ["p2", "p3", "p4", "p5"], "STRIDES": [8, 8, 16, 32],
    "NUM_GRIDS": [20, 18, 12, 8], "SCALE_RANGES": [[1, 56], [28, 112], [56, 224], [112, 448]], "SIGMA": 0.25,
    "NUM_CONVS": 2, "CHANNELS": 64, "NORM": "", "DEFORM": "all", "DEFORM_MODULATED": True, "PRIOR_PROB": 0.02,
    "LOSS": {
        "NAME": "SOLOCriterion", "CATE_WEIGHT": 2.0, "MASK_WEIGHT": 4.0, "FOCAL_ALPHA": 0.3, "FOCAL_GAMMA": 1.5,
        "GLOBAL_NORMALIZATION": False, "SEM_SEG_WEIGHT": 0.0,
    },
    "SCORE_THRESHOLD": 0.2, "MASK_THRESHOLD": 0.4,
    "NMS": {
        "TYPE": "mask", "KERNEL": "linear", "SIGMA": 3.0, "PRE": 400, "UPDATE_THRESHOLD": 0.06, "IOU_THRESHOLD": 0.5,
    },
    "MAX_DETECTIONS": 50, "KERNEL_DIM": 32,
    "MASK_FEATURES": {
        "NAME": "MaskFeatureHead", "IN_FEATURES": ["p2", "p3", "p4"], "CHANNELS": 48, "DEFORM": "",
    },
}  # fmt: skip


def write(path, text, base="solov2/adelaidet_r50_3x"):
    path.write_text(f"_BASE_: {get_config_file(base)}\n{text}", encoding="utf-8")
    return str(path)


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if "renamed" in record.getMessage()]


def test_all_keys_of_adelaidet(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        cfg = load_config(write(tmp_path / "mine.yaml", ADELAIDET))
    (warning,) = warnings(caplog)
    assert yaml.safe_load(cfg.MODEL.SOLOV2.dump()) == TRANSLATED
    for text in (
        "MODEL.SOLOV2.NMS_PRE -> MODEL.SOLOV2.NMS.PRE", "MODEL.SOLOV2.NORM none -> MODEL.SOLOV2.NORM ''",
        "MODEL.SOLOV2.USE_DCN_IN_INSTANCE True -> MODEL.SOLOV2.DEFORM 'all'",
        "MODEL.SOLOV2.MASK_IN_CHANNELS -> removed (it is the width",
    ):  # fmt: skip
        assert text in warning
    # Written anew it needs no translation.
    (tmp_path / "dumped.yaml").write_text(cfg.dump())
    caplog.clear()
    again = load_config(str(tmp_path / "dumped.yaml"))
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump()) and not warnings(caplog)


def test_defaults_of_adelaidet_are_ours(tmp_path):
    text = """
MODEL:
  SOLOV2:
    INSTANCE_IN_FEATURES: ["p2", "p3", "p4", "p5", "p6"]
    FPN_INSTANCE_STRIDES: [8, 8, 16, 32, 32]
    FPN_SCALE_RANGES: ((1, 96), (48, 192), (96, 384), (192, 768), (384, 2048))
    INSTANCE_IN_CHANNELS: 256
    INSTANCE_CHANNELS: 512
    NUM_INSTANCE_CONVS: 4
    USE_DCN_IN_INSTANCE: False
    TYPE_DCN: "DCN"
    NUM_KERNELS: 256
    NUM_MASKS: 256
    NORM: "GN"
    USE_COORD_CONV: True
    MASK_IN_FEATURES: ["p2", "p3", "p4", "p5"]
    MASK_CHANNELS: 128
    NMS_SIGMA: 2
    LOSS: {FOCAL_USE_SIGMOID: True, FOCAL_WEIGHT: 1.0, DICE_WEIGHT: 3.0}
"""
    assert load_config(write(tmp_path / "mine.yaml", text)).dump() == load_config("solov2/adelaidet_r50_3x").dump()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("USE_COORD_CONV: False", "MODEL.SOLOV2.USE_COORD_CONV is 'False'; it must be True"),
        ("LOSS: {FOCAL_USE_SIGMOID: False}", "LOSS.FOCAL_USE_SIGMOID is 'False'; it must be True"),
        ("TYPE_DCN: DCNv3", 'MODEL.SOLOV2.TYPE_DCN is .DCNv3.; it must be "DCN" or "DCNv2"'),
        ("NUM_KERNELS: 256\n    NUM_MASKS: 128", "NUM_KERNELS is 256 and .*NUM_MASKS is 128.*KERNEL_DIM.*equal"),
        ("FPN_SCALE_RANGES: ((1, 96", "FPN_SCALE_RANGES is "),
        ("NMS_SIGMA: [2]", "NMS_SIGMA is "),
    ],
)
def test_values_without_an_equivalent_are_refused(tmp_path, text, message):
    path = write(tmp_path / "mine.yaml", f"MODEL:\n  SOLOV2:\n    {text}\n")
    with pytest.raises(ValueError, match=rf"mine.yaml: .*{message}") as error:
        load_config(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "key", ["DECODER.LOCATION_PRIOR", "DECODER.MASK_WINDOW", "DECODER.IAM_INIT_STD", "LOSS.IAM_WEIGHT", "MATCHER.GAMMA"]
)
def test_removed_options_of_learned_maps(tmp_path, key, caplog):
    group, name = key.split(".")
    text = f"MODEL:\n  META_ARCHITECTURE: SparseInst\n  SPARSE_INST:\n    {group}:\n      {name}: "
    load_config(write(tmp_path / "off.yaml", f"{text}0.0\n"))
    assert f"MODEL.SPARSE_INST.{key} -> removed" in caplog.text
    if name != "IAM_INIT_STD":
        with pytest.raises(ValueError, match=f"on.yaml: MODEL.SPARSE_INST.{key} is '0.8'; the option was removed"):
            load_config(write(tmp_path / "on.yaml", f"{text}0.8\n"))


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("MODEL.SOLOV2.SCORE_THR", "renamed: set MODEL.SOLOV2.SCORE_THRESHOLD"),
        ("MODEL.SOLOV2.USE_COORD_CONV", "removed: the heads always read the coordinates"),
    ],
)
def test_a_command_line_needs_the_new_keys(key, text):
    with pytest.raises(ValueError, match=f"{key} was {text}"):
        load_config("solov2/solov2_r50_3x", [key, "0.3"])
    assert load_config("solov2/solov2_r50_3x", ["MODEL.SOLOV2.NORM", "BN"]).MODEL.SOLOV2.NORM == "BN"


def test_new_keys_exist():
    cfg = load_config("Base-SparseInst")
    for old, row in renamed_keys().items():
        if row.new:
            cfg.merge_from_list([row.new, eval(f"cfg.{row.new}", {"cfg": cfg})])
        assert row.new or row.reason, old


def test_an_old_and_a_new_key_with_different_values(tmp_path):
    path = tmp_path / "both.yaml"
    path.write_text("_BASE_: ADELAIDET\nMODEL: {SOLOV2: {NMS_PRE: 300, NMS: {PRE: 400}}}\n".replace(
        "ADELAIDET", get_config_file("solov2/adelaidet_r50_3x")))  # fmt: skip
    with pytest.raises(ValueError, match="NMS.PRE is 400 and MODEL.SOLOV2.NMS_PRE is 300.*must be equal"):
        load_config(str(path))

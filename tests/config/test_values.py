"""Values outside of their ranges: refused by load_config, and by build_model where the config was made in Python."""

from functools import reduce
from importlib import import_module

import pytest
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from sparseinst.config import add_sparse_inst_config, check_value, check_values, get_config_file, load_config
from sparseinst.config.defaults import FAMILIES
from sparseinst.config.values import RANGES
from sparseinst.engine.optimizer import IMPLEMENTATIONS
from sparseinst.engine.trainer import AMP_DTYPES
from sparseinst.ops.mask_output import MASK_FORMATS
from sparseinst.runtime.optimize import PRECISIONS
from tests.tiny_model import tiny_cfg

OF_FAMILIES = {name: import_module(name).RANGES for name in FAMILIES}
ALL = {**RANGES, **{key: accepted for ranges in OF_FAMILIES.values() for key, accepted in ranges.items()}}
SPARSE_INST = "MODEL.SPARSE_INST."


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (f"{SPARSE_INST}MASK_THRESHOLD", "45.0"), (f"{SPARSE_INST}MASK_THRESHOLD", "1.0"),
        (f"{SPARSE_INST}CLS_THRESHOLD", "5.0"), (f"{SPARSE_INST}MAX_DETECTIONS", "-1"),
        (f"{SPARSE_INST}MASK_NMS_THRESHOLD", "-0.5"), (f"{SPARSE_INST}DECODER.NUM_CLASSES", "0"),
        (f"{SPARSE_INST}DECODER.NUM_MASKS", "-3"), (f"{SPARSE_INST}DECODER.INST.CONVS", "0"),
        (f"{SPARSE_INST}DECODER.SCALE_FACTOR", "0.0"), (f"{SPARSE_INST}DECODER.NORM", "BatchNorm"),
        (f"{SPARSE_INST}ENCODER.NUM_CHANNELS", "0"), (f"{SPARSE_INST}LOSS.CLASS_WEIGHT", "-2.0"),
        (f"{SPARSE_INST}MATCHER.ALPHA", "-1.0"), ("MODEL.PIXEL_STD", "[0.0, 1.0, 1.0]"), ("MODEL.PIXEL_STD", "[]"),
        ("MODEL.RESNETS.NORM", "BatchNorm"), ("MODEL.RESNETS.DEPTH", "51"), ("MODEL.BACKBONE.FREEZE_AT", "-1"),
        ("MODEL.OUTPUT.SCORE_THRESHOLD", "1.5"), ("MODEL.OUTPUT.MAX_MASK_GIB", "0.0"),
        ("MODEL.MIN_BACKBONE_COVERAGE", "90.0"), ("RUNTIME.PRECISION", "fp16"), ("RUNTIME.ENGINE", "tensorflow"),
        ("INPUT.MIN_SIZE_TRAIN", "(-640,)"), ("INPUT.MIN_SIZE_TRAIN", "()"), ("INPUT.MAX_SIZE_TRAIN", "0"),
        ("INPUT.MIN_SIZE_TEST", "-1"), ("INPUT.MAX_SIZE_TEST", "-1333"), ("INPUT.FORMAT", "GRB"),
        ("INPUT.RANDOM_FLIP", "both"), ("INPUT.CROP.SIZE", "[0.0, 0.5]"), ("INPUT.MAX_IMAGE_PIXELS", "0"),
        ("DATALOADER.NUM_WORKERS", "-1"), ("DATALOADER.MAX_BROKEN_IMAGES", "-1"), ("SOLVER.IMS_PER_BATCH", "0"),
        ("SOLVER.MAX_ITER", "0"), ("SOLVER.MAX_ITER", "-5"), ("SOLVER.BASE_LR", "-0.1"), ("SOLVER.BASE_LR", "1e999"),
        ("SOLVER.WARMUP_ITERS", "-1"), ("SOLVER.WARMUP_FACTOR", "2.0"), ("SOLVER.WARMUP_METHOD", "cosine"),
        ("SOLVER.STEPS", "(-1,)"), ("SOLVER.CHECKPOINT_PERIOD", "0"), ("SOLVER.WEIGHT_DECAY", "-0.05"),
        ("SOLVER.MOMENTUM", "9.0"), ("SOLVER.OPTIMIZER", "ADAM"), ("SOLVER.LR_SCHEDULER_NAME", "Cosine"),
        ("SOLVER.ACCUMULATE_STEPS", "0"), ("SOLVER.MAX_CHECKPOINTS", "-1"), ("SOLVER.AMP.DTYPE", "float8"),
        ("SOLVER.CLIP_TOTAL_NORM", "-1.0"), ("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "0.0"), ("TEST.EVAL_PERIOD", "-1"),
        ("SOLVER.NONFINITE.ACTION", "ignore"), ("TEST.COCO_EVAL", "cocoapi"), ("SEED", "99999999999"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_stops_with_its_key(key, value):
    with pytest.raises(ValueError, match=f"^{key} is .*; it must be .") as caught:
        load_config("quick/shapes", [key, value])
    assert "\n" not in str(caught.value)


def test_a_value_out_of_range_in_a_file_names_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"_BASE_: {get_config_file('quick/shapes')}\nSOLVER: {{WARMUP_ITERS: -1}}\n")
    with pytest.raises(ValueError, match=f"^In the config file {path}: SOLVER.WARMUP_ITERS is -1; it must be"):
        load_config(str(path))
    assert load_config(str(path), ["SOLVER.WARMUP_ITERS", "3"]).SOLVER.WARMUP_ITERS == 3


def test_every_range_refuses_something():
    cfg = tiny_cfg()
    check_values(cfg)
    for key in ALL:
        refused = [value for value in (-1, float("nan"), "nonsense", [], [-1], 10.0**12) if not is_accepted(key, value)]
        *groups, name = key.split(".")
        node = reduce(lambda node, group: node[group], groups, cfg)
        before, node[name] = node[name], refused[-1]
        with pytest.raises(ValueError, match=f"^{key} is .*; it must be"):
            check_values(cfg)
        node[name] = before


def is_accepted(key, value):
    try:
        return ALL[key].accepts(value)
    except TypeError:
        return False


def test_the_tables_agree_with_the_code():
    for name in PRECISIONS:
        check_value("RUNTIME.PRECISION", name)
    for name in MASK_FORMATS:
        check_value("MODEL.OUTPUT.MASK_FORMAT", name)
    for name in IMPLEMENTATIONS:
        check_value("SOLVER.OPTIMIZER_IMPLEMENTATION", name)
    for name in AMP_DTYPES:
        check_value("SOLVER.AMP.DTYPE", name)


def test_an_unknown_meta_architecture_stops_with_the_known_ones():
    with pytest.raises(ValueError, match="MODEL.META_ARCHITECTURE is 'SparseInts'; it must be one of .*SparseInst"):
        load_config("quick/shapes", ["MODEL.META_ARCHITECTURE", "SparseInts"])


def test_names_of_a_backbone_that_detectron2_refuses():
    with pytest.raises(ValueError, match="build_resnet_backbone cannot be built.*RES2_OUT_CHANNELS"):
        build_model(tiny_cfg("MODEL.RESNETS.RES2_OUT_CHANNELS", 256))


def test_a_group_of_keys_takes_a_dict(caplog):
    opts = ["MODEL.TIMM.ARGS", "{'drop_path_rate': 0.1}", "SOLVER", "{'MAX_ITER': 7, 'AMP': {'ENABLED': True}}"]
    cfg = load_config("quick/shapes", opts)
    assert dict(cfg.MODEL.TIMM.ARGS) == {"drop_path_rate": 0.1}
    assert cfg.SOLVER.MAX_ITER == 7 and cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.OPTIMIZER == "ADAMW"
    for wrong in ("{'NO_SUCH': 1}", "{'MAX_ITER': 'x'}", "{1: 2}", "3", "text", "{[]: 1}", "-" * 5000 + "1"):
        with pytest.raises(ValueError, match="In the KEY VALUE overrides") as caught:
            load_config("quick/shapes", ["SOLVER", wrong])
        assert "\n" not in str(caught.value)


def test_defaults_of_detectron2_are_in_range():
    cfg = get_cfg()
    add_sparse_inst_config(cfg)
    check_values(cfg)

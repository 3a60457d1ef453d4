"""Every key of Detectron2's config is read here, read by Detectron2's code, refused, or a matter of other models.

Every key of this project is read here.
"""

import ast
from fnmatch import fnmatch
from pathlib import Path

import detectron2
import pytest
from detectron2.config import get_cfg

import sparseinst
from sparseinst.config import add_sparse_inst_config, load_config
from sparseinst.evaluation import check_test_config
from tests.tiny_model import tiny_model

OURS, DETECTRON2, REFUSED, OTHER_MODELS = "read here", "read by Detectron2", "refused", "of other models"
# Keys or patterns; each key matches one.
KINDS = {
    OURS: (
        "VERSION", "MODEL.DEVICE", "MODEL.META_ARCHITECTURE", "MODEL.WEIGHTS", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD",
        "INPUT.MIN_SIZE_*", "INPUT.MAX_SIZE_*", "INPUT.RANDOM_FLIP", "INPUT.CROP.*", "INPUT.FORMAT",
        "DATASETS.TRAIN", "DATASETS.TEST", "DATALOADER.*",
        "SOLVER.MAX_ITER", "SOLVER.BASE_LR", "SOLVER.MOMENTUM", "SOLVER.NESTEROV", "SOLVER.WEIGHT_DECAY*",
        "SOLVER.BIAS_LR_FACTOR", "SOLVER.CHECKPOINT_PERIOD", "SOLVER.IMS_PER_BATCH", "SOLVER.AMP.ENABLED",
        "TEST.EXPECTED_RESULTS", "TEST.EVAL_PERIOD", "TEST.DETECTIONS_PER_IMAGE", "TEST.PRECISE_BN.*",
        "OUTPUT_DIR", "SEED", "VIS_PERIOD",
    ),
    DETECTRON2: (
        # Backbones.
        "MODEL.BACKBONE.*", "MODEL.FPN.*", "MODEL.RESNETS.*",
        # Detectron2's DatasetMapper; SparseInstDatasetMapper takes every format.
        "INPUT.MASK_FORMAT",
        "SOLVER.LR_SCHEDULER_NAME", "SOLVER.BASE_LR_END", "SOLVER.GAMMA", "SOLVER.STEPS", "SOLVER.NUM_DECAYS",
        "SOLVER.WARMUP_*", "SOLVER.RESCALE_INTERVAL", "SOLVER.REFERENCE_WORLD_SIZE", "SOLVER.CLIP_GRADIENTS.*",
        "CUDNN_BENCHMARK",
    ),
    # True, or False for MASK_ON.
    REFUSED: ("TEST.AUG.ENABLED", "MODEL.MASK_ON"),
    OTHER_MODELS: (
        "MODEL.LOAD_PROPOSALS", "MODEL.KEYPOINT_ON", "MODEL.PROPOSAL_GENERATOR.*", "MODEL.ANCHOR_GENERATOR.*",
        "MODEL.RPN.*", "MODEL.ROI_*", "MODEL.SEM_SEG_HEAD.*", "MODEL.PANOPTIC_FPN.*", "MODEL.RETINANET.*",
        "DATASETS.PROPOSAL_FILES_*", "DATASETS.PRECOMPUTED_PROPOSAL_*", "TEST.KEYPOINT_OKS_SIGMAS",
        # Read only where TEST.AUG.ENABLED is True.
        "TEST.AUG.MIN_SIZES", "TEST.AUG.MAX_SIZE", "TEST.AUG.FLIP",
        # Of users' own code.
        "GLOBAL.HACK",
    ),
}  # fmt: skip
READERS = ("solver/build.py", "engine/defaults.py", "modeling/backbone/*.py", "data/dataset_mapper.py")


def keys(node, group=""):
    for name, value in node.items():
        if hasattr(value, "items"):
            yield from keys(value, f"{group}{name}.")
        else:
            yield f"{group}{name}"


def reads(package, patterns, without=()):
    """The names of the attributes that files read, and their strings: some keys are read by name."""
    root = Path(package.__file__).parent
    found = set()
    for path in {path for pattern in patterns for path in root.glob(pattern) if path.name not in without}:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add(node.attr)
            elif isinstance(node, ast.Constant):
                found.add(node.value)
    return found


def is_read(key, found):
    name = key.rpartition(".")[2]
    # Of f"{node}.NAME" a file has ".NAME".
    return bool({key, name, f".{name}"} & found)


def kind_of(key):
    (kind,) = [kind for kind, patterns in KINDS.items() for pattern in patterns if fnmatch(key, pattern)]
    return kind


def test_every_key_has_one_kind_and_the_code_reads_it():
    # Without the files that define keys and their ranges.
    ours = reads(sparseinst, ["**/*.py"], without=("defaults.py", "values.py", "config.py"))
    detectron2s = reads(detectron2, READERS)
    for key in keys(get_cfg()):
        if kind_of(key) in (OURS, REFUSED):
            assert is_read(key, ours), key
        elif kind_of(key) == DETECTRON2:
            assert is_read(key, detectron2s), key
    cfg = get_cfg()
    add_sparse_inst_config(cfg)
    for key in set(keys(cfg)) - set(keys(get_cfg())):
        assert is_read(key, ours), key
    for kind, patterns in KINDS.items():
        for pattern in patterns:
            assert any(fnmatch(key, pattern) for key in keys(get_cfg())), (kind, pattern)


def test_refused_keys():
    with pytest.raises(ValueError, match="TEST.AUG.ENABLED"):
        check_test_config(load_config("quick/shapes", ["TEST.AUG.ENABLED", "True"]))
    with pytest.raises(ValueError, match="MODEL.MASK_ON"):
        tiny_model("MODEL.MASK_ON", False)


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ("[['segm', 'AP', 30.0]]", r"entry \['segm', 'AP', 30.0\]; expected \[task, metric, value, tolerance\]"),
        ("[['masks', 'AP', 30.0, 1.0]]", "'masks'"),
        ("[['segm', 'AP', 30.0, 1.0]]", r"needs one data set in DATASETS.TEST, which has 0"),
    ],
)
def test_expected_results_are_checked_before_the_training(expected, message):
    cfg = load_config("quick/shapes", ["TEST.EXPECTED_RESULTS", expected, "DATASETS.TEST", "()"])
    with pytest.raises(ValueError, match=message):
        check_test_config(cfg)

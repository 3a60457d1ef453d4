"""Check that the values of a config lie in their ranges: one table of keys for all models, one for each family."""

import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from detectron2.config import CfgNode

from sparseinst.config.defaults import FAMILIES
from sparseinst.config.model_keys import value as value_of


class Range(NamedTuple):
    """Values that a key accepts.

    Attributes:
        accepts: return whether a value is accepted; may raise TypeError for a value of another type.
        expected: the values in words, after "it must be".
    """

    accepts: Callable[[Any], bool]
    expected: str


def at_least(least: float) -> Range:
    """Accept finite numbers from ``least``."""
    return Range(lambda value: least <= value < math.inf, f"at least {least}")


def between(least: float, most: float) -> Range:
    """Accept numbers from ``least`` to ``most``, both included."""
    return Range(lambda value: least <= value <= most, f"in [{least}, {most}]")


def one_of(*choices: object) -> Range:
    """Accept these values."""
    return Range(lambda value: value in choices, f"one of {', '.join(map(repr, choices))}")


def each(part: Range) -> Range:
    """Accept a list of at least one value, all in a range."""
    return Range(
        lambda values: not isinstance(values, str) and len(values) > 0 and all(map(part.accepts, values)),
        f"one or more values, each {part.expected}",
    )


COUNT = Range(lambda value: isinstance(value, int) and value >= 1, "a whole number of at least 1")
NOT_NEGATIVE = at_least(0)
POSITIVE = Range(lambda value: 0 < value < math.inf, "above 0")
FRACTION = between(0, 1)
NORM = one_of("", "BN", "SyncBN", "FrozenBN", "GN", "LN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")
# The keys of Detectron2 and of all models; a family's module adds RANGES of its own.
RANGES: Mapping[str, Range] = {
    "SEED": Range(lambda seed: seed < 2**31, "below 2147483648 (negative: drawn at the start)"),
    "TRACKERS": Range(lambda names: set(names) <= {"wandb", "mlflow"}, "a list of names, each 'wandb' or 'mlflow'"),
    "VIS_PERIOD": NOT_NEGATIVE,
    "MODEL.DEVICE": Range(lambda name: isinstance(name, str), "a device's name, such as cpu or cuda"),
    "MODEL.PIXEL_MEAN": each(Range(math.isfinite, "a number")),
    "MODEL.PIXEL_STD": each(POSITIVE),
    "MODEL.BACKBONE.FREEZE_AT": between(0, 5),
    "MODEL.RESNETS.DEPTH": one_of(18, 34, 50, 101, 152),
    "MODEL.RESNETS.NORM": NORM,
    "MODEL.RESNETS.NUM_GROUPS": COUNT,
    "MODEL.RESNETS.WIDTH_PER_GROUP": COUNT,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": COUNT,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": COUNT,
    "MODEL.RESNETS.RES5_DILATION": one_of(1, 2),
    "MODEL.RESNETS.DEFORM_NUM_GROUPS": COUNT,
    "MODEL.RESNETS.DEFORM_INTERVAL": COUNT,
    "MODEL.FPN.NORM": NORM,
    "MODEL.FPN.OUT_CHANNELS": COUNT,
    "MODEL.CSPNET.NORM": one_of("", "BN", "FrozenBN", "SyncBN"),
    "MODEL.CSPNET.NEGATIVE_SLOPE": NOT_NEGATIVE,
    "MODEL.TIMM.NORM": one_of("", "BN", "FrozenBN", "SyncBN"),
    "MODEL.OUTPUT.MASK_FORMAT": one_of("bitmask", "rle"),
    "MODEL.OUTPUT.MAX_MASK_GIB": POSITIVE,
    "MODEL.OUTPUT.SCORE_THRESHOLD": FRACTION,
    "MODEL.MIN_BACKBONE_COVERAGE": FRACTION,
    "RUNTIME.ENGINE": one_of("torch", "openvino", "onnxruntime"),
    "RUNTIME.INTRA_OP_THREADS": NOT_NEGATIVE,
    "RUNTIME.PRECISION": one_of("float32", "bfloat16", "float16"),
    "INPUT.FORMAT": one_of("RGB", "BGR"),
    "INPUT.MASK_FORMAT": one_of("polygon", "bitmask"),
    "INPUT.MIN_SIZE_TRAIN": each(NOT_NEGATIVE),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": one_of("choice", "range"),
    "INPUT.MAX_SIZE_TRAIN": COUNT,
    "INPUT.MIN_SIZE_TEST": Range(at_least(0).accepts, "at least 0 (0: images keep their size)"),
    "INPUT.MAX_SIZE_TEST": COUNT,
    "INPUT.FIT_SIZE_TEST": Range(
        lambda size: len(size) in (0, 2) and all(COUNT.accepts(side) for side in size), "(height, width), or empty: off"
    ),
    "INPUT.SQUARE_SIZE": Range(lambda side: isinstance(side, int) and side >= 0, "a whole number of pixels (0: off)"),
    "INPUT.MAX_IMAGE_PIXELS": COUNT,
    "INPUT.RANDOM_FLIP": one_of("none", "horizontal", "vertical"),
    "INPUT.CROP.TYPE": one_of("relative", "relative_range", "absolute", "absolute_range"),
    "INPUT.CROP.SIZE": each(POSITIVE),
    "DATALOADER.NUM_WORKERS": NOT_NEGATIVE,
    "DATALOADER.MAX_BROKEN_IMAGES": NOT_NEGATIVE,
    "DATALOADER.REPEAT_THRESHOLD": NOT_NEGATIVE,
    "DATALOADER.SAMPLER_TRAIN": one_of("TrainingSampler", "RepeatFactorTrainingSampler"),
    "SOLVER.IMS_PER_BATCH": COUNT,
    "SOLVER.REFERENCE_BATCH_SIZE": NOT_NEGATIVE,
    "SOLVER.REFERENCE_WORLD_SIZE": NOT_NEGATIVE,
    "SOLVER.ACCUMULATE_STEPS": COUNT,
    "SOLVER.MAX_ITER": COUNT,
    "SOLVER.CHECKPOINT_PERIOD": COUNT,
    "SOLVER.MAX_CHECKPOINTS": NOT_NEGATIVE,
    "SOLVER.OPTIMIZER": one_of("ADAMW", "SGD"),
    "SOLVER.OPTIMIZER_IMPLEMENTATION": one_of("auto", "for-loop", "foreach", "fused"),
    "SOLVER.BASE_LR": NOT_NEGATIVE,
    "SOLVER.BASE_LR_END": NOT_NEGATIVE,
    "SOLVER.BACKBONE_MULTIPLIER": NOT_NEGATIVE,
    "SOLVER.BIAS_LR_FACTOR": NOT_NEGATIVE,
    "SOLVER.MOMENTUM": FRACTION,
    "SOLVER.WEIGHT_DECAY": NOT_NEGATIVE,
    "SOLVER.WEIGHT_DECAY_NORM": NOT_NEGATIVE,
    "SOLVER.WEIGHT_DECAY_BIAS": Range(
        lambda value: value is None or NOT_NEGATIVE.accepts(value), "None (as WEIGHT_DECAY) or at least 0"
    ),
    "SOLVER.LR_SCHEDULER_NAME": one_of("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"),
    "SOLVER.STEPS": Range(lambda steps: all(step >= 0 for step in steps), "iterations, none of them negative"),
    "SOLVER.GAMMA": NOT_NEGATIVE,
    "SOLVER.NUM_DECAYS": COUNT,
    "SOLVER.WARMUP_METHOD": one_of("linear", "constant"),
    "SOLVER.WARMUP_ITERS": NOT_NEGATIVE,
    "SOLVER.WARMUP_FACTOR": FRACTION,
    "SOLVER.CLIP_TOTAL_NORM": Range(NOT_NEGATIVE.accepts, "at least 0 (0: off)"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": one_of("value", "norm"),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": POSITIVE,
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": Range(lambda value: value > 0, "above 0"),
    "SOLVER.AMP.DTYPE": one_of("float16", "bfloat16"),
    "SOLVER.NONFINITE.ACTION": one_of("stop", "skip"),
    "SOLVER.NONFINITE.MAX_SKIPS": NOT_NEGATIVE,
    "TEST.EVAL_PERIOD": NOT_NEGATIVE,
    "TEST.PATIENCE": NOT_NEGATIVE,
    "TEST.DETECTIONS_PER_IMAGE": COUNT,
    "TEST.COCO_EVAL": one_of("pycocotools", "faster-coco-eval"),
    "TEST.PRECISE_BN.NUM_ITER": COUNT,
}


def check_values(cfg: CfgNode) -> None:
    """Check every key that has a range.

    Raises:
        ValueError: a value is out of range; the message names the key, the value and the range.
    """
    for ranges in (RANGES, *(importlib.import_module(family).RANGES for family in FAMILIES)):
        for key, accepted in ranges.items():
            _check(key, value_of(cfg, key), accepted)


def check_keys(cfg: CfgNode, *keys: str) -> None:
    """Check some keys of RANGES, for parts that are built from a config that nobody checked.

    Raises:
        ValueError: as `check_values`.
    """
    for key in keys:
        _check(key, value_of(cfg, key), RANGES[key])


def check_value(key: str, value: object) -> None:
    """Check a value of one key of RANGES. Raises ValueError as `check_values` does."""
    _check(key, value, RANGES[key])


def _check(key: str, value: object, accepted: Range) -> None:
    try:
        is_accepted = accepted.accepts(value)
    except TypeError:
        is_accepted = False
    if not is_accepted:
        shown = list(value) if isinstance(value, tuple) else value
        raise ValueError(f"{key} is {shown!r}; it must be {accepted.expected}")

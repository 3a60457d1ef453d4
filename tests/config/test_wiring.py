"""A key that is set changes one argument of the part that it belongs to, and nothing else."""

from unittest import mock

import pytest

from sparseinst.data import loader
from sparseinst.modeling.sparse_inst.criterion import build_sparse_inst_criterion
from sparseinst.modeling.sparse_inst.matcher import build_sparse_inst_matcher
from sparseinst.runtime import optimize
from tests.tiny_model import tiny_cfg

IMAGE = {"file_name": "a.png", "width": 4, "height": 3}


def numbers(part):
    return {name: value for name, value in vars(part).items() if isinstance(value, float)}


def criterion(cfg):
    return numbers(build_sparse_inst_criterion(cfg))


def matcher(cfg):
    return numbers(build_sparse_inst_matcher(cfg))


def train_loader(cfg):
    with (
        mock.patch.object(loader, "get_detection_dataset_dicts", return_value=[IMAGE]),
        mock.patch.object(loader, "TrainLoader") as built,
    ):
        loader.build_train_loader(cfg, seed=0)
    return built.call_args.kwargs


def runtime(cfg):
    with mock.patch.object(optimize, "optimize_for_inference") as called:
        optimize.optimize_as_configured(cfg, None)
    return called.call_args.kwargs


@pytest.mark.parametrize(
    ("part", "key", "value", "argument"),
    [
        (criterion, "MODEL.SPARSE_INST.LOSS.CLASS_WEIGHT", 7.5, "class_weight"),
        (criterion, "MODEL.SPARSE_INST.LOSS.MASK_PIXEL_WEIGHT", 7.5, "mask_pixel_weight"),
        (criterion, "MODEL.SPARSE_INST.LOSS.MASK_DICE_WEIGHT", 7.5, "mask_dice_weight"),
        (criterion, "MODEL.SPARSE_INST.LOSS.OBJECTNESS_WEIGHT", 7.5, "objectness_weight"),
        (matcher, "MODEL.SPARSE_INST.MATCHER.ALPHA", 0.7, "alpha"),
        (matcher, "MODEL.SPARSE_INST.MATCHER.BETA", 0.7, "beta"),
        (train_loader, "DATALOADER.REPLACE_EMPTY", True, "replace_empty"),
        (train_loader, "DATALOADER.ASPECT_RATIO_GROUPING", False, "group_by_aspect_ratio"),
        (train_loader, "DATALOADER.MAX_BROKEN_IMAGES", 77, "max_broken_images"),
        (train_loader, "DATALOADER.NUM_WORKERS", 3, "num_workers"),
        (runtime, "RUNTIME.INTRA_OP_THREADS", 3, "threads"),
        (runtime, "RUNTIME.PROVIDERS", ["A", "B"], "providers"),
        (runtime, "RUNTIME.ENGINE", "onnxruntime", "engine"),
        (runtime, "RUNTIME.PRECISION", "bfloat16", "precision"),
        (runtime, "RUNTIME.FUSE", False, "fuse"),
        (runtime, "RUNTIME.CHANNELS_LAST", False, "channels_last"),
        (runtime, "RUNTIME.WINOGRAD", False, "winograd"),
        (runtime, "RUNTIME.COMPILE", True, "compile"),
    ],
)
def test_a_key_reaches_its_argument_alone(part, key, value, argument):
    before, after = part(tiny_cfg()), part(tiny_cfg(key, value))
    changed = {name: after[name] for name in after if after[name] != before[name]}
    assert changed == {argument: value}

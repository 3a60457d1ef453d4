"""Detectron2's ResNets, and Caffe2's, which Detectron2's model zoo also has."""

import torch
from detectron2.checkpoint.c2_model_loading import convert_basic_c2_names

from sparseinst.checkpoint.names.source import Source, State

EPS = 1e-5

RESNET = Source("ResNet of Detectron2", frozenset({"res2.0.conv1.weight"}))


def _frozen_statistics(converted: State, target: State) -> dict[str, torch.Tensor]:
    """Return mean 0, variance 1 for norms: Caffe2 folds the statistics into weight and bias.

    Norms that train get none, because they would need the real statistics.
    """
    added = {}
    for name, weight in converted.items():
        norm = name.removesuffix("weight")
        if name.endswith("norm.weight") and norm + "num_batches_tracked" not in target:
            for statistic, value in (("running_mean", 0.0), ("running_var", 1.0 - EPS)):
                if norm + statistic not in converted:
                    added[norm + statistic] = torch.full_like(weight, value)
    return added


CAFFE2 = Source(
    "ResNet of Caffe2",
    frozenset({"res2_0_branch2a_w"}),
    renamings={RESNET.family: lambda names, _: convert_basic_c2_names(names)},
    add=_frozen_statistics,
)
SOURCES = (CAFFE2, RESNET)

"""Detectron2's ResNets, and Caffe2's, which Detectron2's model zoo also has."""

import torch
from detectron2.checkpoint.c2_model_loading import convert_basic_c2_names
from torch import nn

from sparseinst.checkpoint.names.source import KeyHint, Source, State

EPS = 1e-5

RESNET = Source("ResNet of Detectron2", frozenset({"res2.0.conv1.weight"}))


def stride_in_1x1(backbone: nn.Module) -> bool | None:
    """Return the value of MODEL.RESNETS.STRIDE_IN_1X1 that a backbone has, None without blocks that begin with 1x1."""
    convs = [
        module
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Conv2d) and name.endswith("conv1") and module.kernel_size == (1, 1)
    ]
    return any(max(conv.stride) > 1 for conv in convs) if convs else None


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
    adapt=_frozen_statistics,
)
SOURCES = (CAFFE2, RESNET)

_OFFSET = r"\.conv2_offset\."
KEY_HINTS = (
    KeyHint(_OFFSET, "MODEL.RESNETS.DEFORM_MODULATED: v1 has 18 channels for each group, v2 27", first_axis=True),
    KeyHint(_OFFSET, "MODEL.RESNETS.DEFORM_ON_PER_STAGE, DEFORM_INTERVAL and MODEL.BACKBONE.NAME", is_presence=True),
)

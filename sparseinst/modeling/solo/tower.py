"""The convolutions of SOLO's and SOLOv2's heads, initialized as published."""

import math

import torch
from detectron2.layers import Conv2d, get_norm
from torch import nn
from torch.nn import functional as F

from sparseinst.ops.deform_conv import DeformConv2d

INIT_STD = 0.01


class Tower(nn.ModuleList):
    """Convolutions 3x3, each with a norm and a ReLU.

    Args:
        in_channels: channels of the input.
        channels: width of the convolutions.
        num_convs: how many.
        norm: a norm of Detectron2; with "" the convolutions have a bias.
        deform: which convolutions are deformable: "", "last" or "all".
        modulated: whether these are modulated (v2).
    """

    def __init__(
        self, in_channels: int, channels: int, num_convs: int, norm: str, deform: str = "", modulated: bool = False
    ) -> None:
        first_deformable = {"": num_convs, "last": num_convs - 1, "all": 0}[deform]
        super().__init__(
            conv_norm(in_channels if index == 0 else channels, channels, 3, norm, index >= first_deformable, modulated)
            for index in range(num_convs)
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return a map of the input's size."""
        for conv in self:
            features = F.relu(conv(features))
        return features


def conv_norm(
    in_channels: int, channels: int, kernel_size: int, norm: str, is_deformable: bool = False, modulated: bool = False
) -> nn.Module:
    """Return a convolution with a norm, initialized as published: weights of N(0, 0.01), offsets of zero."""
    conv = Conv2d(
        in_channels, channels, kernel_size, padding=kernel_size // 2, bias=not norm, norm=get_norm(norm, channels)
    )
    init_conv(conv)
    return DeformConv2d(conv, modulated=modulated) if is_deformable else conv


def init_conv(conv: nn.Conv2d, prior_prob: float | None = None) -> None:
    """Draw weights of N(0, 0.01); set the bias to 0, or so that the sigmoid is ``prior_prob``."""
    nn.init.normal_(conv.weight, std=INIT_STD)
    if conv.bias is not None:
        nn.init.constant_(conv.bias, 0.0 if prior_prob is None else -math.log((1 - prior_prob) / prior_prob))

"""Deformable convolution by torchvision's operator: no compiled part of Detectron2 is needed."""

import torch
from torch import nn
from torchvision.ops import deform_conv2d


class DeformConv2d(nn.Module):
    """Convolve with taps that are moved by offsets predicted from the input (arXiv 1703.06211).

    Replaces a convolution and takes over its weight and norm. While the offsets are zero, as they are initially, it
    computes the same. Modulated (v2, arXiv 1811.11168) each tap also has a factor in [0, 1],
    which at first is 0.5.

    The channels of ``offset`` are (dy, dx) for each tap in rows, for each group of channels; modulated, all logits of
    the factors follow, as in Detectron2.

    Args:
        conv: the replaced convolution. Where its weight is frozen, the offsets are too.
        num_groups: groups of input channels with offsets of their own.
        modulated: whether taps have factors.

    Raises:
        ValueError: the input channels cannot be divided by the groups.
    """

    def __init__(self, conv: nn.Conv2d, *, num_groups: int = 1, modulated: bool = False) -> None:
        super().__init__()
        if num_groups < 1 or conv.in_channels % num_groups:
            raise ValueError(
                f"MODEL.RESNETS.DEFORM_NUM_GROUPS is {num_groups}; it must divide the {conv.in_channels} channels of "
                "each deformable convolution"
            )
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation
        self.num_offsets = 2 * num_groups * conv.kernel_size[0] * conv.kernel_size[1]
        self.modulated = modulated
        self.out_channels = conv.out_channels
        self.weight = conv.weight
        self.bias = conv.bias
        # Detectron2's convolutions carry their norm.
        self.norm = getattr(conv, "norm", None)
        self.offset = nn.Conv2d(
            conv.in_channels,
            self.num_offsets * 3 // 2 if modulated else self.num_offsets,
            conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
        )
        for parameter in self.offset.parameters():
            nn.init.zeros_(parameter)
            parameter.requires_grad = conv.weight.requires_grad

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map (B, C, h, w) to the result of the replaced convolution, norm included."""
        offsets = self.offset(features)
        output_type = offsets.dtype
        # The CPU's operator takes no 16-bit numbers, whose positions on a map of 100 pixels would be 1/16 apart anyway.
        compute_type = torch.promote_types(output_type, torch.float32)
        offsets, mask_logits = offsets.to(compute_type).tensor_split([self.num_offsets], dim=1)
        features = deform_conv2d(
            features.to(compute_type),
            offsets,
            self.weight.to(compute_type),
            None if self.bias is None else self.bias.to(compute_type),
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            mask=mask_logits.sigmoid() if self.modulated else None,
        )
        features = features.to(output_type)
        return features if self.norm is None else self.norm(features)

    def extra_repr(self) -> str:
        return f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, modulated={self.modulated}"


def make_deformable(stage: nn.Module, *, num_groups: int = 1, modulated: bool = False, interval: int = 1) -> None:
    """Replace ``conv2`` of every ``interval``-th block of a ResNet's stage, from the first one on, in place.

    Args:
        stage: its children are the blocks.
        num_groups, modulated: see :class:`DeformConv2d`.
        interval: at least 1.
    """
    for block in list(stage.children())[::interval]:
        block.conv2 = DeformConv2d(block.conv2, num_groups=num_groups, modulated=modulated)


def published_name(name: str) -> str:
    """Return the state-dict name: Detectron2 stores the offset convolution next to ``conv2``, not inside it."""
    return name.replace(".conv2.offset.", ".conv2_offset.")


def own_name(name: str) -> str:
    """Reverse :func:`published_name`."""
    return name.replace(".conv2_offset.", ".conv2.offset.")

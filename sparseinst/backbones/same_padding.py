"""Convolutions with TensorFlow's SAME padding that export with dynamic sizes."""

import torch
from torch import nn
from torch.nn import functional as F


class SamePaddingConv2d(nn.Conv2d):
    """Compute what timm's Conv2dSame computes, with the padding from the remainder of the size by the stride.

    timm rounds a quotient of floats. Symbolic sizes then become nested expressions, and torch.export of an EfficientNet
    did not end within minutes. The remainder of sides that are multiples of the stride is the constant 0.

    Args:
        conv: without padding of its own; its parameters are used.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, 0, conv.dilation, conv.groups,
            bias=False, device="meta",
        )  # fmt: skip
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Pad (B, C, h, w) at the right and the bottom by one pixel more than opposite where the padding is odd."""
        padding: list[int] = []
        # F.pad begins with the last dimension.
        for axis in (1, 0):
            step = self.stride[axis]
            rest = features.shape[2 + axis] % step
            total = max(self.dilation[axis] * (self.kernel_size[axis] - 1) + 1 - (rest or step), 0)
            padding += [total // 2, total - total // 2]
        return super().forward(F.pad(features, padding))


def replace_same_padding(body: nn.Module, kind: type[nn.Conv2d]) -> None:
    """Replace convolutions with SAME padding in place.

    timm's StdConv2dSame, ScaledStdConv2dSame, MaxPool2dSame and AvgPool2dSame stay: torch.export of a network that has
    them with dynamic sizes still gets the rounded quotients.

    Args:
        body: network whose submodules are replaced, at any depth.
        kind: of the replaced modules, timm's Conv2dSame; its subclasses stay.
    """
    for parent in list(body.modules()):
        for name, child in parent.named_children():
            if type(child) is kind:
                setattr(parent, name, SamePaddingConv2d(child))

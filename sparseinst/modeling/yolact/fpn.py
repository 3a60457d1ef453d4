"""YOLACT's feature pyramid. Letters: sparseinst.structures."""

import math
from collections.abc import Sequence

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import nn
from torch.nn import functional as F


class YOLACTPyramid(Backbone):
    """Sum the levels of a backbone from coarse to fine, and add coarser ones (YOLACT, section 4).

    Detectron2's FPN doubles a level, which needs sides that are multiples of 32, and returns no activations. Here a
    level is resized to the exact size of the finer one, and the levels of the backbone end in a ReLU. Level ``l`` has
    stride ``2 ** l`` and the name ``p{l}``.

    Args:
        bottom_up: the backbone.
        in_features: its features, finest first, each with twice the stride of the one before.
        out_channels: width of all levels.
        num_levels: of the pyramid; those beyond ``in_features`` are strided convolutions of the coarsest one.

    Raises:
        ValueError: the features are absent or have other strides, or there are more of them than levels.
    """

    def __init__(self, bottom_up: Backbone, in_features: Sequence[str], out_channels: int, num_levels: int) -> None:
        super().__init__()
        shapes = bottom_up.output_shape()
        strides = [shapes[name].stride for name in in_features if name in shapes]
        expected = [strides[0] * 2**index for index in range(len(in_features))] if strides else None
        if strides != expected or len(in_features) > num_levels:
            found = ", ".join(f"{name} (stride {shape.stride})" for name, shape in shapes.items())
            raise ValueError(
                f"MODEL.FPN.IN_FEATURES is {list(in_features)}; expected at most {num_levels} features (as many as "
                "MODEL.YOLACT.ANCHOR_SIZES), finest first, each with twice the stride of the one before. The backbone "
                f"gives {found}"
            )
        self.bottom_up = bottom_up
        self.in_features = list(in_features)
        self.out_channels = out_channels
        first = int(math.log2(strides[0]))
        self.levels = [first + index for index in range(num_levels)]
        for name, level in zip(in_features, self.levels):
            setattr(self, f"fpn_lateral{level}", nn.Conv2d(shapes[name].channels, out_channels, 1))
            setattr(self, f"fpn_output{level}", nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.top_block = nn.ModuleDict(
            {
                f"p{level}": nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1)
                for level in self.levels[len(in_features) :]
            }
        )
        for module in self.children():
            if module is not bottom_up:
                module.apply(init_conv)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the levels (B, out_channels, ., .) by name, finest first."""
        features = self.bottom_up(images)
        outputs: dict[str, torch.Tensor] = {}
        total = None
        for name, level in reversed(list(zip(self.in_features, self.levels))):
            lateral = getattr(self, f"fpn_lateral{level}")(features[name])
            if total is not None:
                size = lateral.shape[-2:]
                lateral = lateral + F.interpolate(total, size=size, mode="bilinear", align_corners=False)
            total = lateral
            outputs[f"p{level}"] = getattr(self, f"fpn_output{level}")(total).relu()
        outputs = dict(reversed(outputs.items()))
        coarsest = outputs[f"p{self.levels[len(self.in_features) - 1]}"]
        for name, convolution in self.top_block.items():
            outputs[name] = coarsest = convolution(coarsest)
        return outputs

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return channels and stride of each level."""
        return {f"p{level}": ShapeSpec(channels=self.out_channels, stride=2**level) for level in self.levels}


def init_conv(module: nn.Module) -> None:
    """Initialize a convolution as the published training does: Xavier uniform, bias 0."""
    if isinstance(module, nn.Conv2d):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)

"""The feature encoder between backbone and decoder. Letters: sparseinst.structures."""

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.utils.registry import Registry
from fvcore.nn.weight_init import c2_msra_fill, c2_xavier_fill
from torch import nn
from torch.nn import functional as F

from sparseinst.config import registered
from sparseinst.modeling.sparse_inst.fused import FusedEncoder
from sparseinst.ops.pooling import AdaptiveAveragePool

SPARSE_INST_ENCODER_REGISTRY = Registry("SPARSE_INST_ENCODER")
SPARSE_INST_ENCODER_REGISTRY.__doc__ = """
Encoders: modules called with the backbone's dict of feature maps; return one map (B, C, H, W). Built as
``Name(cfg, input_shape)`` with the backbone's ShapeSpecs by name; have ``output_shape()``, a ShapeSpec with
channels and stride.
"""

POOL_SIZES = (1, 2, 3, 6)


class PyramidPooling(nn.Module):
    """Add context of the whole map: adaptive average pooling to four sizes, concatenated with the map.

    Args:
        channels: channels of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        branch_channels = channels // 4
        self.stages = nn.ModuleList(
            nn.Sequential(AdaptiveAveragePool(size), nn.Conv2d(channels, branch_channels, 1)) for size in POOL_SIZES
        )
        self.bottleneck = nn.Conv2d(channels + len(POOL_SIZES) * branch_channels, channels, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return a map of the shape (B, C, h, w) of the input."""
        size = features.shape[-2:]
        branches = [
            F.interpolate(F.relu(stage(features)), size=size, mode="bilinear", align_corners=False)
            for stage in self.stages
        ]
        return F.relu(self.bottleneck(torch.cat([*branches, features], dim=1)))


@SPARSE_INST_ENCODER_REGISTRY.register()
class InstanceContextEncoder(nn.Module):
    """Fuse two to four backbone levels, with pooled context, into one map on the finest level's grid.

    Paper, section 3.3 and figure 3.

    Args:
        input_shape: the backbone's ShapeSpecs by feature name; channels are read, strides where they are known.
        in_features: names of the levels, finest first.
        num_channels: width of the encoder, C.
        norm: norm of laterals, outputs and fusion, "" for none as published; pyramid pooling has none, because a norm
            over its maps of one pixel is meaningless.

    Raises:
        ValueError: a feature that the backbone does not have; levels that are not two to four, or not finest first;
            a width that is not a multiple of 4.
    """

    @configurable
    def __init__(
        self,
        *,
        input_shape: dict[str, ShapeSpec],
        in_features: Sequence[str] = ("res3", "res4", "res5"),
        num_channels: int = 256,
        norm: str = "",
    ) -> None:
        super().__init__()
        _check_levels(input_shape, in_features)
        if num_channels < 4 or num_channels % 4:
            raise ValueError(
                f"MODEL.SPARSE_INST.ENCODER.NUM_CHANNELS is {num_channels}; it must be a positive multiple of 4 "
                "(pyramid pooling has four branches of a quarter of it)"
            )
        self.in_features = tuple(in_features)
        self.num_channels = num_channels
        self.stride = input_shape[self.in_features[0]].stride

        # Published checkpoints number both lists from the deepest level.
        deepest_first = [input_shape[name].channels for name in reversed(self.in_features)]
        self.fpn_laterals = nn.ModuleList(_conv(channels, num_channels, 1, norm) for channels in deepest_first)
        self.fpn_outputs = nn.ModuleList(_conv(num_channels, num_channels, 3, norm) for _ in deepest_first)
        self.ppm = PyramidPooling(num_channels)
        self.fusion = _conv(num_channels * len(deepest_first), num_channels, 1, norm)

        for conv in (*self.fpn_laterals, *self.fpn_outputs):
            c2_xavier_fill(conv)
        c2_msra_fill(self.fusion)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        encoder = cfg.MODEL.SPARSE_INST.ENCODER
        return {
            "input_shape": input_shape,
            "in_features": encoder.IN_FEATURES,
            "num_channels": encoder.NUM_CHANNELS,
            "norm": encoder.NORM,
        }

    def output_shape(self) -> ShapeSpec:
        """Return channels and stride of the output."""
        return ShapeSpec(channels=self.num_channels, stride=self.stride)

    def forward(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        """Fuse the levels.

        Args:
            features: the backbone's output; reads ``in_features``, each (B, channels of the level, h, w).

        Returns:
            (B, C, H, W) on the grid of the first of ``in_features``.
        """
        deepest_first = [features[name] for name in reversed(self.in_features)]
        top_down = self.ppm(self.fpn_laterals[0](deepest_first[0]))
        levels = [self.fpn_outputs[0](top_down)]
        for feature, lateral, output in zip(deepest_first[1:], self.fpn_laterals[1:], self.fpn_outputs[1:]):
            # Resized to the level's own size, so that levels of any stride and of odd sizes fit.
            top_down = lateral(feature) + F.interpolate(top_down, size=feature.shape[-2:], mode="nearest")
            levels.append(output(top_down))
        # The finest level needs no resizing; comparing sizes would bind an exported graph to its example.
        size = levels[-1].shape[-2:]
        coarser = [F.interpolate(level, size=size, mode="bilinear", align_corners=False) for level in levels[-2::-1]]
        return self.fusion(torch.cat([levels[-1], *coarser], dim=1))

    def fuse(self) -> nn.Module:
        """Return an equal, cheaper module for inference, or this one where a norm or a subclass prevents it."""
        if type(self) is not InstanceContextEncoder:
            return self
        convs = (*self.fpn_outputs, self.fusion)
        return self if any(conv.norm is not None for conv in convs) else FusedEncoder(self)


def _conv(in_channels: int, out_channels: int, kernel_size: int, norm: str) -> Conv2d:
    return Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        padding=kernel_size // 2,
        bias=not norm,
        norm=get_norm(norm, out_channels),
    )


def _check_levels(input_shape: dict[str, ShapeSpec], in_features: Sequence[str]) -> None:
    missing = [name for name in in_features if name not in input_shape]
    if missing:
        raise ValueError(
            f"MODEL.SPARSE_INST.ENCODER.IN_FEATURES has {missing}, but the backbone returns {list(input_shape)}. Set "
            "IN_FEATURES to some of these, or have the backbone return more: MODEL.RESNETS.OUT_FEATURES for ResNets, "
            "the OUT_FEATURES of its own section for other backbones"
        )
    if not 2 <= len(in_features) <= 4:
        raise ValueError(f"MODEL.SPARSE_INST.ENCODER.IN_FEATURES is {list(in_features)}; expected two to four levels")
    strides = [input_shape[name].stride for name in in_features]
    if None not in strides and strides != sorted(strides):
        raise ValueError(
            f"MODEL.SPARSE_INST.ENCODER.IN_FEATURES is {list(in_features)} with strides {strides}: "
            "name the finest level (the smallest stride) first"
        )


def build_sparse_inst_encoder(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> nn.Module:
    """Build the encoder named by MODEL.SPARSE_INST.ENCODER.NAME."""
    return registered(SPARSE_INST_ENCODER_REGISTRY, cfg, "MODEL.SPARSE_INST.ENCODER.NAME")(cfg, input_shape)

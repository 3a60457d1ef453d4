"""SOLOv2: kernels for every cell, and the mask features that they are applied to. Letters: sparseinst.structures."""

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.utils.registry import Registry
from torch import nn
from torch.nn import functional as F

from sparseinst.config import registered
from sparseinst.modeling.solo.heads import SOLO_HEAD_REGISTRY, GridHead, resize, resized_probs, upsample
from sparseinst.modeling.solo.tower import Tower, conv_norm, init_conv
from sparseinst.ops.coordinates import coordinate_channels
from sparseinst.ops.dense_detections import chosen

MASK_FEATURE_HEAD_REGISTRY = Registry("MASK_FEATURE_HEAD")
MASK_FEATURE_HEAD_REGISTRY.__doc__ = """
Mask-feature heads of SOLOv2: modules called with the backbone's dict of feature maps; return (B, D, Hm, Wm). Built as
``Name(cfg, input_shape)``; have ``stride``, pixels of the input for each pixel of the map.
"""


@SOLO_HEAD_REGISTRY.register()
class SOLOv2Head(GridHead):
    """Predict categories and a mask kernel of D numbers for every cell (SOLOv2, section 3.2.1).

    `forward` returns ``kernels`` (B, D, all cells). The mask logits of a cell are its kernel as a 1x1 convolution over
    ``mask_features`` (B, D, Hm, Wm) of its image.

    Args:
        kernel_dim: D.
        mask_stride: of the mask features.
        shared: see `GridHead`.
    """

    keeps_every_pair = True
    needs_mask_features = True

    @configurable
    def __init__(
        self, *, kernel_dim: int, mask_stride: int = 4, num_convs: int, channels: int, norm: str = "GN", **shared
    ) -> None:
        super().__init__(num_convs=num_convs, channels=channels, norm=norm, **shared)
        self.mask_strides = (mask_stride,) * len(self.strides)
        deform, modulated = shared.get("deform", ""), shared.get("modulated", False)
        self.kernel_tower = Tower(self.in_channels + 2, channels, num_convs, norm, deform, modulated)
        self.kernel_pred = Conv2d(channels, kernel_dim, 3, padding=1)
        init_conv(self.kernel_pred)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        node = cfg.MODEL.SOLOV2
        return {
            **cls._config_arguments(node, input_shape),
            "kernel_dim": node.KERNEL_DIM,
            "mask_stride": _check_features(node.MASK_FEATURES.IN_FEATURES, input_shape)[0],
        }

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return ``cate_logits`` (B, K, all cells) and ``kernels`` (B, D, all cells)."""
        maps = [
            resize(torch.cat([level, coordinate_channels(level)], dim=1), (size, size))
            for level, size in zip(self.level_features(features), self.num_grids)
        ]
        kernels = [self.kernel_pred(self.kernel_tower(level)).flatten(2) for level in maps]
        return {
            "cate_logits": self.category_logits([level[:, : self.in_channels] for level in maps]),
            "kernels": torch.cat(kernels, dim=2),
        }

    def mask_probs(
        self,
        outputs: dict[str, torch.Tensor],
        image: int,
        level: int,
        cells: torch.Tensor,
        size: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """Apply the cells' kernels to the mask features; see the base class."""
        features = outputs["mask_features"][image].float()
        start = sum(self.level_sizes[:level])
        kernels = outputs["kernels"][image].index_select(1, start + cells).float()
        probs = (kernels.T @ features.flatten(1)).sigmoid().unflatten(1, features.shape[1:])
        return resized_probs(probs, size)

    def dense_mask_probs(
        self, outputs: dict[str, torch.Tensor], cells: torch.Tensor, size: tuple[int, int]
    ) -> torch.Tensor:
        """Apply the cells' kernels to the mask features; see the base class."""
        features = outputs["mask_features"].float()
        kernels = chosen(outputs["kernels"].float().transpose(1, 2), cells)
        return (kernels @ features.flatten(2)).sigmoid().unflatten(2, features.shape[2:])


@MASK_FEATURE_HEAD_REGISTRY.register()
class MaskFeatureHead(nn.Module):
    """Sum levels of the feature pyramid at the finest one's size (SOLOv2, section 3.2.2).

    Args:
        input_shape: the backbone's ShapeSpecs by feature name.
        in_features: finest first, each of half the size of the one before it; the last one gets the coordinates.
        channels: hidden width.
        kernel_dim: D, channels of the output.
        norm: norm of every convolution.
        is_deformable: whether every convolution is deformable.
        modulated: whether these are modulated (v2).

    Attributes:
        stride: pixels of the input for each pixel of the output.

    Raises:
        ValueError: no feature, one that the backbone does not have, or one that is not half the size of the one before.
    """

    @configurable
    def __init__(
        self,
        *,
        input_shape: dict[str, ShapeSpec],
        in_features: Sequence[str],
        channels: int = 128,
        kernel_dim: int = 256,
        norm: str = "GN",
        is_deformable: bool = False,
        modulated: bool = False,
    ) -> None:
        super().__init__()
        self.in_features = tuple(in_features)
        _check_features(self.in_features, input_shape)
        self.stride = input_shape[self.in_features[0]].stride
        deformable = (is_deformable, modulated)
        last = len(self.in_features) - 1
        self.levels = nn.ModuleList()
        for index, name in enumerate(self.in_features):
            width = input_shape[name].channels + 2 * (index == last)
            widths = [width] + [channels] * (max(1, index) - 1)
            self.levels.append(nn.ModuleList(conv_norm(each, channels, 3, norm, *deformable) for each in widths))
        self.output = conv_norm(channels, kernel_dim, 1, norm, *deformable)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        node = cfg.MODEL.SOLOV2
        return {
            "input_shape": input_shape,
            "in_features": node.MASK_FEATURES.IN_FEATURES,
            "channels": node.MASK_FEATURES.CHANNELS,
            "kernel_dim": node.KERNEL_DIM,
            "norm": node.NORM,
            "is_deformable": bool(node.MASK_FEATURES.DEFORM),
            "modulated": node.DEFORM_MODULATED,
        }

    def forward(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return (B, D, Hm, Wm), never negative, from the backbone's features."""
        total = None
        for index, (name, convs) in enumerate(zip(self.in_features, self.levels)):
            level = features[name]
            if index == len(self.levels) - 1:
                level = torch.cat([level, coordinate_channels(level)], dim=1)
            for conv in convs:
                level = F.relu(conv(level))
                if index > 0:
                    level = upsample(level)
            total = level if total is None else total + level
        return F.relu(self.output(total))


def _check_features(names: Sequence[str], input_shape: dict[str, ShapeSpec]) -> list[int]:
    """Return the strides of the mask-feature head's inputs."""
    key = "MODEL.SOLOV2.MASK_FEATURES.IN_FEATURES"
    missing = [name for name in names if name not in input_shape]
    if missing or not names:
        raise ValueError(f"{key} is {list(names)}; it must be one or more of the backbone's {', '.join(input_shape)}")
    strides = [input_shape[name].stride for name in names]
    if any(coarser != 2 * finer for finer, coarser in zip(strides, strides[1:])):
        raise ValueError(f"{key} is {list(names)} with strides {strides}; each must be twice the one before it")
    return strides


def build_mask_feature_head(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> nn.Module:
    """Build the mask-feature head named by MODEL.SOLOV2.MASK_FEATURES.NAME."""
    return registered(MASK_FEATURE_HEAD_REGISTRY, cfg, "MODEL.SOLOV2.MASK_FEATURES.NAME")(cfg, input_shape)

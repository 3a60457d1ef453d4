"""The heads of SOLO and Decoupled SOLO, and what SOLOv2's head shares with them. Letters: sparseinst.structures.

A level l has a grid of S_l x S_l cells; the cells of a level are numbered by rows. A head returns dense outputs for all
cells; masks of single cells are computed from them on demand, because few of the thousands are ever needed.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.utils.registry import Registry
from torch import nn
from torch.nn import functional as F

from sparseinst.config import registered
from sparseinst.modeling.solo.tower import Tower, init_conv
from sparseinst.ops.coordinates import coordinate_channels
from sparseinst.ops.dense_detections import chosen

SOLO_HEAD_REGISTRY = Registry("SOLO_HEAD")
SOLO_HEAD_REGISTRY.__doc__ = """
Heads of SOLO and SOLOv2: subclasses of GridHead, built as ``Name(cfg, input_shape)`` with the ShapeSpecs of the
backbone by feature name.
"""


def resize(features: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Resize (B, C, h, w) bilinearly, without antialiasing."""
    return F.interpolate(features, size=size, mode="bilinear", align_corners=False)


def upsample(features: torch.Tensor) -> torch.Tensor:
    """Double the size of (B, C, h, w) bilinearly."""
    return F.interpolate(features, scale_factor=2.0, mode="bilinear", align_corners=False)


class GridHead(nn.Module, ABC):
    """Predict categories for every cell of every level, and masks for chosen cells.

    A subclass adds the mask branch to `forward` and implements `mask_probs`.

    Args:
        input_shape: the backbone's ShapeSpecs by feature name.
        in_features: one feature for each level.
        strides: stride of each level's map; features of another stride are resized.
        num_grids: S of each level.
        num_classes: K.
        num_convs: convolutions of the category tower.
        channels: their width.
        norm: their norm.
        deform, modulated: see `Tower`.
        prior_prob: score of every category before training.

    Attributes:
        num_grids: S of each level.
        strides: stride of each level's map.
        mask_strides: pixels of the input for each pixel of the masks of `mask_probs`, by level.
        keeps_every_pair: whether a cell that two objects share learns both masks; otherwise the later object's.
        needs_mask_features: whether `mask_probs` reads the output of a mask-feature head (SOLOv2).

    Raises:
        ValueError: a feature that the backbone does not have, or features of several widths.
    """

    keeps_every_pair = False
    needs_mask_features = False

    def __init__(
        self,
        *,
        input_shape: dict[str, ShapeSpec],
        in_features: Sequence[str],
        strides: Sequence[int],
        num_grids: Sequence[int],
        num_classes: int,
        num_convs: int,
        channels: int,
        norm: str = "GN",
        deform: str = "",
        modulated: bool = False,
        prior_prob: float = 0.01,
    ) -> None:
        super().__init__()
        missing = [name for name in in_features if name not in input_shape]
        if missing:
            raise ValueError(f"IN_FEATURES has {missing}; the backbone has {', '.join(input_shape)}")
        widths = {input_shape[name].channels for name in in_features}
        if len(widths) != 1:
            raise ValueError(f"The features of IN_FEATURES have {sorted(widths)} channels; the levels share one head")
        self.in_features = tuple(in_features)
        self.feature_strides = tuple(input_shape[name].stride for name in in_features)
        self.strides, self.num_grids, self.num_classes = tuple(strides), tuple(num_grids), num_classes
        self.mask_strides = tuple(max(1, stride // 2) for stride in strides)
        self.in_channels = widths.pop()
        self.cate_tower = Tower(self.in_channels, channels, num_convs, norm, deform, modulated)
        self.cate_pred = Conv2d(channels, num_classes, 3, padding=1)
        init_conv(self.cate_pred, prior_prob)

    @classmethod
    def _config_arguments(cls, node: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        """Read the keys that all heads share from MODEL.SOLO or MODEL.SOLOV2."""
        return {
            "input_shape": input_shape,
            "in_features": node.IN_FEATURES,
            "strides": node.STRIDES,
            "num_grids": node.NUM_GRIDS,
            "num_classes": node.NUM_CLASSES,
            "num_convs": node.NUM_CONVS,
            "channels": node.CHANNELS,
            "norm": node.NORM,
            "deform": node.DEFORM,
            "modulated": node.DEFORM_MODULATED,
            "prior_prob": node.PRIOR_PROB,
        }

    @property
    def level_sizes(self) -> list[int]:
        """Return the number of cells of each level."""
        return [size * size for size in self.num_grids]

    def level_features(self, features: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Return one map (B, C, Hp / stride, Wp / stride) for each level.

        Args:
            features: of the backbone, of an input whose sides are multiples of the strides.
        """
        levels = [features[name] for name in self.in_features]
        resized = []
        for level, feature_stride, stride in zip(levels, self.feature_strides, self.strides):
            if feature_stride != stride:
                # The size of a level that has this stride, so that odd sizes agree too.
                index = self.feature_strides.index(stride) if stride in self.feature_strides else None
                size = levels[index].shape[-2:] if index is not None else _scaled(level, feature_stride, stride)
                level = resize(level, size)
            resized.append(level)
        return resized

    def has_finest_masks(self, level: int) -> bool:
        """Return whether maps of half a level's stride have the size of the masks of the finest level.

        Sizes are not compared, so that an exported graph gets no condition on them.
        """
        return self.strides[level] == 2 * min(self.mask_strides)

    def category_logits(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return (B, K, all cells), level after level.

        Args:
            maps: (B, C, S, S) of each level.
        """
        return torch.cat([self.cate_pred(self.cate_tower(level)).flatten(2) for level in maps], dim=2)

    @abstractmethod
    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return ``cate_logits`` (B, K, all cells) and what `mask_probs` reads, from the backbone's features."""

    @abstractmethod
    def mask_probs(
        self,
        outputs: dict[str, torch.Tensor],
        image: int,
        level: int,
        cells: torch.Tensor,
        size: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """Compute the masks of cells in float32.

        Args:
            outputs: of `forward`, and of the mask-feature head where there is one.
            image: index in the batch.
            level: of the cells.
            cells: (n,) int64, indices in the level's grid.
            size: resize to this (height, width) as published; None: the level's own size.

        Returns:
            (n, h, w) in [0, 1], over the padded input.
        """

    def dense_mask_probs(
        self, outputs: dict[str, torch.Tensor], cells: torch.Tensor, size: tuple[int, int]
    ) -> torch.Tensor:
        """Compute the masks of cells of any level in float32, with shapes that do not depend on the cells.

        Args:
            outputs: as in `mask_probs`.
            cells: (B, n) int64, numbered through all levels.
            size: of the masks of the finest level.

        Returns:
            (B, n, *size) in [0, 1], those of `mask_probs`.

        Raises:
            ValueError: the head does not implement this; the default.
        """
        raise ValueError(f"--end-to-end: {type(self).__name__} has no post-processing that can be exported")


def _scaled(level: torch.Tensor, feature_stride: int, stride: int) -> tuple[int, int]:
    return tuple(side * feature_stride // stride for side in level.shape[-2:])


@SOLO_HEAD_REGISTRY.register()
class SOLOHead(GridHead):
    """Predict one mask for each cell by a 1x1 convolution with a row of weights for each (SOLO, section 3).

    `forward` returns ``mask_features_l`` (B, C, h, w), at the level's own stride, and the rows ``mask_weights_l``
    (B, S * S, C) and ``mask_biases_l`` (B, S * S), the same for each image. As published the features are enlarged
    twofold before the convolution; the two commute, so the rows of the wanted cells alone are applied first, which is
    the same function.
    """

    @configurable
    def __init__(self, *, num_convs: int, channels: int, norm: str = "GN", **shared) -> None:
        super().__init__(num_convs=num_convs, channels=channels, norm=norm, **shared)
        deform, modulated = shared.get("deform", ""), shared.get("modulated", False)
        self.mask_tower = Tower(self.in_channels + 2, channels, num_convs, norm, deform, modulated)
        self.mask_pred = nn.ModuleList(Conv2d(channels, cells, 1) for cells in self.level_sizes)
        for conv in self.mask_pred:
            init_conv(conv, shared.get("prior_prob", 0.01))

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        return cls._config_arguments(cfg.MODEL.SOLO, input_shape)

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the outputs; see the class."""
        levels = self.level_features(features)
        outputs = {"cate_logits": self.category_logits([resize(x, (s, s)) for x, s in zip(levels, self.num_grids)])}
        for index, (level, conv) in enumerate(zip(levels, self.mask_pred)):
            outputs[f"mask_features_{index}"] = self.mask_tower(torch.cat([level, coordinate_channels(level)], dim=1))
            outputs[f"mask_weights_{index}"] = conv.weight.flatten(1).expand(level.shape[0], -1, -1)
            outputs[f"mask_biases_{index}"] = conv.bias.expand(level.shape[0], -1)
        return outputs

    def mask_logits(
        self, outputs: dict[str, torch.Tensor], image: int, level: int, cells: torch.Tensor
    ) -> torch.Tensor:
        """Return the mask logits (n, 2h, 2w) of cells, float32; see `mask_probs`."""
        features = outputs[f"mask_features_{level}"][image].float()
        rows = outputs[f"mask_weights_{level}"][image].index_select(0, cells).float()
        biases = outputs[f"mask_biases_{level}"][image].index_select(0, cells).float()
        logits = torch.addmm(biases[:, None], rows, features.flatten(1))
        return upsample(logits.unflatten(1, features.shape[1:])[:, None])[:, 0]

    def mask_probs(
        self,
        outputs: dict[str, torch.Tensor],
        image: int,
        level: int,
        cells: torch.Tensor,
        size: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """Return the sigmoids of the mask logits, then resize them; see the base class."""
        return resized_probs(self.mask_logits(outputs, image, level, cells).sigmoid(), size)

    def dense_mask_probs(
        self, outputs: dict[str, torch.Tensor], cells: torch.Tensor, size: tuple[int, int]
    ) -> torch.Tensor:
        """Apply the cells' rows to the features of each level, and choose the cell's level; see the base class."""
        levels = range(len(self.num_grids))
        rows = chosen(torch.cat([outputs[f"mask_weights_{level}"] for level in levels], dim=1).float(), cells)
        biases = torch.cat([outputs[f"mask_biases_{level}"] for level in levels], dim=1).float().gather(1, cells)
        probs, start = None, 0
        for level, count in enumerate(self.level_sizes):
            features = outputs[f"mask_features_{level}"].float()
            logits = rows @ features.flatten(2) + biases[..., None]
            level_probs = upsample(logits.unflatten(2, features.shape[2:])).sigmoid()
            if not self.has_finest_masks(level):
                level_probs = resize(level_probs, size)
            is_finer = (cells < start)[..., None, None]
            probs = level_probs if probs is None else torch.where(is_finer, probs, level_probs)
            start += count
        return probs


def resized_probs(probs: torch.Tensor, size: tuple[int, int] | None) -> torch.Tensor:
    """Resize probabilities (n, h, w) bilinearly where a size is given."""
    if size is None or tuple(probs.shape[-2:]) == tuple(size):
        return probs
    return resize(probs[:, None], size)[:, 0]


@SOLO_HEAD_REGISTRY.register()
class DecoupledSOLOHead(GridHead):
    """Predict masks as products of a map for the column and a map for the row (SOLO, section 3.4).

    `forward` returns ``mask_logits_x_l`` and ``mask_logits_y_l`` (B, S, h, w), at half the level's stride. The mask of
    cell (row i, column j) is sigmoid(x_j) * sigmoid(y_i).
    """

    @configurable
    def __init__(self, *, num_convs: int, channels: int, norm: str = "GN", **shared) -> None:
        super().__init__(num_convs=num_convs, channels=channels, norm=norm, **shared)
        deform, modulated = shared.get("deform", ""), shared.get("modulated", False)
        self._add_towers(channels, num_convs, norm, deform, modulated)
        self.mask_pred_x = nn.ModuleList(Conv2d(channels, size, 3, padding=1) for size in self.num_grids)
        self.mask_pred_y = nn.ModuleList(Conv2d(channels, size, 3, padding=1) for size in self.num_grids)
        for conv in (*self.mask_pred_x, *self.mask_pred_y):
            init_conv(conv, shared.get("prior_prob", 0.01))

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        return cls._config_arguments(cfg.MODEL.SOLO, input_shape)

    def _add_towers(self, channels: int, num_convs: int, norm: str, deform: str, modulated: bool) -> None:
        self.mask_tower_x = Tower(self.in_channels + 1, channels, num_convs, norm, deform, modulated)
        self.mask_tower_y = Tower(self.in_channels + 1, channels, num_convs, norm, deform, modulated)

    def _tower_maps(self, level: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        coordinates = coordinate_channels(level)
        return (
            self.mask_tower_x(torch.cat([level, coordinates[:, :1]], dim=1)),
            self.mask_tower_y(torch.cat([level, coordinates[:, 1:]], dim=1)),
        )

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the outputs; see the class."""
        levels = self.level_features(features)
        outputs = {"cate_logits": self.category_logits([resize(x, (s, s)) for x, s in zip(levels, self.num_grids)])}
        for index, level in enumerate(levels):
            for axis, maps, convs in zip("xy", self._tower_maps(level), (self.mask_pred_x, self.mask_pred_y)):
                outputs[f"mask_logits_{axis}_{index}"] = convs[index](upsample(maps))
        return outputs

    def mask_probs(
        self,
        outputs: dict[str, torch.Tensor],
        image: int,
        level: int,
        cells: torch.Tensor,
        size: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """Resize both factors, then multiply them; see the base class."""
        num_columns = self.num_grids[level]
        factors = []
        for axis, indices in (("x", cells % num_columns), ("y", cells // num_columns)):
            # Cells share rows and columns, so that each is resized once.
            used, position = indices.unique(return_inverse=True)
            logits = outputs[f"mask_logits_{axis}_{level}"][image].index_select(0, used).float()
            factors.append(resized_probs(logits.sigmoid(), size).index_select(0, position))
        return factors[0] * factors[1]

    def dense_mask_probs(
        self, outputs: dict[str, torch.Tensor], cells: torch.Tensor, size: tuple[int, int]
    ) -> torch.Tensor:
        """Resize the factors of all columns and rows, then multiply those of the cells; see the base class."""
        in_grid = [torch.arange(count, device=cells.device) for count in self.level_sizes]
        starts = [sum(self.num_grids[:level]) for level in range(len(self.num_grids))]
        columns = [start + each % s for each, start, s in zip(in_grid, starts, self.num_grids)]
        rows = [start + each // s for each, start, s in zip(in_grid, starts, self.num_grids)]
        factors = []
        for axis, indices in (("x", columns), ("y", rows)):
            probs = [outputs[f"mask_logits_{axis}_{level}"].float().sigmoid() for level in range(len(self.num_grids))]
            resized = [each if self.has_finest_masks(level) else resize(each, size) for level, each in enumerate(probs)]
            factors.append(chosen(torch.cat(resized, dim=1), torch.cat(indices)[cells]))
        return factors[0] * factors[1]


@SOLO_HEAD_REGISTRY.register()
class DecoupledSOLOLightHead(DecoupledSOLOHead):
    """Feed both kinds of maps by one tower with both coordinates."""

    def _add_towers(self, channels: int, num_convs: int, norm: str, deform: str, modulated: bool) -> None:
        self.mask_tower = Tower(self.in_channels + 2, channels, num_convs, norm, deform, modulated)

    def _tower_maps(self, level: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        maps = self.mask_tower(torch.cat([level, coordinate_channels(level)], dim=1))
        return maps, maps


def build_solo_head(cfg: CfgNode, input_shape: dict[str, ShapeSpec], node_name: str) -> GridHead:
    """Build the head named by MODEL.SOLO.HEAD or MODEL.SOLOV2.HEAD."""
    return registered(SOLO_HEAD_REGISTRY, cfg, f"{node_name}.HEAD")(cfg, input_shape)

"""The levels of a PlacedIAMDecoder: the decoder's map, and the same map with cells of 2, 4 and 8 times the size.

An object belongs to the level on which it is about `OBJECT_CELLS` cells large, as in feature pyramids (arXiv
1612.03144). The same layers run on every level, so they learn from objects of all sizes. The cells of all levels form
one row, finest level first: T cells. Letters: sparseinst.structures.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from sparseinst.ops.coordinates import relative_centers
from sparseinst.ops.losses import center_heatmap, masks_on_grid

# Pixels. The sides of images are multiples of it, so cells of this size cover them.
COARSEST_STRIDE = 32
# Side of an object in cells of its level: the geometric mean of height and width.
OBJECT_CELLS = 6.0
# On a level this far from its own size an instance is background in full. Neighboring levels have a distance of 1.
FAR_LEVEL = 1.5
# One level suits objects whose sides differ by less than this factor, and are below this number of pixels in training.
# Measured in docs/own_data.md: better for factors of 3.6 and 4.1, objects of up to 105 pixels; worse for factors of 24
# and 32. Between them nothing was measured.
ONE_LEVEL_SPREAD, ONE_LEVEL_SIDE = 8.0, 150.0
# Standard deviation of the Gaussian of each activation map, in cells of its level.
MAP_RADIUS = 1.5
# Logit of an activation map on the other levels.
OTHER_LEVEL = -1000.0
# Subtracted from other cells, so that they rank behind the peaks.
NOT_A_PEAK = 100.0


def halved_maps(features: torch.Tensor, num_levels: int) -> list[torch.Tensor]:
    """Return a map (B, C, H, W) and its means over two by two cells, (B, C, H / 2, W / 2), and so on."""
    levels = [features]
    for _ in range(num_levels - 1):
        levels.append(F.avg_pool2d(levels[-1], 2))
    return levels


class LevelCells(NamedTuple):
    """The cells of all levels.

    Attributes:
        rows, columns, levels: (T,) int64: row and column on the cell's level, and the level from 0.
        centers: (T, 2) float32 y and x of the cell's center, in shares of the map.
        object_size: (T, 2) float32 height and width of `OBJECT_CELLS` cells of the level, in shares of the map.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    levels: torch.Tensor
    centers: torch.Tensor
    object_size: torch.Tensor

    @classmethod
    def of(cls, sizes: list[tuple[int, int]], device: torch.device) -> "LevelCells":
        """Return the cells of levels with these heights and widths."""
        parts = []
        for level, size in enumerate(sizes):
            height, width = size
            # Nothing divides by a size: ONNX's exporter has no remainder by a size that is data.
            rows, columns = (torch.arange(side, device=device) for side in size)
            y, x = (relative_centers(side, device) for side in size)
            over = [each[:, None].expand(-1, width).flatten() for each in (rows, y)]
            along = [each.expand(height, -1).flatten() for each in (columns, x)]
            # The first center lies half a cell from the edge.
            object_size = 2 * OBJECT_CELLS * torch.stack([y[0], x[0]])
            parts.append(
                (
                    over[0],
                    along[0],
                    torch.full_like(over[0], level),
                    torch.stack([over[1], along[1]], dim=1),
                    object_size.expand(over[0].shape[0], -1),
                )
            )
        return cls(*(torch.cat(each) for each in zip(*parts)))


@torch.no_grad()
def highest_peaks(
    heat_logits: torch.Tensor, sizes: list[tuple[int, int]], num_peaks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the N highest peaks of a heat map (B, K, T), best first: cells and classes (B, N) int64.

    A peak is not lower than its eight neighbors on its level in the map of its class, so one cell can have peaks of
    several classes. Where there are too few, the highest other values follow, and where the map has fewer than N, its
    last value again.

    Args:
        heat_logits: (B, K, T).
        sizes: height and width of each level.
        num_peaks: N.
    """
    ranked = []
    for logits in split_levels(heat_logits.float(), sizes):
        is_peak = F.max_pool2d(logits, 3, stride=1, padding=1) == logits
        ranked.append(torch.where(is_peak, logits, logits - NOT_A_PEAK).flatten(2))
    ranked = torch.cat(ranked, dim=2)
    num_classes, num_cells = ranked.shape[1:]
    ranked = ranked.flatten(1)
    # Padded, so that an exported graph holds for small images, too.
    peaks = F.pad(ranked, (0, num_peaks), value=-torch.inf).topk(num_peaks, dim=1).indices
    peaks = peaks.clamp(max=ranked.shape[1] - 1)
    # Looked up: see LevelCells.
    classes, cells = (torch.arange(size, device=peaks.device) for size in (num_classes, num_cells))
    return cells.expand(num_classes, -1).flatten()[peaks], classes[:, None].expand(-1, num_cells).flatten()[peaks]


def split_levels(maps: torch.Tensor, sizes: list[tuple[int, int]]) -> list[torch.Tensor]:
    """Return maps (B, C, T) as one (B, C, height, width) for each level."""
    parts = maps.split([height * width for height, width in sizes], dim=2)
    return [part.unflatten(2, size) for part, size in zip(parts, sizes)]


def placed_maps(cells: torch.Tensor, grid: LevelCells) -> torch.Tensor:
    """Return logits (B, N, T) that fall with the squared distance from each cell; cells (B, N) int64 in [0, T)."""
    y, x = (steps - steps[cells][..., None] for steps in (grid.rows, grid.columns))
    is_same = grid.levels == grid.levels[cells][..., None]
    return torch.where(is_same, (y.square() + x.square()) * (-1 / (2 * MAP_RADIUS**2)), OTHER_LEVEL)


def on_finest_level(maps: torch.Tensor, cells: torch.Tensor, grid: LevelCells, sizes: list) -> torch.Tensor:
    """Return the part of each map (B, N, T) on the level of its cell (B, N), enlarged to the finest: (B, N, H, W)."""
    levels = grid.levels[cells][..., None, None]
    enlarged = maps.new_zeros(())
    for level, part in enumerate(split_levels(maps, sizes)):
        part = F.interpolate(part, size=sizes[0], mode="bilinear", align_corners=False)
        enlarged = torch.where(levels == level, part, enlarged)
    return enlarged


def levels_of(gt_boxes: torch.Tensor, size: tuple[int, int], num_levels: int) -> torch.Tensor:
    """Return the level of each instance as a number between the levels, (M,) float32 in [0, num_levels - 1].

    Args:
        gt_boxes: (M, 4) x0, y0, x1, y1 in shares of the map.
        size: height and width of the finest level.
        num_levels: levels.
    """
    sides = (gt_boxes[:, 2:] - gt_boxes[:, :2]) * gt_boxes.new_tensor([size[1], size[0]])
    return (sides.prod(1).sqrt() / OBJECT_CELLS).log2().clamp(0, num_levels - 1)


def why_one_level(sides: np.ndarray) -> str:
    """Return why one level suits objects with these sides, (N,) pixels in training; an empty text where it does not."""
    small, large = np.percentile(sides, (5, 95)) if len(sides) else (0, 0)
    if not large < min(ONE_LEVEL_SPREAD * small, ONE_LEVEL_SIDE):
        return ""
    return f"because for 90 % of the objects sqrt(width * height) is {small:.0f} to {large:.0f} pixels in training"


def heatmap_of_levels(
    gt_masks: torch.Tensor,
    gt_classes: torch.Tensor,
    levels: torch.Tensor,
    sizes: list[tuple[int, int]],
    num_classes: int,
    num_cells: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the heat map of one image's instances over all levels; see `center_heatmap`.

    Each instance has its center on the nearest level. On the next one, which may be almost as near, it has a lower
    Gaussian, so that the loss of the background is smaller there.

    Args:
        gt_masks: (M, Hm, Wm) in [0, 1].
        gt_classes: (M,) int64 in [0, K).
        levels: what `levels_of` returned.
        sizes: height and width of each level.
        num_classes: K.
        num_cells: C.

    Returns:
        (K, T) float32, the heat map; (K, T) bool: True at the centers; (M, C) int64 in [0, T): the cells of each
        instance, the center first.
    """
    heats, start = [], 0
    nearest_levels = levels.round()
    cells = gt_classes.new_zeros((len(gt_classes), num_cells))
    for level, size in enumerate(sizes):
        weights = (FAR_LEVEL - (levels - level).abs()).clamp(0, 1)
        is_near = weights > 0
        coarse = masks_on_grid(gt_masks[is_near], size)
        heat, nearest = center_heatmap(coarse, gt_classes[is_near], num_classes, num_cells, weights[is_near])
        heats.append(heat.flatten(1))
        is_here = nearest_levels == level
        cells[is_here] = nearest[is_here[is_near]] + start
        start += size[0] * size[1]
    heat = torch.cat(heats, dim=1)
    is_center = torch.zeros_like(heat, dtype=torch.bool)
    is_center[gt_classes, cells[:, 0]] = True
    return heat, is_center, cells

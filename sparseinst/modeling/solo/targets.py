"""Grid targets of SOLO and SOLOv2: which cells learn which object. Letters: sparseinst.structures.

Source: SOLO, section 3.3.1, and the released models. Nothing here has a gradient.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from detectron2.structures import Instances

from sparseinst.ops.masks import masks_to_boxes
from sparseinst.structures.gt_masks import padded_masks


class GridSpec(NamedTuple):
    """Grids of all levels.

    Attributes:
        num_grids: S of each level.
        scale_ranges: smallest and largest sqrt(width * height) of the boxes of each level, pixels, both included.
        mask_strides: pixels of the input for each pixel of the mask targets of each level.
        sigma: share of the box around the center of mass whose cells are positive.
        keeps_every_pair: a cell that several objects share learns all their masks; otherwise the last object's.
    """

    num_grids: tuple[int, ...]
    scale_ranges: tuple[tuple[float, float], ...]
    mask_strides: tuple[int, ...]
    sigma: float
    keeps_every_pair: bool


class LevelTargets(NamedTuple):
    """Targets of one level of one image; P pairs of a cell and an object.

    Attributes:
        categories: (S * S,) int64, the class of each cell, -1 for background.
        cells: (P,) int64, in order of the objects, or ascending where a cell has one mask.
        objects: (P,) int64, index of the pair's object in the image.
        num_overwritten: cells whose class a later object has taken from an earlier one.
    """

    categories: torch.Tensor
    cells: torch.Tensor
    objects: torch.Tensor
    num_overwritten: int


class GridTargets(NamedTuple):
    """Targets of one image.

    Attributes:
        levels: of each level.
        masks: for each mask stride the masks of all objects, (M, Hp / stride, Wp / stride) bool.
        classes: (M,) int64, of all objects.
    """

    levels: list[LevelTargets]
    masks: dict[int, torch.Tensor]
    classes: torch.Tensor


@torch.no_grad()
def grid_targets(
    instances: Instances, padded_size: tuple[int, int], spec: GridSpec, device: torch.device
) -> GridTargets:
    """Return the targets of one image.

    Args:
        instances: with ``gt_classes``, ``gt_masks`` and, where the loader gives them, ``gt_boxes``: Detectron2's
            mapper gives the boxes of the annotations; this package's those of the masks, as without ``gt_boxes``.
        padded_size: of the network's input: the grids cover the padding too, as published.
        spec: the grids.
        device: where the targets are wanted.
    """
    classes = instances.gt_classes.tolist()
    strides = sorted(set(spec.mask_strides))
    reduced: dict[int, list[torch.Tensor]] = {stride: [] for stride in strides}
    centers, mask_boxes = [], []
    for masks in padded_masks(instances, padded_size, device):
        masks = masks >= 0.5 if masks.is_floating_point() else masks
        centers.append(centers_of_mass(masks))
        mask_boxes.append(masks_to_boxes(masks))
        for stride in strides:
            reduced[stride].append(reduce_masks(masks, stride))
    if not centers:
        empty = torch.zeros((0, *padded_size), dtype=torch.bool, device=device)
        reduced = {stride: [reduce_masks(empty, stride)] for stride in strides}
    centers = torch.cat(centers).cpu().numpy() if centers else np.zeros((0, 2))
    if instances.has("gt_boxes"):
        boxes = instances.gt_boxes.tensor.double().cpu().numpy()
    else:
        boxes = torch.cat(mask_boxes).double().cpu().numpy() if mask_boxes else np.zeros((0, 4))
    levels = [
        _level_targets(classes, centers, boxes, padded_size, size, scale_range, spec, device)
        for size, scale_range in zip(spec.num_grids, spec.scale_ranges)
    ]
    masks = {stride: torch.cat(parts) for stride, parts in reduced.items()}
    return GridTargets(levels, masks, instances.gt_classes.to(device))


def _level_targets(
    classes: Sequence[int],
    centers: np.ndarray,
    boxes: np.ndarray,
    padded_size: tuple[int, int],
    size: int,
    scale_range: tuple[float, float],
    spec: GridSpec,
    device: torch.device,
) -> LevelTargets:
    categories = np.full(size * size, -1, dtype=np.int64)
    owners = np.full(size * size, -1, dtype=np.int64)
    cells, objects, num_overwritten = [], [], 0
    for index, (category, center, box) in enumerate(zip(classes, centers, boxes)):
        if not is_in_range(box, scale_range) or math.isnan(center[0]):
            continue
        own = positive_cells(center, box, padded_size, size, spec.sigma)
        num_overwritten += int((owners[own] >= 0).sum())
        categories[own], owners[own] = category, index
        cells.append(own)
        objects.append(np.full(len(own), index))
    if not spec.keeps_every_pair:
        cells = [np.flatnonzero(owners >= 0)]
        objects = [owners[cells[0]]]
    cells, objects = (np.concatenate([*parts, np.zeros(0)]).astype(np.int64) for parts in (cells, objects))
    return LevelTargets(
        *(torch.from_numpy(array).to(device) for array in (categories, cells, objects)), num_overwritten
    )


def is_in_range(box: Sequence[float], scale_range: tuple[float, float]) -> bool:
    """Return whether a level learns an object: sqrt(width * height) of its box (x0, y0, x1, y1) lies in the range."""
    x0, y0, x1, y1 = box
    return scale_range[0] <= math.sqrt(max(0.0, (x1 - x0) * (y1 - y0))) <= scale_range[1]


def positive_cells(
    center: Sequence[float], box: Sequence[float], padded_size: tuple[int, int], size: int, sigma: float
) -> np.ndarray:
    """Return the cells of an object, by rows: at most 3x3 around the cell of its center of mass.

    Args:
        center: (y, x) of the center of mass, pixels.
        box: (x0, y0, x1, y1), pixels.
        padded_size: (height, width) that the grid covers.
        size: S.
        sigma: share of the box around the center.
    """
    ranges = []
    for middle, extent, length in zip(center, (box[3] - box[1], box[2] - box[0]), padded_size):
        half = 0.5 * sigma * extent
        first, cell, last = (math.floor(value * size / length) for value in (middle - half, middle, middle + half))
        ranges.append(np.arange(max(first, cell - 1, 0), min(last, cell + 1, size - 1) + 1))
    return (ranges[0][:, None] * size + ranges[1]).ravel()


def centers_of_mass(masks: torch.Tensor) -> torch.Tensor:
    """Return the mean pixel indices (M, 2) float64 (y, x) of masks (M, h, w) bool; NaN for an empty mask."""
    centers = []
    for dim, length in ((2, masks.shape[1]), (1, masks.shape[2])):
        counts = masks.sum(dim).double()
        centers.append(counts @ torch.arange(length, dtype=torch.float64, device=masks.device) / counts.sum(1))
    return torch.stack(centers, dim=1)


def reduce_masks(masks: torch.Tensor, stride: int) -> torch.Tensor:
    """Reduce masks bilinearly by a whole factor, and threshold at one half.

    Bilinear resizing by an even factor averages the central 2x2 pixels of each block, by an odd one it takes the
    central pixel; two of four pixels count as 1.

    Args:
        masks: (M, h, w) bool; the sides are multiples of the stride.
        stride: the factor.

    Returns:
        (M, h / stride, w / stride) bool.
    """
    if stride % 2:
        return masks[:, stride // 2 :: stride, stride // 2 :: stride]
    middle = stride // 2
    counts = sum(
        masks[:, middle - 1 + row :: stride, middle - 1 + column :: stride].to(torch.uint8)
        for row in (0, 1)
        for column in (0, 1)
    )
    return counts >= 2

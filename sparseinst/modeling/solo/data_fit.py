"""Say how the objects of a data set fall into the grids and ranges of SOLO and SOLOv2, and propose others."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from sparseinst.modeling.meta_arch import ImageObjects
from sparseinst.modeling.solo.targets import is_in_range, positive_cells

# Sides of the grids that are proposed, smallest first; 40 is the largest published one.
_GRIDS = tuple(range(8, 44, 4))
# A proposed grid is the smallest in which at most this share of a level's objects shares a cell.
_MOST_SHARING = 0.01
# The levels are laid over the sizes between these percentiles; the first and last range hold the rest.
_PERCENTILES = (2, 98)
# Largest size of the last published range.
_NO_LIMIT = 2048
# Images that a proposal is computed from, evenly taken.
_MOST_IMAGES = 2000


class Fit(NamedTuple):
    """Shares of a data set's objects, in [0, 1].

    Attributes:
        in_no_range: no level learns the object.
        on_one_level: one level learns it; the published ranges overlap, so that most objects have two.
        sharing: a cell of the object, on any level, is a cell of another object too.
        lost: on all its levels all its cells are taken by later objects of the image.
    """

    in_no_range: float
    on_one_level: float
    sharing: float
    lost: float

    def text(self) -> str:
        """Return the shares in words."""
        return (
            f"{self.in_no_range:.1%} of the objects in no range, {self.on_one_level:.1%} on one level, "
            f"{self.sharing:.1%} share a cell with another object, {self.lost:.1%} lose all cells to later objects"
        )


def describe_fit(
    images: Sequence[ImageObjects],
    node_name: str,
    num_grids: Sequence[int],
    scale_ranges: Sequence[Sequence[float]],
    sigma: float,
) -> Iterator[str]:
    """Yield lines with the fit of a config's grids and ranges, and of proposed ones.

    Args:
        images: at the training's size.
        node_name: of the keys, for the lines.
        num_grids: S of each level.
        scale_ranges: smallest and largest sqrt(width * height) of each level, pixels.
        sigma: share of the box around the center of mass whose cells are positive.
    """
    if not any(len(image.boxes) for image in images):
        return
    sample = images[:: math.ceil(len(images) / _MOST_IMAGES)]
    yield f"{node_name}: {measure_fit(sample, num_grids, scale_ranges, sigma).text()}"
    ranges = propose_ranges(sample, len(scale_ranges))
    grids = [propose_grid(sample, scale_range, sigma) for scale_range in ranges]
    yield (
        f"  with {node_name}.SCALE_RANGES {ranges} {node_name}.NUM_GRIDS {grids}: "
        f"{measure_fit(sample, grids, ranges, sigma).text()}"
    )


def measure_fit(
    images: Sequence[ImageObjects],
    num_grids: Sequence[int],
    scale_ranges: Sequence[Sequence[float]],
    sigma: float,
) -> Fit:
    """Return how the objects of images fall into grids and ranges; NaN without objects. Arguments: `describe_fit`."""
    counts = np.zeros(4)
    for image in images:
        num_levels, sharing, lost = (np.zeros(len(image.boxes), dtype) for dtype in (int, bool, bool))
        lost[:] = True
        for size, scale_range in zip(num_grids, scale_ranges):
            objects, cells = _pairs(image, size, scale_range, sigma)
            num_levels[np.unique(objects)] += 1
            _, cell, num_owners = np.unique(cells, return_inverse=True, return_counts=True)
            sharing[objects[num_owners[cell] > 1]] = True
            owners = dict(zip(cells.tolist(), objects.tolist()))
            lost[list(owners.values())] = False
        counts += (num_levels == 0).sum(), (num_levels == 1).sum(), sharing.sum(), (lost & (num_levels > 0)).sum()
    num_objects = sum(len(image.boxes) for image in images)
    return Fit(*(counts / num_objects if num_objects else counts * math.nan).tolist())


def propose_ranges(images: Sequence[ImageObjects], num_levels: int) -> list[list[int]]:
    """Return SCALE_RANGES in which each object lies on about two levels, as in the published ones.

    The centers of the ranges form a geometric series over the objects' sizes, and each range reaches from the center
    before it to the center after it.

    Args:
        images: at the training's size, with at least one object.
        num_levels: number of ranges.
    """
    sizes = np.concatenate([np.sqrt(_areas(image.boxes)) for image in images])
    smallest, largest = np.percentile(sizes.clip(min=1), _PERCENTILES)
    step = max(math.sqrt(2), (largest / smallest) ** (1 / max(1, num_levels - 1)))
    middle = math.sqrt(smallest * largest)
    centers = [middle * step ** (level - (num_levels - 1) / 2) for level in range(num_levels)]
    ranges = [[round(center / step), round(center * step)] for center in centers]
    ranges[0][0], ranges[-1][1] = 1, max(_NO_LIMIT, ranges[-1][1])
    return [[low, max(low, high)] for low, high in ranges]


def propose_grid(images: Sequence[ImageObjects], scale_range: Sequence[float], sigma: float) -> int:
    """Return the smallest grid in which few of a level's objects share a cell. Arguments: `describe_fit`."""
    return next(
        (size for size in _GRIDS if not measure_fit(images, [size], [scale_range], sigma).sharing > _MOST_SHARING),
        _GRIDS[-1],
    )


def _pairs(image: ImageObjects, size: int, scale_range: Sequence[float], sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs of an object and a cell of one level: two arrays of equal length."""
    objects, cells = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for index, (center, box) in enumerate(zip(image.centers, image.boxes)):
        if is_in_range(box, scale_range):
            own = positive_cells(center, box, image.padded_size, size, sigma)
            objects.append(np.full(len(own), index))
            cells.append(own)
    return np.concatenate(objects), np.concatenate(cells)


def _areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def size_warnings(
    node_name: str, scale_ranges: Sequence[Sequence[float]], short_sides: Sequence[int], longest_side: int
) -> Iterator[str]:
    """Yield warnings where the ranges do not fit the size of the training's images.

    Args:
        node_name: of the keys, for the warnings.
        scale_ranges: smallest and largest sqrt(width * height) of each level, pixels.
        short_sides: INPUT.MIN_SIZE_TRAIN.
        longest_side: INPUT.MAX_SIZE_TRAIN.
    """
    # A short side of 0: images keep their size.
    if min(short_sides) == 0:
        return
    largest = math.sqrt(max(short_sides) * longest_side)
    remedy = f"`sparseinst check` proposes {node_name}.SCALE_RANGES and NUM_GRIDS for a data set"
    unused = [list(scale_range) for scale_range in scale_ranges if scale_range[0] > largest]
    sizes = f"INPUT.MIN_SIZE_TRAIN {max(short_sides)} and MAX_SIZE_TRAIN {longest_side}"
    if unused:
        yield (
            f"{node_name}.SCALE_RANGES belong to larger images: no object is in {unused}, since with {sizes} none is "
            f"above {largest:.0f} pixels. {remedy}"
        )
    most = max(high for _, high in scale_ranges)
    if most < largest / 2:
        yield (
            f"{node_name}.SCALE_RANGES belong to smaller images: objects above {most:g} pixels are not learned, and "
            f"with {sizes} they have up to {largest:.0f}. {remedy}"
        )

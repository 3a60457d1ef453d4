"""Say how the objects of a data set fall into the grids and ranges of SOLO and SOLOv2, and propose others."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from sparseinst.modeling.solo.targets import is_in_range, positive_cells
from sparseinst.structures.image_objects import ImageObjects

# Sides of the grids that are proposed: multiples of this, and the largest published one.
_GRID_STEP, _MOST_CELLS = 4, 40
# A range's middle size has at least this many cells along its side, as in the published configs.
_CELLS_PER_SIZE = 5
# A proposed grid is larger where this share of a level's objects would be learned by no cell.
_MOST_LOST = 0.01
# The levels are laid over the sizes between these percentiles; the first and last range hold the rest.
_PERCENTILES = (2, 98)
# A level begins at this many pixels of its map.
_LEAST_PIXELS = 2
# Largest size of the last published range.
_NO_LIMIT = 2048
# The last published range begins at 0.36 to 0.39 of the largest possible size.
_LAST_SHARE = 0.5
# Images that are measured, evenly taken.
_MOST_IMAGES = 500


class Fit(NamedTuple):
    """Shares of a data set's objects, in [0, 1].

    Attributes:
        in_no_range: no level learns the object.
        on_one_level: one level learns it; the published ranges overlap, so that most objects have two.
        sharing: a cell of the object, on any level, is a cell of another object too.
        lost: on all its levels all its cells are taken by later objects of the image, so that no cell learns its class.
    """

    in_no_range: float
    on_one_level: float
    sharing: float
    lost: float

    def text(self) -> str:
        """Return the shares in words."""
        return (
            f"{self.in_no_range:.1%} of the objects in no range, {self.on_one_level:.1%} on one level, "
            f"{self.sharing:.1%} share a cell with another object, {self.lost:.1%} have their class in no cell"
        )


def describe_fit(
    images: Sequence[ImageObjects],
    node_name: str,
    strides: Sequence[int],
    num_grids: Sequence[int],
    scale_ranges: Sequence[Sequence[float]],
    sigma: float,
) -> Iterator[str]:
    """Yield lines with the fit of a config's grids and ranges, and of proposed ones.

    Args:
        images: at the training's size.
        node_name: of the keys, for the lines.
        strides: of each level's map.
        num_grids: S of each level.
        scale_ranges: smallest and largest sqrt(width * height) of each level, pixels.
        sigma: share of the box around the center of mass whose cells are positive.
    """
    images = [image for image in images if len(image.boxes)]
    if not images:
        return
    images = images[:: math.ceil(len(images) / _MOST_IMAGES)]
    yield f"{node_name}, at the training's largest size, each image padded alone:"
    yield f"  now: {measure_fit(images, num_grids, scale_ranges, sigma).text()}"
    ranges = propose_ranges(images, strides)
    grids = [
        propose_grid(images, stride, scale_range, sigma) for stride, scale_range in zip(strides, ranges, strict=True)
    ]
    yield f"  with {node_name}.SCALE_RANGES {ranges} {node_name}.NUM_GRIDS {grids}:"
    yield f"  {measure_fit(images, grids, ranges, sigma).text()}"


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


def propose_ranges(images: Sequence[ImageObjects], strides: Sequence[int]) -> list[list[int]]:
    """Return SCALE_RANGES in which each object lies on about two levels, as in the published ones.

    The centers of the ranges form a geometric series over the objects' sizes, and each range reaches from the center
    before it to the center after it. No level begins below two pixels of its map.

    Args:
        images: at the training's size, with at least one object.
        strides: of each level's map.
    """
    sizes = np.concatenate([_sizes(image) for image in images])
    smallest, largest = np.percentile(sizes.clip(min=1), _PERCENTILES)
    num_levels = len(strides)
    step = max(math.sqrt(2), (largest / smallest) ** (1 / max(1, num_levels - 1)))
    middle = math.sqrt(smallest * largest)
    centers = [middle * step ** (level - (num_levels - 1) / 2) for level in range(num_levels)]
    lows = [round(max(center / step, _LEAST_PIXELS * stride)) for center, stride in zip(centers, strides)]
    lows = [1, *np.maximum.accumulate(lows)[1:].tolist()]
    # Every size between two levels lies on both.
    highs = [max(round(center * step), 2 * low) for center, low in zip(centers, [*lows[1:], _NO_LIMIT])]
    return [[low, high] for low, high in zip(lows, highs)]


def propose_grid(images: Sequence[ImageObjects], stride: int, scale_range: Sequence[float], sigma: float) -> int:
    """Return a grid whose cells are small compared with the objects, and in which few objects of the level are lost.

    Args:
        images: at the training's size.
        stride: of the level's map, which has no more cells than pixels.
        scale_range: of the level.
        sigma: share of the box around the center of mass whose cells are positive.
    """
    side = float(np.median([min(image.padded_size) for image in images]))
    low, high = scale_range
    middle = max(math.sqrt(low * high), high / 2) if low == 1 else 2 * low
    most = max(_GRID_STEP, min(_MOST_CELLS, math.ceil(side / stride / _GRID_STEP) * _GRID_STEP))
    wanted = math.ceil(_CELLS_PER_SIZE * side / middle / _GRID_STEP) * _GRID_STEP
    in_level = [_in_range(image, scale_range) for image in images]
    for size in range(min(most, max(2 * _GRID_STEP, wanted)), most, _GRID_STEP):
        if not measure_fit(in_level, [size], [scale_range], sigma).lost > _MOST_LOST:
            return size
    return most


def _in_range(image: ImageObjects, scale_range: Sequence[float]) -> ImageObjects:
    kept = [is_in_range(box, scale_range) for box in image.boxes]
    return image._replace(boxes=image.boxes[kept], centers=image.centers[kept])


def _pairs(image: ImageObjects, size: int, scale_range: Sequence[float], sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs of an object and a cell of one level: two arrays of equal length."""
    objects, cells = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for index, (center, box) in enumerate(zip(image.centers, image.boxes)):
        if is_in_range(box, scale_range):
            own = positive_cells(center, box, image.padded_size, size, sigma)
            objects.append(np.full(len(own), index))
            cells.append(own)
    return np.concatenate(objects), np.concatenate(cells)


def _sizes(image: ImageObjects) -> np.ndarray:
    x0, y0, x1, y1 = image.boxes.T
    return np.sqrt((x1 - x0) * (y1 - y0))


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
    sizes = f"INPUT.MIN_SIZE_TRAIN {max(short_sides)} and MAX_SIZE_TRAIN {longest_side}"
    last, most = (max(scale_range[end] for scale_range in scale_ranges) for end in (0, 1))
    if last > _LAST_SHARE * largest:
        yield (
            f"{node_name}.SCALE_RANGES belong to larger images: the last one begins at {last:g} pixels, and with "
            f"{sizes} objects have at most {largest:.0f}. {remedy}"
        )
    if most < largest:
        yield (
            f"{node_name}.SCALE_RANGES belong to smaller images: objects above {most:g} pixels are not learned, and "
            f"with {sizes} they have up to {largest:.0f}. {remedy}"
        )

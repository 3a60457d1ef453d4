"""Decode the mask of one annotation: polygons, compressed or uncompressed RLE.

On many broken masks pycocotools crashes, allocates gigabytes, or returns another mask. So polygons are checked before
it draws them, and RLE is decoded here. Messages name the flaw; the caller adds the file and annotation.
"""

import math
from numbers import Integral
from typing import Any

import numpy as np
from detectron2.data import transforms as T
from PIL import Image
from pycocotools import mask as coco_mask

from sparseinst.data.images import DataError
from sparseinst.structures.mask_window import MaskWindow

# Reasons why a valid annotation gives no instance.
NO_SEGMENTATION = "no segmentation"
TOO_FEW_POINTS = "polygons of fewer than three points"
OUTSIDE = "outside of the image"
NO_PIXEL = "no pixel"

# RLE counts pixels with 32 bits.
_MAX_RLE_PIXELS = 2**32 - 1
# Most characters of one run in compressed RLE, 5 bits each.
_MAX_RUN_CHARACTERS = 7


def is_whole(value: Any) -> bool:
    """Return whether a value is an integer; True and 1.0 are not."""
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def check_segmentation(segmentation: Any, image_size: tuple[int, int]) -> str | None:
    """Check a segmentation without rasterizing it.

    Args:
        segmentation: of an annotation: a list of polygons, RLE, or None.
        image_size: (height, width) of its image, pixels.

    Returns:
        The reason why the annotation gives no instance: NO_SEGMENTATION, TOO_FEW_POINTS, OUTSIDE or NO_PIXEL; None
        where it may give one.

    Raises:
        DataError: the segmentation is broken.
    """
    if segmentation is None or (isinstance(segmentation, list | tuple) and not segmentation):
        return NO_SEGMENTATION
    if isinstance(segmentation, dict):
        return None if run_lengths(segmentation, image_size)[1::2].any() else NO_PIXEL
    if not isinstance(segmentation, list | tuple):
        raise DataError(f"a segmentation of type {type(segmentation).__name__}; expected polygons or RLE")
    reasons = [check_polygon(polygon, image_size) for polygon in segmentation]
    if None in reasons:
        return None
    return OUTSIDE if OUTSIDE in reasons else TOO_FEW_POINTS


def check_polygon(polygon: Any, image_size: tuple[int, int]) -> str | None:
    """Check one polygon [x0, y0, x1, y1, ...] as :func:`check_segmentation`; return TOO_FEW_POINTS, OUTSIDE or None."""
    if isinstance(polygon, np.ndarray):
        polygon = polygon.reshape(-1).tolist()
    if not isinstance(polygon, list | tuple):
        raise DataError("not a list of polygons; expected segmentation [[x0, y0, x1, y1, ...], ...]")
    if len(polygon) % 2:
        raise DataError(
            f"a polygon of {len(polygon)} numbers; expected segmentation [[x0, y0, x1, y1, ...], ...] with pairs x, y"
        )
    if not polygon:
        return TOO_FEW_POINTS
    height, width = image_size
    xs, ys = polygon[::2], polygon[1::2]
    try:
        # Built-in functions are faster than NumPy on a few dozen numbers.
        is_number = (total := sum(polygon)) == total
        left, right, top, bottom = min(xs), max(xs), min(ys), max(ys)
        # Coordinates beyond this limit are garbage or from another image; drawing them would take gigabytes.
        limit = 10 * max(height, width) + 1000
        is_near = is_number and -limit < min(left, top) and max(right, bottom) < limit
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"a polygon that is not a list of numbers: {error}") from error
    if not is_near:
        value = next(value for value in polygon if not -limit < value < limit)
        raise DataError(
            f"polygon coordinate {value}; expected finite pixel coordinates of the image, here within +-{limit}"
        )
    if len(polygon) < 6:
        return TOO_FEW_POINTS
    # pycocotools' time and memory grow with the length of the outline.
    longest = 500 * (height + width) + 10_000
    if len(polygon) * (right - left + bottom - top) > longest:
        points = np.array(polygon, dtype=np.float64).reshape(-1, 2)
        length = np.abs(np.diff(points, axis=0, append=points[:1])).sum()
        if length > longest:
            raise DataError(f"an outline that is {length:.3g} pixels long, in an image of {height} x {width}")
    return None if left < width and top < height and right > 0 and bottom > 0 else OUTSIDE


def run_lengths(rle: dict, image_size: tuple[int, int]) -> np.ndarray:
    """Return the run lengths of RLE, int64 (R,), down the columns; the first run is outside of the object.

    Args:
        rle: `size` (height, width) and `counts`: a list of run lengths, or COCO's compressed bytes or text.
        image_size: (height, width), pixels.

    Raises:
        DataError: the RLE is malformed, has another size, or its runs do not fill the image.
    """
    if "size" not in rle or "counts" not in rle:
        raise DataError(f"an RLE mask with keys {list(rle)}; expected 'size' and 'counts'")
    size, counts = rle["size"], rle["counts"]
    if isinstance(size, np.ndarray):
        size = size.tolist()
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(is_whole(side) and side > 0 for side in size):
        raise DataError(f"RLE of size {size!r}; expected the image's [height, width], two whole numbers")
    if tuple(size) != tuple(image_size):
        swapped = "; these are the same numbers in the other order" * (tuple(size) == tuple(image_size[::-1]))
        raise DataError(
            f"RLE of size {list(size)} on an image of {list(image_size)} (height, width); they must be equal{swapped}"
        )
    num_pixels = size[0] * size[1]
    if num_pixels > _MAX_RLE_PIXELS:
        raise DataError(f"RLE of size {list(size)}; RLE counts no more than {_MAX_RLE_PIXELS} pixels")
    runs = _decompress(counts) if isinstance(counts, bytes | str) else _whole_numbers(counts)
    wrong = (runs < 0) | (runs > num_pixels)
    if wrong.any():
        raise DataError(f"RLE cannot be decoded: a run length of {runs[wrong][0]} in an image of {num_pixels} pixels")
    if (total := runs.sum()) != num_pixels:
        raise DataError(f"RLE cannot be decoded: run lengths sum to {total}, expected height * width = {num_pixels}")
    return runs


def _whole_numbers(counts: Any) -> np.ndarray:
    try:
        runs = np.array(counts)
    except (ValueError, OverflowError) as error:
        raise DataError(f"RLE cannot be decoded: counts are not a list of numbers: {error}") from error
    if runs.ndim != 1 or runs.dtype.kind not in "iu":
        raise DataError("RLE cannot be decoded: counts must be whole numbers (pixels), or COCO's compressed text")
    return runs.astype(np.int64)


def _decompress(counts: bytes | str) -> np.ndarray:
    """Return run lengths, int64, from COCO's compressed form.

    A character holds 5 bits of a number, lowest first. Its sixth bit is set where another character follows; the fifth
    bit of the last character is the sign. From the fourth number on, each is the difference to the number two before.
    """
    if isinstance(counts, str):
        counts = counts.encode("utf-8", "replace")
    codes = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - 48
    if ((codes < 0) | (codes > 63)).any():
        raise DataError("RLE cannot be decoded: counts have a character that is not COCO's")
    if len(codes) == 0:
        return codes
    ends = np.flatnonzero((codes & 32) == 0)
    if len(ends) == 0 or ends[-1] != len(codes) - 1:
        raise DataError("RLE cannot be decoded: counts are cut off")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > _MAX_RUN_CHARACTERS:
        raise DataError("RLE cannot be decoded: counts have a number of more than 32 bits")
    positions = np.arange(len(codes)) - np.repeat(starts, lengths)
    values = np.add.reduceat((codes & 31) << (5 * positions), starts)
    runs = values - np.where(codes[ends] & 16, np.int64(1) << (5 * lengths), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def decode_rle(rle: dict, image_size: tuple[int, int]) -> np.ndarray:
    """Return the mask (height, width) of RLE, uint8; arguments and errors as :func:`run_lengths`."""
    runs = run_lengths(rle, image_size)
    height, width = image_size
    pixels = np.repeat((np.arange(len(runs)) % 2).astype(np.uint8), runs)
    return np.ascontiguousarray(pixels.reshape(width, height).T)


def read_mask(
    segmentation: Any, transforms: T.TransformList, source_size: tuple[int, int], image_size: tuple[int, int]
) -> MaskWindow | None:
    """Return the transformed mask of one annotation.

    Polygons are transformed as polygons and rasterized once, at the final size; RLE is transformed as a bitmask.

    Args:
        segmentation: see :func:`check_segmentation`.
        transforms: of the image.
        source_size, image_size: (height, width) of the image before and after the transforms, pixels.

    Returns:
        The smallest window around its pixels; None where the mask is empty.

    Raises:
        DataError: the segmentation is broken.
    """
    if isinstance(segmentation, dict):
        return _read_rle(segmentation, transforms, source_size)
    if check_segmentation(segmentation, source_size) is not None:
        return None
    # Copied, because transforms work in place.
    polygons = [np.array(polygon, dtype=np.float64).reshape(-1, 2) for polygon in segmentation]
    window = _draw_polygons([transforms.apply_coords(polygon) for polygon in polygons if len(polygon) >= 3], image_size)
    return None if window is None else window.shrink()


def _read_rle(rle: dict, transforms: T.TransformList, source_size: tuple[int, int]) -> MaskWindow | None:
    """Return the transformed mask of RLE as :func:`read_mask`; only the object's box is decoded and transformed."""
    positions = _source_positions(transforms, source_size)
    if positions is None:
        return MaskWindow(transforms.apply_segmentation(decode_rle(rle, source_size)).astype(bool), 0, 0).shrink()
    runs, height = run_lengths(rle, source_size), source_size[0]
    inside = 1 + 2 * np.flatnonzero(runs[1::2])
    if len(inside) == 0:
        return None
    first, last = inside[0], inside[-1]
    start, stop = runs[:first].sum(), runs[: last + 1].sum()
    # Whole columns, down which RLE counts.
    left, right = start // height, -(-stop // height)
    lengths = [start - left * height, *runs[first : last + 1], right * height - stop]
    pixels = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
    source = MaskWindow(pixels.reshape(-1, height).T, 0, int(left)).shrink()
    x0, y0, x1, y1 = source.box()
    rows, columns = (
        np.flatnonzero((axis >= low) & (axis < high)) for axis, low, high in zip(positions, (y0, x0), (y1, x1))
    )
    if len(rows) == 0 or len(columns) == 0:
        return None
    # Without new pixels, a box stays a box.
    mask = source.mask[positions[0][rows] - y0][:, positions[1][columns] - x0]
    return MaskWindow(mask, int(rows[0]), int(columns[0])).shrink()


def _source_positions(transforms: T.TransformList, size: tuple[int, int]) -> list[np.ndarray] | None:
    """Return the source row of each row of a transformed mask, and the source column of each column.

    None: there is a transform that moves pixels otherwise, or that is not known.
    """
    rows, columns = map(np.arange, size)
    for transform in transforms.transforms:
        kind = type(transform)
        if kind is T.HFlipTransform:
            columns = columns[::-1]
        elif kind is T.VFlipTransform:
            rows = rows[::-1]
        elif kind is T.CropTransform:
            rows = rows[transform.y0 : transform.y0 + transform.h]
            columns = columns[transform.x0 : transform.x0 + transform.w]
        elif kind is T.ResizeTransform:
            rows, columns = _nearest(rows, transform.new_h), _nearest(columns, transform.new_w)
        elif kind not in (T.NoOpTransform, T.ColorTransform):
            return None
    return [rows, columns]


def _nearest(values: np.ndarray, length: int) -> np.ndarray:
    """Resize values (n,) as Detectron2 resizes the rows and columns of masks: by Pillow, to the nearest."""
    row = Image.fromarray(values.astype(np.int32)[None])
    return np.asarray(row.resize((length, 1), Image.NEAREST))[0]


def _draw_polygons(polygons: list[np.ndarray], image_size: tuple[int, int]) -> MaskWindow | None:
    """Draw the union of polygons (P, 2), points x, y, as pycocotools does; None where it lies outside of the image.

    The canvas ends at the polygons, which is faster since most objects are small. The canvas begins at the image's
    corner, because after a shift pycocotools would round ties differently.
    """
    if not polygons:
        return None
    points = polygons[0] if len(polygons) == 1 else np.concatenate(polygons)
    # Python numbers are faster than NumPy here.
    height, width = image_size
    (x_min, y_min), (x_max, y_max) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    left, top = max(math.floor(x_min), 0), max(math.floor(y_min), 0)
    right, bottom = min(math.ceil(x_max), width), min(math.ceil(y_max), height)
    if right <= left or bottom <= top:
        return None
    if min(x_min, y_min) < 0:
        polygons = [_round_evenly(polygon) for polygon in polygons]
    rles = coco_mask.frPyObjects([polygon.reshape(-1) for polygon in polygons], bottom, right)
    mask = coco_mask.decode(rles[0] if len(rles) == 1 else coco_mask.merge(rles))[top:, left:]
    return MaskWindow(mask.view(bool), top, left)


def _round_evenly(coordinates: np.ndarray) -> np.ndarray:
    """Return coordinates that pycocotools rounds to the nearest fifth of a pixel, also below zero.

    pycocotools computes int(5 * x + 0.5), which moves negative coordinates by a fifth of a pixel toward zero.
    """
    fifths = np.floor(5 * coordinates + 0.5)
    return np.where(fifths < 0, (fifths - 0.75) / 5, coordinates)

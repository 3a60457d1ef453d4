"""Resize masks from the mask grid to the image: the reference, and an equal, cheaper computation for the CPU.

An image's mask is its probabilities resized twice (SparseInst's published post-processing): bilinearly from the mask
grid to the padded input, cropped to the image, bilinearly to the output, then compared with the threshold. The
reference :func:`resize_masks` does this, and runs on GPUs. On a CPU most of its work is wasted, because a mask fills a
small part of its image. :func:`map_windows` computes that part alone, equal to the reference bit for bit:

- A bilinear value lies between its inputs, so a pixel can be above the threshold only where a grid cell under it is.
- Both resizes are linear, row by row and column by column, so they are two products with small matrices of the weights
  of ``interpolate``. float64 makes their rounding negligible.
- The reference rounds to float32 at most ROUNDINGS times. A mask with a pixel nearer to the threshold than this
  rounding error is computed by the reference: a few masks in a hundred at the sizes of photographs.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch.nn import functional as F

from sparseinst.ops.masks import masks_to_boxes
from sparseinst.structures.mask_window import MaskWindow

Result = TypeVar("Result")

# Most float pixels that are resized at once; 100 masks at 4K would take 3.3 GB.
MAX_PIXELS_AT_ONCE = 2**25
# float32 roundings between a cell's probability and an output pixel in any of PyTorch's kernels: in each of two resizes
# at most 5 (product of two weights, product with the value, sum of four), and two as a margin.
ROUNDINGS = 12
FLOAT32_UNIT = 2.0**-24
# Most weights of both axes, 8 bytes each, that :func:`composed_axis` caches; 16 axes then take at most 256 MiB.
MAX_CACHED_WEIGHTS = 2**21
# Output rows and columns per block: a block needs a narrow band of the matrix.
ROW_BLOCK = 24
COLUMN_BLOCK = 48


class Axis(NamedTuple):
    """Both resizes along rows or along columns, as one matrix.

    Attributes:
        weights: (output size, grid size) float64: the share of each grid cell in each output pixel.
        first: (output size,) the first cell with a share in each pixel; ascending.
        last: (output size,) the last one; ascending.
    """

    weights: np.ndarray
    first: np.ndarray
    last: np.ndarray


def resize_masks(
    mask_probs: torch.Tensor,
    padded_size: tuple[int, int],
    image_size: tuple[int, int],
    output_size: tuple[int, int],
    mask_threshold: float,
) -> torch.Tensor:
    """Resize bilinearly to the padded input, crop to the image, resize bilinearly to the output, and threshold.

    The published reference, in chunks of bounded memory; :func:`map_windows` must equal it.

    Args:
        mask_probs: (n, Hm, Wm) in [0, 1], over the padded input.
        padded_size: size of the padded network input.
        image_size: size of the image in it, top left.
        output_size: size of the masks.
        mask_threshold: a pixel belongs to the mask where its probability is above this.

    Returns:
        (n, height, width) bool.
    """
    chunk = reference_chunk(padded_size, output_size)
    masks = torch.empty((len(mask_probs), *output_size), dtype=torch.bool, device=mask_probs.device)
    for start in range(0, len(mask_probs), chunk):
        probs = mask_probs[None, start : start + chunk]
        probs = F.interpolate(probs, size=padded_size, mode="bilinear", align_corners=False)
        probs = probs[:, :, : image_size[0], : image_size[1]]
        if tuple(output_size) != tuple(image_size):
            probs = F.interpolate(probs, size=output_size, mode="bilinear", align_corners=False)
        masks[start : start + chunk] = probs[0] > mask_threshold
    return masks


def reference_chunk(padded_size: tuple[int, int], output_size: tuple[int, int]) -> int:
    """Return the number of masks that :func:`resize_masks` resizes at once; at least 1."""
    return max(1, MAX_PIXELS_AT_ONCE // (padded_size[0] * padded_size[1] + output_size[0] * output_size[1]))


def map_windows(
    function: Callable[[int, MaskWindow | None], Result],
    mask_probs: torch.Tensor,
    padded_size: tuple[int, int],
    image_size: tuple[int, int],
    output_size: tuple[int, int],
    mask_threshold: float,
) -> list[Result]:
    """Call a function with the window of each mask of :func:`resize_masks`.

    At most one mask (on a GPU, and of a thin image: one chunk of masks) is in memory at a time.

    Args:
        function: called with a mask's index and its window, None where the mask is empty.
        mask_probs: as the other arguments, see :func:`resize_masks`.

    Returns:
        The function's results, in the masks' order.
    """
    mask_probs = mask_probs.detach()
    sizes = (padded_size, image_size, output_size)
    num_weights = _num_weights(mask_probs, output_size)
    # Images thinner than the grid need more weights than they have pixels; the reference needs none.
    is_thin = num_weights > max(MAX_CACHED_WEIGHTS, output_size[0] * output_size[1] // 4)
    if mask_probs.device.type != "cpu" or is_thin:
        return [function(*item) for item in enumerate(_windows_in_chunks(mask_probs, *sizes, mask_threshold))]
    if len(mask_probs) == 0:
        return []
    window_of = _window_function(mask_probs, *sizes, mask_threshold)
    # One thread: two were slower for 50 masks of 480x640, and little faster for 100 of 1080x1920.
    return [function(index, window_of(index)) for index in range(len(mask_probs))]


def _num_weights(mask_probs: torch.Tensor, output_size: tuple[int, int]) -> int:
    return sum(cells * pixels for cells, pixels in zip(mask_probs.shape[-2:], output_size))


def _windows_in_chunks(
    mask_probs: torch.Tensor,
    padded_size: tuple[int, int],
    image_size: tuple[int, int],
    output_size: tuple[int, int],
    mask_threshold: float,
) -> Iterator[MaskWindow | None]:
    """Yield the windows of masks that are computed chunk by chunk."""
    for probs in mask_probs.split(reference_chunk(padded_size, output_size)):
        masks = resize_masks(probs, padded_size, image_size, output_size, mask_threshold)
        boxes = masks_to_boxes(masks, torch.int64).tolist()
        found = masks.flatten(1).any(1).tolist()
        for mask, (x0, y0, x1, y1), is_found in zip(masks, boxes, found):
            yield MaskWindow(mask[y0:y1, x0:x1].cpu().numpy(), y0, x0) if is_found else None


def _window_function(
    mask_probs: torch.Tensor,
    padded_size: tuple[int, int],
    image_size: tuple[int, int],
    output_size: tuple[int, int],
    mask_threshold: float,
) -> Callable[[int], MaskWindow | None]:
    """Return a function from a mask's index to its window; it computes only pixels that can be above the threshold.

    Uses NumPy, because PyTorch would start threads for every large block, which takes longer than the block.
    """
    compose = (
        composed_axis if _num_weights(mask_probs, output_size) <= MAX_CACHED_WEIGHTS else composed_axis.__wrapped__
    )
    rows, columns = (compose(*sizes) for sizes in zip(mask_probs.shape[-2:], padded_size, image_size, output_size))
    # The largest float32 error next to the threshold; the last term is for underflow.
    margin = ROUNDINGS * FLOAT32_UNIT * mask_threshold + 1e-36
    low, high = mask_threshold - margin, mask_threshold + margin
    # logical_not of le, so that NaN counts: cells next to it may be above.
    row_ranges = _reach(mask_probs.amax(2).le(low).logical_not_(), rows)
    column_ranges = _reach(mask_probs.amax(1).le(low).logical_not_(), columns)
    arrays = mask_probs.numpy()

    def window(index: int) -> MaskWindow | None:
        (top, bottom), (left, right) = row_ranges[index], column_ranges[index]
        if top >= bottom or left >= right:
            return None
        pixels = _window_pixels(arrays[index], rows, columns, (top, bottom), (left, right), low, high)
        if pixels is None:
            whole = resize_masks(mask_probs[index : index + 1], padded_size, image_size, output_size, mask_threshold)
            pixels = whole[0, top:bottom, left:right].numpy()
        return MaskWindow(pixels, top, left).shrink()

    return window


def _reach(is_above: torch.Tensor, axis: Axis) -> list[tuple[int, int]]:
    """Map grid rows (n, Hm) where a mask may be above the threshold to output rows [start, end)."""
    above = is_above.numpy()
    first = above.argmax(1)
    last = above.shape[1] - 1 - above[:, ::-1].argmax(1)
    start = np.searchsorted(axis.last, first, side="left")
    end = np.searchsorted(axis.first, last, side="right")
    return list(zip(start.tolist(), np.where(above.any(1), end, 0).tolist()))


def _window_pixels(
    probs: np.ndarray,
    rows: Axis,
    columns: Axis,
    row_range: tuple[int, int],
    column_range: tuple[int, int],
    low: float,
    high: float,
) -> np.ndarray | None:
    """Return the booleans (height, width) of a window; None where a pixel lies between ``low`` and ``high``."""
    (top, bottom), (left, right) = row_range, column_range
    first_cell, end_cell = rows.first[top], rows.last[bottom - 1] + 1
    probs = probs[first_cell:end_cell].astype(np.float64)
    # Grid rows, output columns.
    strips = np.empty((len(probs), right - left))
    for start, end, cells in _blocks(columns, left, right, COLUMN_BLOCK):
        np.matmul(probs[:, cells], columns.weights[start:end, cells].T, out=strips[:, start - left : end - left])
    pixels = np.empty((bottom - top, right - left), dtype=bool)
    for start, end, cells in _blocks(rows, top, bottom, ROW_BLOCK):
        values = rows.weights[start:end, cells] @ strips[cells.start - first_cell : cells.stop - first_cell]
        block = np.greater(values, high, out=pixels[start - top : end - top])
        # NaN is in neither count, so the window is undecided.
        if np.count_nonzero(block) + np.count_nonzero(values <= low) < values.size:
            return None
    return pixels


def _blocks(axis: Axis, start: int, end: int, size: int) -> Iterator[tuple[int, int, slice]]:
    """Yield blocks of the output pixels [start, end), each with its grid cells."""
    for block_start in range(start, end, size):
        block_end = min(block_start + size, end)
        yield block_start, block_end, slice(axis.first[block_start], axis.last[block_end - 1] + 1)


@functools.lru_cache(maxsize=16)
def composed_axis(grid_size: int, padded_size: int, image_size: int, output_size: int) -> Axis:
    """Compose both resizes and the crop between them along one direction."""
    cells, weights = (taps[:image_size] for taps in _taps(grid_size, padded_size))
    if image_size != output_size:
        pixels, shares = _taps(image_size, output_size)
        cells, weights = cells[pixels].flatten(1), (shares[:, :, None] * weights[pixels]).flatten(1)
    weights = torch.zeros((output_size, grid_size), dtype=torch.float64).scatter_add_(1, cells, weights)
    has_share = (weights > 0).numpy()
    return Axis(weights.numpy(), has_share.argmax(1), grid_size - 1 - has_share[:, ::-1].argmax(1))


def _taps(input_size: int, output_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the input cells of each output pixel of ``interpolate``, and their rounded weights.

    Returns:
        cells (output_size, 4) int64, weights (output_size, 4) float64, two of them at most not 0.
    """
    # Resizing four patterns that are 1 at every fourth cell shows each cell's weight, because a pixel's cells are
    # neighbors: from one before the pixel's center to two after it, with a margin for rounding.
    patterns = (torch.arange(input_size) % 4 == torch.arange(4)[:, None]).float()
    resized = F.interpolate(patterns[None, None], size=(4, output_size), mode="bilinear", align_corners=False)[0, 0]
    pixels = torch.arange(output_size)
    center_cells = ((2 * pixels + 1) * input_size - output_size) // (2 * output_size)
    cells = center_cells[:, None] + torch.arange(-1, 3)
    # Cells outside have weight 0.
    return cells.clamp(0, input_size - 1), resized[cells % 4, pixels[:, None]].double()

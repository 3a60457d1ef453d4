"""Masks of the grid to masks of the picture: the plain computation, and the same result at a fraction of its cost.

A picture's mask is its probabilities resized twice (SparseInst's published post-processing): bilinearly from the mask
grid to the padded input, cropped to the image, bilinearly to the output, then compared with the threshold. On a GPU
that is done as it is written here, in :func:`resize_masks`. On a CPU most of it is wasted: a mask fills a small part of
its picture, and only there can it be above the threshold. :func:`map_windows` computes that part alone, and what it
gives equals the plain computation bit for bit:

- A bilinear value lies between the values that it is made of. So a pixel can be above the threshold only where one of
  the grid cells under it is.
- Both resizes are linear, row by row and column by column. So they are two products with small matrices, whose entries
  are the very weights that ``interpolate`` has. They are computed in float64, so their rounding does not count.
- The plain computation rounds to float32 on its way, at most ROUNDINGS times. Where a pixel is nearer to the threshold
  than that can move it, it is not known on which side the plain computation ends. At the sizes of photographs a few
  masks in a hundred have such a pixel; they are computed plainly.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch.nn import functional as F

from sparseinst.structures.mask_window import MaskWindow

Result = TypeVar("Result")

# Float pixels that are resized at once; 100 masks at 4K would take 3.3 GB.
MAX_PIXELS_AT_ONCE = 2**25
# float32 roundings between a cell's probability and an output pixel, whichever of PyTorch's kernels runs: in each of
# two resizes at most 5 (product of two weights, product with the value, sum of four), and two to be safe.
ROUNDINGS = 12
FLOAT32_UNIT = 2.0**-24
# Output rows and columns that are computed at once: the part of the matrix that they need is a narrow band.
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
    """Boolean masks at the output size: bilinear to the padded input, cropped, bilinear to the output, thresholded.

    The plain computation, in chunks of bounded memory: what is published, and what :func:`map_windows` must equal.

    Args:
        mask_probs: (n, Hm, Wm) in [0, 1], over the padded input.
        padded_size: size of the padded network input.
        image_size: size of the image in it, top left.
        output_size: size of the masks wanted.
        mask_threshold: a pixel belongs to the mask where its probability is above this.

    Returns:
        (n, height, width) bool.
    """
    chunk = plain_chunk(padded_size, output_size)
    masks = torch.empty((len(mask_probs), *output_size), dtype=torch.bool, device=mask_probs.device)
    for start in range(0, len(mask_probs), chunk):
        probs = mask_probs[None, start : start + chunk]
        probs = F.interpolate(probs, size=padded_size, mode="bilinear", align_corners=False)
        probs = probs[:, :, : image_size[0], : image_size[1]]
        if tuple(output_size) != tuple(image_size):
            probs = F.interpolate(probs, size=output_size, mode="bilinear", align_corners=False)
        masks[start : start + chunk] = probs[0] > mask_threshold
    return masks


def plain_chunk(padded_size: tuple[int, int], output_size: tuple[int, int]) -> int:
    """How many masks :func:`resize_masks` resizes at once; at least 1."""
    return max(1, MAX_PIXELS_AT_ONCE // (padded_size[0] * padded_size[1] + output_size[0] * output_size[1]))


def masks_to_boxes(masks: torch.Tensor) -> torch.Tensor:
    """Tight boxes, without a loop over the masks.

    Args:
        masks: (n, height, width) bool, none empty.

    Returns:
        (n, 4) float32 (x0, y0, x1, y1) in pixels, x1 and y1 exclusive.
    """
    height, width = masks.shape[-2:]
    if len(masks) == 0:
        return masks.new_zeros((0, 4), dtype=torch.float32)
    columns = masks.any(1).to(torch.uint8)
    rows = masks.any(2).to(torch.uint8)
    return torch.stack(
        [
            columns.argmax(1),
            rows.argmax(1),
            width - columns.flip(1).argmax(1),
            height - rows.flip(1).argmax(1),
        ],
        dim=1,
    ).float()


def map_windows(
    function: Callable[[int, MaskWindow | None], Result],
    mask_probs: torch.Tensor,
    padded_size: tuple[int, int],
    image_size: tuple[int, int],
    output_size: tuple[int, int],
    mask_threshold: float,
) -> list[Result]:
    """Call a function with each of the masks of :func:`resize_masks`, without what is empty around it.

    Never more than one mask (on a GPU: one chunk of masks) is in memory, whatever the output's size.

    Args:
        function: called with a mask's index and its window, None where the mask is empty.
        mask_probs: see :func:`resize_masks`, as all others.

    Returns:
        What the function returned, in the masks' order.
    """
    mask_probs = mask_probs.detach()
    sizes = (padded_size, image_size, output_size)
    if mask_probs.device.type != "cpu":
        return [function(*item) for item in enumerate(_windows_in_chunks(mask_probs, *sizes, mask_threshold))]
    window_of = _window_function(mask_probs, *sizes, mask_threshold)
    # One after the other: two threads, which wait for one another between a mask's small steps, took longer for 50
    # masks of 480x640, and little less for 100 of 1080x1920.
    return [function(index, window_of(index)) for index in range(len(mask_probs))]


def _windows_in_chunks(
    mask_probs: torch.Tensor,
    padded_size: tuple[int, int],
    image_size: tuple[int, int],
    output_size: tuple[int, int],
    mask_threshold: float,
) -> Iterator[MaskWindow | None]:
    """Whole masks, a chunk at once, cut to their boxes."""
    for probs in mask_probs.split(plain_chunk(padded_size, output_size)):
        masks = resize_masks(probs, padded_size, image_size, output_size, mask_threshold)
        boxes = masks_to_boxes(masks).int().tolist()
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
    """From a mask's index to its window, of which no more is computed than what can be above the threshold.

    NumPy computes it: PyTorch would start threads for every large block, and more than the block takes.
    """
    rows, columns = (
        composed_axis(*sizes) for sizes in zip(mask_probs.shape[-2:], padded_size, image_size, output_size)
    )
    # What float32 can lose of a value next to the threshold; the last term is where it underflows.
    margin = ROUNDINGS * FLOAT32_UNIT * mask_threshold + 1e-36
    low, high = mask_threshold - margin, mask_threshold + margin
    # Written so that NaN counts: beside it there may be cells that are above.
    row_ranges = _reach(mask_probs.amax(2).le(low).logical_not_(), rows)
    column_ranges = _reach(mask_probs.amax(1).le(low).logical_not_(), columns)
    arrays = mask_probs.numpy()

    def window(index: int) -> MaskWindow | None:
        (top, bottom), (left, right) = row_ranges[index], column_ranges[index]
        if top >= bottom or left >= right:
            return None
        pixels = _window_pixels(arrays[index], rows, columns, (top, bottom), (left, right), low, high)
        if pixels is None:
            plain = resize_masks(mask_probs[index : index + 1], padded_size, image_size, output_size, mask_threshold)
            pixels = plain[0, top:bottom, left:right].numpy()
        return MaskWindow(pixels, top, left).shrink()

    return window


def _reach(is_above: torch.Tensor, axis: Axis) -> list[tuple[int, int]]:
    """From the grid rows (n, Hm) where a mask may be above the threshold to the output rows [start, end) of that."""
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
    """Booleans (height, width) of one window; None where a pixel lies between ``low`` and ``high``."""
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
        # NaN is in neither count, so it counts as undecided.
        if np.count_nonzero(block) + np.count_nonzero(values <= low) < values.size:
            return None
    return pixels


def _blocks(axis: Axis, start: int, end: int, size: int) -> Iterator[tuple[int, int, slice]]:
    """Cut output pixels [start, end) into blocks, each with the grid cells that it needs."""
    for block_start in range(start, end, size):
        block_end = min(block_start + size, end)
        yield block_start, block_end, slice(axis.first[block_start], axis.last[block_end - 1] + 1)


@functools.lru_cache(maxsize=16)
def composed_axis(grid_size: int, padded_size: int, image_size: int, output_size: int) -> Axis:
    """Both resizes and the crop between them, along one direction."""
    weights = _dense(*_taps(grid_size, padded_size), grid_size)[:image_size]
    if image_size != output_size:
        cells, shares = _taps(image_size, output_size)
        weights = sum(shares[:, tap, None] * weights[cells[:, tap]] for tap in range(cells.shape[1]))
    has_share = (weights > 0).numpy()
    return Axis(weights.numpy(), has_share.argmax(1), grid_size - 1 - has_share[:, ::-1].argmax(1))


def _taps(input_size: int, output_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which input cells ``interpolate`` takes for each output pixel, and their weights, as it has rounded them.

    Returns:
        cells (output_size, 4) int64, weights (output_size, 4) float64, two of them at most not 0.
    """
    # Resizing four patterns, each of which is 1 at every fourth cell, shows each cell's weight, since a pixel's cells
    # are neighbours. A pixel's centre tells which ones: from one before to two after, should rounding have moved it.
    patterns = (torch.arange(input_size) % 4 == torch.arange(4)[:, None]).float()
    resized = F.interpolate(patterns[None, None], size=(4, output_size), mode="bilinear", align_corners=False)[0, 0]
    pixels = torch.arange(output_size)
    centre_cells = ((2 * pixels + 1) * input_size - output_size) // (2 * output_size)
    cells = centre_cells[:, None] + torch.arange(-1, 3)
    # Those that are outside have weight 0.
    return cells.clamp(0, input_size - 1), resized[cells % 4, pixels[:, None]].double()


def _dense(cells: torch.Tensor, weights: torch.Tensor, input_size: int) -> torch.Tensor:
    return torch.zeros((len(cells), input_size), dtype=torch.float64).scatter_add_(1, cells, weights)

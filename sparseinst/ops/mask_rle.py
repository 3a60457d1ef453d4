"""Encode a mask's window as COCO's RLE of the whole mask."""

import numpy as np
from pycocotools import mask as mask_api

from sparseinst.structures.mask_window import MaskWindow

# Columns that are encoded at once: the two edges of a mask of one row take 100 bytes per column.
COLUMN_BLOCK = 2**16


def encode_window(window: MaskWindow, output_size: tuple[int, int]) -> dict:
    """Return the RLE that ``pycocotools.mask.encode`` gives for the whole mask, without allocating the mask.

    Args:
        window: of one mask.
        output_size: (height, width) of the whole mask.

    Returns:
        Compressed RLE: ``size`` [height, width], ``counts`` bytes.
    """
    height, width = output_size
    blocks = [
        _joined(*_runs(window.mask[:, left : left + COLUMN_BLOCK], window.top, window.left + left, height))
        for left in range(0, window.mask.shape[1], COLUMN_BLOCK)
    ]
    starts, ends = _joined(*np.concatenate(blocks, 1))
    edges = np.stack([starts, ends], 1).ravel()
    counts = np.diff(edges, prepend=0, append=height * width)
    if counts[-1] == 0:
        counts = counts[:-1]
    return mask_api.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)


def _joined(starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Join runs that touch: a run that fills a column to its last row continues in the next column."""
    is_apart = starts[1:] != ends[:-1]
    starts = starts[np.concatenate([np.ones(len(starts[:1]), bool), is_apart])]
    ends = ends[np.concatenate([is_apart, np.ones(len(ends[:1]), bool)])]
    return starts, ends


def _runs(pixels: np.ndarray, top: int, left: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Return starts and ends of the runs as positions in the whole mask, counted down its columns."""
    rows, columns = pixels.shape
    # A pixel that differs from the pixel above it; outside of the window the mask is empty.
    is_edge = np.empty((rows + 1, columns), dtype=bool)
    is_edge[0], is_edge[-1] = pixels[0], pixels[-1]
    np.not_equal(pixels[1:], pixels[:-1], out=is_edge[1:-1])
    row, column = np.divmod(np.flatnonzero(is_edge), columns)
    # Sorting the few edges is faster than transposing the mask.
    positions = np.sort((left + column) * height + top + row)
    return positions[::2], positions[1::2]

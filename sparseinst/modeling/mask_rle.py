"""COCO's run-length encoding of a mask, from its window alone."""

import numpy as np
from pycocotools import mask as mask_api

from sparseinst.structures.mask_window import MaskWindow


def encode_window(window: MaskWindow, output_size: tuple[int, int]) -> dict:
    """What ``pycocotools.mask.encode`` gives for the whole mask, without making it.

    Args:
        window: of one mask.
        output_size: (height, width) of the whole mask.

    Returns:
        Compressed RLE: ``size`` [height, width], ``counts`` bytes.
    """
    height, width = output_size
    starts, ends = _runs(window, height)
    # Runs go down the columns; where a column is full to its last row, its run goes on in the next one.
    is_apart = starts[1:] != ends[:-1]
    starts = starts[np.concatenate([np.ones(len(starts[:1]), bool), is_apart])]
    ends = ends[np.concatenate([is_apart, np.ones(len(ends[:1]), bool)])]
    edges = np.stack([starts, ends], 1).ravel()
    counts = np.diff(edges, prepend=0, append=height * width)
    if counts[-1] == 0:
        counts = counts[:-1]
    return mask_api.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)


def _runs(window: MaskWindow, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Where runs start and where they have ended, column by column, as positions in the whole mask's columns."""
    pixels = window.mask
    rows, columns = pixels.shape
    # Where a pixel is not as the one above it; outside the window there is nothing of the mask.
    is_edge = np.empty((rows + 1, columns), dtype=bool)
    is_edge[0], is_edge[-1] = pixels[0], pixels[-1]
    np.not_equal(pixels[1:], pixels[:-1], out=is_edge[1:-1])
    row, column = np.divmod(np.flatnonzero(is_edge), columns)
    # Edges are few: sorting them takes less than turning the mask.
    positions = np.sort((window.left + column) * height + window.top + row)
    return positions[::2], positions[1::2]

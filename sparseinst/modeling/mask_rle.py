"""COCO's run-length encoding of a mask, from its window alone."""

import numpy as np
import torch
from pycocotools import mask as mask_api

from sparseinst.modeling.mask_resize import MaskWindow


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
    rows, columns = window.pixels.shape
    # A pixel that is not of the mask before the first column, and one after each.
    flat = torch.zeros(1 + columns * (rows + 1), dtype=torch.bool, device=window.pixels.device)
    flat[1:].view(columns, rows + 1)[:, :rows] = window.pixels.T
    edges = (flat[1:] != flat[:-1]).nonzero().squeeze(1).cpu().numpy()
    column, row = np.divmod(edges, rows + 1)
    positions = (window.left + column) * height + window.top + row
    return positions[::2], positions[1::2]

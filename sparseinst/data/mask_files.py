"""Read image files whose values are objects or classes; refuse photographs and smoothed edges."""

from pathlib import Path

import numpy as np

from sparseinst.data.image_formats import FORMATS
from sparseinst.data.images import open_image

# Share of gray pixels: 25 to 88 % in docs/images, and at most 2 % at the edges of black and white masks in JPEG.
_MOST_GRAY = 0.2
# Smoothing makes dozens of values. A valid mask may have a few objects that are as thin as an edge.
_FEWEST_EDGE_VALUES = 3


def read_mask_values(file: Path, max_pixels: int) -> np.ndarray:
    """Return the values of a mask, (height, width) int64: gray, palette index or color; of JPEG, 0 and 1.

    Args:
        file: of the mask.
        max_pixels: larger masks are refused.

    Raises:
        ImageReadError: the file cannot be read.
        ValueError: the file is a photograph, or has smoothed edges.
    """
    with open_image(file, max_pixels) as opened:
        is_index = opened.mode in ("1", "L", "P") or opened.mode.startswith("I")
        values = np.array(opened if is_index else opened.convert("RGB")).astype(np.int64)
    if file.suffix.lower() in FORMATS["JPEG"]:
        values = values if is_index else values.max(axis=2)
        share = np.mean((values > 63) & (values < 192))
        if share > _MOST_GRAY:
            raise ValueError(f"{share:.0%} of the pixels are gray; expected a black and white mask, or masks as PNG")
        # The edges are blurred.
        return (values > 127).astype(np.int64)
    if not is_index:
        values = values @ (65536, 256, 1)
    num_edge_values, num_values = count_edge_values(values)
    if num_edge_values >= _FEWEST_EDGE_VALUES and 2 * num_edge_values > num_values:
        raise ValueError(
            f"{num_edge_values} of {num_values} values above 0 form edges only, as in a smoothed mask or a photograph; "
            "expected one value for each object: threshold the mask, or save and resize it without smoothing"
        )
    return values


def count_edge_values(values: np.ndarray) -> tuple[int, int]:
    """Count the values above 0 that form edges only, and all values above 0.

    A pixel belongs to an edge if it touches another value above 0, and no 2 x 2 block around it has one value. A value
    counts if most of its pixels belong to edges.

    Args:
        values: (height, width), integers of 0 or more.
    """
    is_object, is_edge, is_block = values > 0, np.zeros(values.shape, bool), np.zeros(values.shape, bool)
    same_below, same_right = values[1:] == values[:-1], values[:, 1:] == values[:, :-1]
    borders_below = ~same_below & is_object[1:] & is_object[:-1]
    borders_right = ~same_right & is_object[:, 1:] & is_object[:, :-1]
    for edge, border in (
        (is_edge[1:], borders_below), (is_edge[:-1], borders_below),
        (is_edge[:, 1:], borders_right), (is_edge[:, :-1], borders_right),
    ):  # fmt: skip
        edge |= border
    uniform = same_below[:, 1:] & same_below[:, :-1] & same_right[1:]
    for corner in (is_block[1:, 1:], is_block[1:, :-1], is_block[:-1, 1:], is_block[:-1, :-1]):
        corner |= uniform
    present, counts = np.unique(values[is_object], return_counts=True)
    found, edge_counts = np.unique(values[is_edge & ~is_block], return_counts=True)
    return int((2 * edge_counts > counts[np.searchsorted(present, found)]).sum()), len(present)

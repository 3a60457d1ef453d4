"""Objects of an image, for the fit of a data set to a config."""

from typing import NamedTuple

import numpy as np


class ImageObjects(NamedTuple):
    """The objects of one training image, at the size that the model is trained with; pixels.

    Attributes:
        padded_size: (height, width) of the image, padded to a multiple of 32.
        boxes: (M, 4) x0, y0, x1, y1 of the masks.
        centers: (M, 2) y, x: means of the masks' pixel indices.
    """

    padded_size: tuple[int, int]
    boxes: np.ndarray
    centers: np.ndarray

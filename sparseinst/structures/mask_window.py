"""Hold a mask without the empty rows and columns around it."""

from typing import NamedTuple

import numpy as np


class MaskWindow(NamedTuple):
    """The part of an image-sized mask outside of which the mask is empty.

    Attributes:
        mask: (h, w) bool, on the host.
        top: first row of the window in the image.
        left: first column of the window in the image.
    """

    mask: np.ndarray
    top: int
    left: int

    def shrink(self) -> "MaskWindow | None":
        """Return the smallest window with the same pixels, a view; None where the mask is empty."""
        rows = np.flatnonzero(self.mask.any(axis=1))
        if len(rows) == 0:
            return None
        mask = self.mask[rows[0] : rows[-1] + 1]
        columns = np.flatnonzero(mask.any(axis=0))
        return MaskWindow(mask[:, columns[0] : columns[-1] + 1], self.top + int(rows[0]), self.left + int(columns[0]))

    def center(self) -> tuple[float, float]:
        """Return the mean (y, x) of the pixels' indices in the image; NaN where the mask is empty."""
        rows, columns = (self.mask.sum(axis=axis, dtype=np.int64) for axis in (1, 0))
        count = np.float64(rows.sum())
        with np.errstate(invalid="ignore"):
            return tuple(
                float(np.arange(start, start + len(sums)) @ sums / count)
                for start, sums in ((self.top, rows), (self.left, columns))
            )

    def box(self) -> tuple[int, int, int, int]:
        """Return the window's (x0, y0, x1, y1) in pixels; x1 and y1 are exclusive."""
        height, width = self.mask.shape
        return self.left, self.top, self.left + width, self.top + height

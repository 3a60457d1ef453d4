"""The anchors (priors) of YOLACT, in fractions of the image. N is the number of all anchors."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from detectron2.modeling.box_regression import Box2BoxTransform

from sparseinst.ops.coordinates import relative_centers

# Deltas are distances over a tenth of the anchor, and logarithms over a fifth. Fractions are as good as pixels.
BOX_TRANSFORM = Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))


class AnchorSpec(NamedTuple):
    """The anchors of a model.

    Attributes:
        sizes: base size of each level in pixels of the input, finest first.
        scales: factors of the base size.
        ratios: width over height.
        square: make anchors as high as wide; see MODEL.YOLACT.SQUARE_ANCHORS.
    """

    sizes: Sequence[float]
    scales: Sequence[float] = (1.0,)
    ratios: Sequence[float] = (1.0, 0.5, 2.0)
    square: bool = False

    @property
    def num_anchors(self) -> int:
        """Return the anchors of a cell."""
        return len(self.scales) * len(self.ratios)

    def boxes(self, grid_sizes: Sequence[int], side: int) -> torch.Tensor:
        """Return the anchors around the centers of the cells, which have equal distances over the image.

        Detectron2's DefaultAnchorGenerator takes strides in their place: at 550 pixels its last center is at 576.

        Args:
            grid_sizes: cells along a side of each level.
            side: of the input, pixels.

        Returns:
            (N, 4) float32 x0, y0, x1, y1: levels in order, cells by rows, then each scale with each ratio.
        """
        levels = []
        for size, cells in zip(self.sizes, grid_sizes, strict=True):
            roots = torch.tensor([math.sqrt(ratio) for ratio in self.ratios])
            scaled = torch.tensor([size / side * scale for scale in self.scales])[:, None]
            widths, heights = (scaled * roots).flatten(), (scaled / roots).flatten()
            if self.square:
                heights = widths
            centers = relative_centers(cells)
            y, x = (axis[:, :, None] for axis in torch.meshgrid(centers, centers, indexing="ij"))
            edges = (x - widths / 2, y - heights / 2, x + widths / 2, y + heights / 2)
            levels.append(torch.stack(edges, dim=-1).reshape(-1, 4))
        return torch.cat(levels)


def grid_sizes(side: int, levels: Sequence[int]) -> list[int]:
    """Return the cells along a side of each level: the input is halved, rounding up, as often as the level says."""
    return [math.ceil(side / 2**level) for level in levels]

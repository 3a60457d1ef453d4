"""Ground-truth masks of one image, reduced to the grid of the model's masks where they are made: in the data worker."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from sparseinst.structures.mask_window import MaskWindow

# For these the share of a cell is exact in float32, and the count of its pixels fits into uint8.
GRID_STRIDES = (1, 2, 4, 8)


class MaskGrid(NamedTuple):
    """How masks are reduced. What is right of and below an image's own cells is empty, however far it is padded.

    Attributes:
        stride: pixels of a cell's side, one of GRID_STRIDES.
        antialiased: a cell's share is that of all its pixels. Otherwise, as bilinear interpolation has it, of the four
            around its centre.
    """

    stride: int
    antialiased: bool = False

    def taps(self) -> slice:
        """The rows, and columns, of a cell that count."""
        if self.antialiased or self.stride == 1:
            return slice(0, self.stride)
        return slice(self.stride // 2 - 1, self.stride // 2 + 1)

    def count(self, window: MaskWindow) -> MaskWindow:
        """The pixels of each cell that count and are the mask's, uint8, with top and left in cells."""
        left, top, right, bottom = window.box()
        first_row, first_column = top // self.stride, left // self.stride
        rows, columns = (-(-end // self.stride) for end in (bottom, right))
        cells = np.zeros((rows - first_row, self.stride, columns - first_column, self.stride), dtype=np.uint8)
        pixels = cells.reshape(cells.shape[0] * self.stride, -1)
        top, left = top - first_row * self.stride, left - first_column * self.stride
        pixels[top : top + window.mask.shape[0], left : left + window.mask.shape[1]] = window.mask
        taps = range(self.stride)[self.taps()]
        counts = sum(cells[:, row, :, column] for row in taps for column in taps)
        return MaskWindow(counts, first_row, first_column)


class PackedWindow(NamedTuple):
    """A MaskWindow of eight pixels a byte."""

    bits: np.ndarray
    size: tuple[int, int]
    top: int
    left: int

    @classmethod
    def pack(cls, window: MaskWindow) -> "PackedWindow":
        """Without loss."""
        return cls(np.packbits(window.mask), window.mask.shape, window.top, window.left)

    def draw(self, mask: np.ndarray) -> None:
        """Set the pixels of an empty mask (height, width) bool."""
        height, width = self.size
        pixels = np.unpackbits(self.bits, count=height * width).reshape(self.size)
        mask[self.top : self.top + height, self.left : self.left + width] = pixels


def unpack_windows(windows: Sequence[PackedWindow], image_size: tuple[int, int]) -> torch.Tensor:
    """Whole masks, (M, height, width) bool."""
    masks = np.zeros((len(windows), *image_size), dtype=bool)
    for mask, window in zip(masks, windows, strict=True):
        window.draw(mask)
    return torch.from_numpy(masks)


class GridMasks:
    """The ``gt_masks`` of Instances, in place of BitMasks.

    Matcher and criterion look at the masks on the model's grid, a sixteenth of the pixels as a rule, and at nothing
    else. So that is what goes from the worker to the device: for each cell, how many pixels of it are the instance's,
    one byte where a whole mask in float32 would take 64. The counts do not depend on the batch that the image comes
    into. Whole masks, for pictures and for a model with another grid, are kept beside them, packed, on the host.

    Args:
        counts: (M, rows, columns) uint8, of the cells that the image touches.
        windows: the whole masks, M.
        grid: what the counts were made for.
        image_size: (height, width), pixels.
    """

    def __init__(
        self, counts: torch.Tensor, windows: Sequence[PackedWindow], grid: MaskGrid, image_size: tuple[int, int]
    ) -> None:
        self.counts = counts
        self.windows = list(windows)
        self.grid = grid
        self.image_size = tuple(image_size)

    @classmethod
    def from_cells(
        cls, cells: Sequence[MaskWindow], windows: Sequence[PackedWindow], grid: MaskGrid, image_size: tuple[int, int]
    ) -> "GridMasks":
        """Of what :meth:`MaskGrid.count` and :meth:`PackedWindow.pack` made of each mask."""
        counts = np.zeros((len(cells), *(-(-side // grid.stride) for side in image_size)), dtype=np.uint8)
        for count, window in zip(counts, cells, strict=True):
            left, top, right, bottom = window.box()
            count[top:bottom, left:right] = window.mask
        return cls(torch.from_numpy(counts), windows, grid, image_size)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, item: int | slice | Sequence[int] | Sequence[bool] | torch.Tensor) -> "GridMasks":
        """One mask, a slice, those of some indices, or those where an array of booleans is True."""
        if isinstance(item, torch.Tensor):
            item = item.cpu().numpy()
        chosen = np.atleast_1d(np.arange(len(self))[item])
        counts = self.counts[torch.from_numpy(chosen).to(self.counts.device)]
        return GridMasks(counts, [self.windows[index] for index in chosen], self.grid, self.image_size)

    def __repr__(self) -> str:
        return f"GridMasks(num_instances={len(self)}, image_size={self.image_size}, grid={self.grid})"

    def to(self, *args: object, **kwargs: object) -> "GridMasks":
        """The counts on another device; takes the arguments of ``torch.Tensor.to``."""
        return GridMasks(self.counts.to(*args, **kwargs), self.windows, self.grid, self.image_size)

    def pin_memory(self) -> "GridMasks":
        """The counts where a GPU can fetch them while it computes, as ``torch.Tensor.pin_memory``."""
        return GridMasks(self.counts.pin_memory(), self.windows, self.grid, self.image_size)

    def on_grid(self, size: tuple[int, int]) -> torch.Tensor:
        """The share of each cell, (M, *size) float32 in [0, 1], on the device of the counts.

        Args:
            size: (rows, columns), at least those of the image.
        """
        shares = torch.zeros((len(self), *size), device=self.counts.device)
        rows, columns = self.counts.shape[1:]
        shares[:, :rows, :columns] = self.counts
        return shares.div_(len(range(self.grid.stride)[self.grid.taps()]) ** 2)

    def whole(self) -> torch.Tensor:
        """The masks (M, height, width) bool, on the host."""
        return unpack_windows(self.windows, self.image_size)

    @staticmethod
    def cat(masks: Sequence["GridMasks"]) -> "GridMasks":
        """The masks of several, of images of one size, as Instances.cat wants it."""
        windows = [window for part in masks for window in part.windows]
        return GridMasks(torch.cat([part.counts for part in masks]), windows, masks[0].grid, masks[0].image_size)

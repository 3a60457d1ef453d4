"""GridMasks against masks reduced by PyTorch, and where Detectron2 expects masks: in Instances."""

import pickle

import numpy as np
import pytest
import torch
from detectron2.structures import Instances
from torch.nn import functional as F

from sparseinst.data.grid_masks import GRID_STRIDES, GridMasks, MaskGrid, PackedWindow
from sparseinst.structures.mask_window import MaskWindow

SIZE = (37, 53)


def random_masks(count=6, size=SIZE, seed=0):
    """Speckled rectangles: at the image's corners, of one pixel, and in between."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(count, *size, dtype=torch.bool)
    for index, mask in enumerate(masks):
        bottom, right = (int(torch.randint(1, side + 1, (), generator=generator)) for side in size)
        top, left = (int(torch.randint(0, end, (), generator=generator)) for end in (bottom, right))
        if index == 0:
            top, left, bottom, right = 0, 0, *size
        if index == 1:
            top, left, bottom, right = size[0] - 1, size[1] - 1, *size
        mask[top:bottom, left:right] = torch.rand(bottom - top, right - left, generator=generator) < 0.7
        mask[top, left] = True
    return masks


def grid_masks(masks, grid):
    windows = [MaskWindow(mask.numpy(), 0, 0).shrink() for mask in masks]
    packed = [PackedWindow.pack(window) for window in windows]
    return GridMasks.from_cells([grid.count(window) for window in windows], packed, grid, masks.shape[1:])


def reduced(masks, stride, antialiased, padded_size):
    """As the model reduces whole masks: padded, in float32, then averaged or interpolated."""
    padded = F.pad(masks.float(), (0, padded_size[1] - masks.shape[2], 0, padded_size[0] - masks.shape[1]))[:, None]
    size = tuple(side // stride for side in padded_size)
    if antialiased:
        return F.interpolate(padded, size=size, mode="area")[:, 0]
    return F.interpolate(padded, size=size, mode="bilinear", align_corners=False)[:, 0]


@pytest.mark.parametrize("antialiased", [False, True])
@pytest.mark.parametrize("stride", GRID_STRIDES)
@pytest.mark.parametrize("size", [(37, 53), (64, 96), (1, 1), (1, 40), (63, 2), (33, 32)])
def test_shares_are_those_of_the_padded_masks_bit_for_bit(size, stride, antialiased):
    masks = random_masks(size=size, seed=stride)
    on_grid = grid_masks(masks, MaskGrid(stride, antialiased))
    assert on_grid.counts.dtype == torch.uint8
    # The image's own multiple of 32, and a batch with a larger image.
    for padded_size in ([-(-side // 32) * 32 for side in size], (96, 160)):
        shares = on_grid.on_grid(tuple(side // stride for side in padded_size))
        assert shares.dtype == torch.float32
        assert torch.equal(shares, reduced(masks, stride, antialiased, padded_size))


def test_whole_masks_are_kept():
    masks = random_masks()
    assert torch.equal(grid_masks(masks, MaskGrid(4)).whole(), masks)
    assert grid_masks(masks[:0], MaskGrid(4)).whole().shape == (0, *SIZE)


def test_they_take_a_fraction_of_whole_masks():
    masks = random_masks(count=20, size=(480, 640))
    assert len(pickle.dumps(grid_masks(masks, MaskGrid(4)))) < masks.numel() / 5


@pytest.mark.parametrize(
    "item",
    [2, -1, slice(1, 3), slice(0, 0), [3, 0], [True, False, True, False], torch.tensor([True, False, False, True]),
     torch.tensor([1, 1]), np.array([False] * 4), np.array([2, 0])],
    ids=str,
)  # fmt: skip
def test_indexed_as_tensors_are(item):
    masks = random_masks(count=4)
    chosen, expected = grid_masks(masks, MaskGrid(2))[item], masks[[item]] if isinstance(item, int) else masks[item]
    assert len(chosen) == len(expected) and torch.equal(chosen.whole(), expected)
    assert torch.equal(chosen.counts, grid_masks(expected, MaskGrid(2)).counts)


def test_in_instances():
    masks = random_masks(count=4)
    instances = Instances(SIZE, gt_classes=torch.arange(4), gt_masks=grid_masks(masks, MaskGrid(4, True)))
    even = instances[instances.gt_classes % 2 == 0].to("cpu")
    joint = Instances.cat([even, instances[1]])
    assert len(joint) == 3 and torch.equal(joint.gt_masks.whole(), masks[[0, 2, 1]])
    assert joint.gt_masks.grid == MaskGrid(4, True) and joint.gt_masks.image_size == SIZE
    assert torch.equal(
        joint.gt_masks.on_grid((10, 14)), grid_masks(masks[[0, 2, 1]], MaskGrid(4, True)).on_grid((10, 14))
    )
    assert "num_instances=3" in repr(joint.gt_masks)


def test_counts_move_with_the_model_and_whole_masks_stay():
    moved = grid_masks(random_masks(), MaskGrid(4)).to("meta")
    assert moved.counts.device.type == "meta" and moved.on_grid((16, 24)).device.type == "meta"
    assert torch.equal(moved.whole(), random_masks())


def test_counts_are_pinned(monkeypatch):
    # Without a GPU there is nothing to pin for.
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    masks = grid_masks(random_masks(), MaskGrid(4))
    assert torch.equal(masks.pin_memory().counts, masks.counts + 1) and len(masks.pin_memory()) == len(masks)

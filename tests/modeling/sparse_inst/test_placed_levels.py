"""The levels of a PlacedIAMDecoder by hand: cells, peaks, maps, the level of an object, norms."""

import math

import pytest
import torch
from detectron2.layers import Conv2d, get_norm

from sparseinst.modeling.sparse_inst.placed_decoder import convolve
from sparseinst.modeling.sparse_inst.placed_levels import (
    OBJECT_CELLS,
    OTHER_LEVEL,
    LevelCells,
    halved_maps,
    heatmap_of_levels,
    highest_peaks,
    levels_of,
    on_finest_level,
    placed_maps,
    split_levels,
)

# 15 and 6 cells.
SIZES = [(3, 5), (2, 3)]


def test_halved_maps_are_means():
    features = torch.arange(24.0).view(1, 1, 4, 6)
    finest, half, quarter = halved_maps(features, 3)
    assert finest is features
    assert torch.equal(half[0, 0], torch.tensor([[3.5, 5.5, 7.5], [15.5, 17.5, 19.5]]))
    assert quarter.shape == (1, 1, 1, 1)


def test_cells_by_hand():
    grid = LevelCells.of(SIZES, torch.device("cpu"))
    assert grid.rows.tolist() == [0] * 5 + [1] * 5 + [2] * 5 + [0] * 3 + [1] * 3
    assert grid.columns.tolist() == [0, 1, 2, 3, 4] * 3 + [0, 1, 2] * 2
    assert grid.levels.tolist() == [0] * 15 + [1] * 6
    torch.testing.assert_close(grid.centers[7], torch.tensor([1.5 / 3, 2.5 / 5]))
    torch.testing.assert_close(grid.centers[19], torch.tensor([1.5 / 2, 1.5 / 3]))
    torch.testing.assert_close(grid.object_size[[0, 20]], OBJECT_CELLS / torch.tensor([[3.0, 5], [2, 3]]))


@pytest.mark.parametrize("seed", range(3))
def test_peaks_equal_brute_force(seed):
    heat = torch.randn(1, 2, 21, generator=torch.Generator().manual_seed(seed))
    levels = split_levels(heat, SIZES)
    assert torch.equal(torch.cat([level.flatten(2) for level in levels], dim=2), heat)
    ranked = []
    for start, level in zip((0, 15), levels):
        _, num_classes, height, width = level.shape
        for k, row, column in torch.cartesian_prod(*map(torch.arange, (num_classes, height, width))).tolist():
            value = level[0, k, row, column].item()
            around = level[0, k, max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]
            # Peaks first, the highest first.
            ranked.append((value < around.max().item(), -value, k, start + row * width + column))
    cells, classes = highest_peaks(heat, SIZES, 42)
    assert list(zip(classes[0].tolist(), cells[0].tolist())) == [tuple(entry[2:]) for entry in sorted(ranked)]


def test_more_peaks_than_cells():
    cells, classes = highest_peaks(torch.randn(2, 1, 6), [(2, 3)], 8)
    assert cells.shape == (2, 8) and (cells[:, 6:] == 5).all() and not classes.any()
    assert all(sorted(row[:6].tolist()) == list(range(6)) for row in cells)


def test_one_cell_has_peaks_of_two_classes():
    heat = torch.full((1, 3, 21), -6.0)
    heat[0, 2, 6], heat[0, 0, 6], heat[0, 1, 20] = 2.0, 1.0, 1.5
    cells, classes = highest_peaks(heat, SIZES, 3)
    assert cells.tolist() == [[6, 20, 6]] and classes.tolist() == [[2, 1, 0]]


def test_each_map_is_highest_at_its_cell():
    grid = LevelCells.of(SIZES, torch.device("cpu"))
    cells = torch.tensor([[0, 7, 16]])
    maps = placed_maps(cells, grid)
    assert maps.shape == (1, 3, 21) and torch.equal(maps.argmax(2), cells)
    # One row and two columns from the cell: minus 5 over twice the squared radius.
    assert maps[0, 0, 7].item() == pytest.approx(-5 / (2 * 1.5**2))
    assert (maps[0, 1, 15:] == OTHER_LEVEL).all() and (maps[0, 2, :15] == OTHER_LEVEL).all()
    drawn = on_finest_level(maps, cells, grid, SIZES)
    assert drawn.shape == (1, 3, 3, 5) and torch.equal(drawn[0, :2].flatten(1), maps[0, :2, :15])
    # The middle one of the coarser level's three columns.
    assert drawn[0, 2].flatten().argmax() == 2 and drawn.min() > OTHER_LEVEL


def test_the_level_of_an_object_by_hand():
    # Of 64 x 128 cells: squares of 1, 8, 9, 17 and 60 cells, a box of 4 x 32 cells, and one without an area.
    sides = torch.tensor([[1.0, 1], [8, 8], [9, 9], [17, 17], [60, 60], [4, 32], [0, 0]])
    boxes = torch.cat([torch.zeros(7, 2), sides / torch.tensor([128.0, 64])], dim=1)
    assert levels_of(boxes, (64, 128), 4).round().tolist() == [0, 0, 1, 2, 3, 1, 0]
    assert levels_of(boxes, (64, 128), 4)[2].item() == pytest.approx(math.log2(9 / 6))
    assert levels_of(boxes, (64, 128), 1).tolist() == [0] * 7


def test_the_heat_map_has_each_object_on_its_level():
    # On 4 x 8 cells, and 2 x 4: two objects of two and of four columns.
    masks = torch.zeros(2, 4, 8)
    masks[0, 1, 1:3] = 1
    masks[1, 2:4, 4:8] = 1
    sizes = [(4, 8), (2, 4)]
    heat, is_center, cells = heatmap_of_levels(masks, torch.tensor([0, 1]), torch.tensor([0.0, 0.7]), sizes, 2, 2)
    assert heat.shape == is_center.shape == (2, 40)
    # Row 1, columns 1 and 2; of the second level row 1, columns 2 and 3.
    assert cells.tolist() == [[9, 10], [38, 39]]
    assert is_center.nonzero().tolist() == [[0, 9], [1, 38]]
    assert heat[0, 9] == heat[1, 38] == 1
    # On the other level: 1.5 less the distance.
    assert heat[0, 32:].max() == 0.5 and heat[1, :32].max().item() == pytest.approx(1.5 - 0.7)
    assert heatmap_of_levels(masks, torch.tensor([0, 1]), torch.tensor([0.0, 3.0]), sizes, 2, 2)[0][1, :32].max() == 0
    nothing = heatmap_of_levels(masks[:0], torch.tensor([], dtype=torch.long), torch.tensor([]), sizes, 2, 2)
    assert nothing[0].shape == (2, 40) and not nothing[0].any() and nothing[2].shape == (0, 2)


@pytest.mark.parametrize("norm", ["BN", "GN", ""])
def test_training_and_inference_normalize_alike(norm):
    torch.manual_seed(0)
    conv = Conv2d(3, 32, 3, padding=1, bias=not norm, norm=get_norm(norm, 32))
    if norm == "BN":
        conv.norm.momentum = 1.0
    levels = halved_maps(torch.randn(2, 3, 16, 16), 3)
    trained = convolve(conv.train(), levels)
    found = convolve(conv.eval(), levels)
    # The statistics of all cells together, but for the one cell less of the unbiased variance.
    assert all(torch.allclose(a, b, atol=0.02) for a, b in zip(trained, found))
    if norm == "BN":
        # The pixels of the coarser levels are means, so they vary less.
        assert trained[2].std() < 0.8 * trained[0].std()
        cells = torch.cat([level.flatten(2) for level in trained], dim=2)
        # Half of a normal distribution.
        assert cells.mean((0, 2)).sub(0.4).abs().max() < 0.1

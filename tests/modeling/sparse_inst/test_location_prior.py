"""Places on a grid over the picture, worked by hand."""

import pytest
import torch

from sparseinst.modeling.sparse_inst.location_prior import location_prior, window_logits


def test_location_prior_by_hand():
    # Six instances on a grid of 2 rows and 3 columns over 4x6 pixels: cells of 2x2. Instance 4 is in the middle of the
    # lower row: its place is pixel coordinate (3, 3), half a pixel, so a quarter of a cell, from the four pixels there.
    prior = location_prior(6, 4, 6)
    assert prior.shape == (6, 4, 6)
    assert prior[4, 2:, 2:4].tolist() == [[-0.125, -0.125]] * 2
    # One row up: 1.5 pixels = 0.75 cells above the place.
    assert prior[4, 1, 2].item() == -(0.75**2 + 0.25**2)
    for index in range(6):
        row, column = divmod(index, 3)
        peak = (prior[index] == prior[index].max()).nonzero()
        assert peak.amin(0).tolist() == [2 * row, 2 * column] and len(peak) == 4


@pytest.mark.parametrize(("num_masks", "size"), [(1, (1, 1)), (7, (3, 5)), (20, (1, 9))])
def test_location_prior_of_any_size_is_finite(num_masks, size):
    prior = location_prior(num_masks, *size)
    assert prior.shape == (num_masks, *size) and torch.isfinite(prior).all()


def test_window_logits_by_hand():
    # Two instances on a grid of one row and two columns over 2x4 pixels: a pixel is half a cell high, half a cell wide.
    # The maps of the first, in two groups, are at (row, column) (0, 0) and (0, 2): centre at row 0, column 1, which is
    # y 0.25, x 0.75. The second's are at its lower right corner: y 0.75, x 1.75.
    maps = torch.zeros(1, 4, 2, 4)
    maps[0, 0, 0, 0] = maps[0, 2, 0, 2] = maps[0, 1, 1, 3] = maps[0, 3, 1, 3] = 1
    logits = window_logits(torch.tensor([[[2.0, 5.0], [4.0, -1.0]]]), maps)
    assert logits.shape == (1, 2, 2, 4)
    assert logits[0, 0].tolist() == [[4.5, 5, 4.5, 3], [4, 4.5, 4, 2.5]]
    assert logits[0, 1, 1].tolist() == [-1 - 4 * distance**2 for distance in (1.5, 1, 0.5, 0)]

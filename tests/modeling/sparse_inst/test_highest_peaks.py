import pytest
import torch

from sparseinst.modeling.sparse_inst.placed_decoder import highest_peaks, placed_maps


@pytest.mark.parametrize("seed", range(3))
def test_peaks_equal_brute_force(seed):
    heat = torch.randn(1, 2, 6, 9, generator=torch.Generator().manual_seed(seed))
    values = {
        (k, row, column): heat[0, k, row, column].item() for k in range(2) for row in range(6) for column in range(9)
    }

    def is_peak(k, row, column):
        rows, columns = slice(max(0, row - 1), row + 2), slice(max(0, column - 1), column + 2)
        return values[k, row, column] == heat[0, k, rows, columns].max().item()

    # Peaks first, the highest first.
    ranked = sorted(values, key=lambda place: (not is_peak(*place), -values[place]))
    cells, classes = highest_peaks(heat, 108)
    found = [(k, *divmod(cell, 9)) for k, cell in zip(classes[0].tolist(), cells[0].tolist())]
    assert found == ranked


def test_more_peaks_than_cells():
    cells, classes = highest_peaks(torch.randn(2, 1, 2, 3), 8)
    assert cells.shape == (2, 8) and (cells[:, 6:] == 5).all() and not classes.any()
    assert all(sorted(row[:6].tolist()) == list(range(6)) for row in cells)


def test_one_cell_has_peaks_of_two_classes():
    heat = torch.full((1, 3, 4, 5), -6.0)
    heat[0, 2, 1, 1], heat[0, 0, 1, 1], heat[0, 1, 3, 4] = 2.0, 1.0, 1.5
    cells, classes = highest_peaks(heat, 3)
    assert cells.tolist() == [[6, 19, 6]] and classes.tolist() == [[2, 1, 0]]


def test_each_map_is_highest_at_its_cell():
    maps = placed_maps(torch.tensor([[0, 7, 11]]), 3, 4)
    assert maps.shape == (1, 3, 3, 4) and maps.flatten(2).argmax(2).tolist() == [[0, 7, 11]]
    # One row and two columns from the cell: minus 5 over twice the squared radius.
    assert maps[0, 0, 1, 2].item() == pytest.approx(-5 / (2 * 1.5**2))

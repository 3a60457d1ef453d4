"""The heat map of a PlacedIAMDecoder's training: centers, cells and losses by hand."""

import math

import pytest
import torch

from sparseinst.ops.losses import box_loss, center_focal_loss, center_heatmap


def test_center_of_a_ring_lies_on_it():
    mask = torch.ones(1, 7, 7)
    mask[:, 1:6, 1:6] = 0
    heat, ((cell,),) = center_heatmap(mask, torch.tensor([1]), 3)
    assert heat[0].sum() == heat[2].sum() == 0
    assert mask[0].flatten()[cell] == 1 and heat[1].flatten()[cell] == 1 == heat.max()


def test_heat_map_by_hand():
    # Columns 1 to 3 of row 2: variance 2/3 in x, and the least spread, 0.3 cells, in y; both halved.
    mask = torch.zeros(1, 5, 5)
    mask[0, 2, 1:4] = 1
    heat, cells = center_heatmap(mask, torch.tensor([0]), 1)
    assert cells.tolist() == [[12]]
    assert heat[0, 2, 3].item() == pytest.approx(math.exp(-0.5 / (0.25 * 2 / 3)))
    assert heat[0, 1, 2].item() == pytest.approx(math.exp(-0.5 / (0.25 * 0.09)))
    both = torch.cat([mask, mask.roll(1, 2)])
    overlapping, cells = center_heatmap(both, torch.tensor([0, 0]), 1)
    assert cells.tolist() == [[12], [13]] and overlapping.max() == 1 and (overlapping >= heat).all()
    lower, _ = center_heatmap(both, torch.tensor([0, 0]), 1, weights=torch.tensor([1.0, 0.25]))
    assert lower[0, 2, 2] == 1 and lower[0, 2, 4].item() == pytest.approx(0.25 * overlapping[0, 2, 4].item())


def test_the_cells_of_instances_by_hand():
    # The center of mass lies at 1.29 in the row, between the second and the third cell. The second instance covers one.
    masks = torch.zeros(2, 3, 5)
    masks[0, 1, 0:4] = torch.tensor([1.0, 1.0, 1.0, 0.5])
    masks[1, 2, 4] = 1
    cells = center_heatmap(masks, torch.tensor([0, 0]), 1, num_cells=3)[1]
    assert cells.tolist() == [[6, 7, 5], [14, 14, 14]]
    # More cells than the map has.
    assert center_heatmap(torch.ones(1, 1, 2), torch.tensor([0]), 1, num_cells=3)[1].shape == (1, 3)


def test_no_instances_make_an_empty_heat_map():
    heat, cells = center_heatmap(torch.zeros(0, 4, 5), torch.zeros(0, dtype=torch.int64), 2)
    assert len(cells) == 0
    assert heat.shape == (2, 4, 5) and not heat.any()


def test_focal_loss_by_hand():
    logits, heat = torch.tensor([0.0, 0.0, 2.0]), torch.tensor([1.0, 0.5, 0.0])
    is_center = torch.tensor([True, False, False])
    p = 1 / (1 + math.exp(-2))
    expected = -(0.25 * math.log(0.5) + 0.5**4 * 0.25 * math.log(0.5) + p**2 * math.log(1 - p))
    assert center_focal_loss(logits, heat, is_center).item() == pytest.approx(expected, rel=1e-6)


def test_box_loss_by_hand():
    expected = torch.tensor([[1.0, 2.0, 5.0, 6.0]]) / 8
    assert box_loss(expected, expected).item() == pytest.approx(0, abs=1e-6)
    # Twice as wide: IoU 1 / 2, and two edges are off by half a width.
    wide = box_loss(torch.tensor([[-1.0, 2.0, 7.0, 6.0]]) / 8, expected).item()
    assert wide == pytest.approx(0.5 + 0.5 * 2 * (0.5 - 0.05), rel=1e-5)
    assert box_loss(expected[:0], expected[:0]).item() == 0

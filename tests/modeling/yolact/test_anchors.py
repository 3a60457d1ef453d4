"""Anchors and their code of boxes, worked by hand."""

import math

import pytest
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator

from sparseinst.modeling.yolact.anchors import BOX_TRANSFORM, AnchorSpec, grid_sizes

LEVELS = (3, 4, 5, 6, 7)
SIZES = {550: (24, 48, 96, 192, 384), 400: (17, 34, 69, 139, 279), 700: (30, 61, 122, 244, 488)}
PLUS_SCALES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))


def centers_and_sides(boxes):
    return torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], dim=1)


@pytest.mark.parametrize(
    ("side", "expected", "count"),
    [(550, [69, 35, 18, 9, 5], 19248), (400, [50, 25, 13, 7, 4], 10077), (700, [88, 44, 22, 11, 6], 30963)],
)
def test_sizes_and_counts(side, expected, count):
    sizes = grid_sizes(side, LEVELS)
    assert sizes == expected
    spec = AnchorSpec(SIZES[side])
    assert spec.num_anchors == 3 and len(spec.boxes(sizes, side)) == count
    plus = AnchorSpec(SIZES[side], PLUS_SCALES)
    assert plus.num_anchors == 9 and len(plus.boxes(sizes, side)) == 3 * count


def test_first_rows_at_550():
    rows = centers_and_sides(AnchorSpec(SIZES[550], square=True).boxes(grid_sizes(550, LEVELS), 550))
    assert rows[0].tolist() == pytest.approx([0.5 / 69, 0.5 / 69, 24 / 550, 24 / 550])
    # Squares of 1, 0.70711 and 1.41421 of the size.
    assert rows[1, 2:].tolist() == pytest.approx([24 * math.sqrt(0.5) / 550] * 2, rel=1e-5)
    assert rows[2, 2:].tolist() == pytest.approx([24 * math.sqrt(2) / 550] * 2, rel=1e-5)
    # Columns before rows: the second cell is to the right.
    assert rows[3, :2].tolist() == pytest.approx([1.5 / 69, 0.5 / 69])
    starts = [0, 14283, 17958, 18930, 19173, 19248]
    for start, cells, size in zip(starts, (69, 35, 18, 9, 5), SIZES[550]):
        assert rows[start].tolist() == pytest.approx([0.5 / cells] * 2 + [size / 550] * 2, rel=1e-5)
    assert len(rows) == starts[-1]


def test_true_ratios_are_width_over_height():
    rows = centers_and_sides(AnchorSpec((24,), PLUS_SCALES).boxes([2], 48))
    # Scale by scale, each with the ratios 1, 1/2 and 2: areas are those of the scale.
    for index, scale in enumerate(PLUS_SCALES):
        for row, ratio in zip(rows[3 * index : 3 * index + 3], (1, 0.5, 2)):
            width, height = row[2:].tolist()
            assert width / height == pytest.approx(ratio, rel=1e-5)
            assert width * height == pytest.approx((scale * 24 / 48) ** 2, rel=1e-5)


def test_detectron2s_anchors_would_leave_the_image():
    generator = DefaultAnchorGenerator(sizes=[[384]], aspect_ratios=[[1.0]], strides=[128], offset=0.5)
    (stock,) = generator([torch.zeros(1, 1, 5, 5)])
    assert centers_and_sides(stock.tensor)[-1, 0] == 576
    ours = AnchorSpec((384,), ratios=(1.0,)).boxes([5], 550)
    assert 550 * centers_and_sides(ours)[-1, 0].item() == pytest.approx(495)


def test_deltas():
    # Center (0.5, 0.5), sides 0.2; the box is moved by a quarter of the side.
    anchor, box = torch.tensor([[0.4, 0.4, 0.6, 0.6]]), torch.tensor([[0.45, 0.40, 0.65, 0.60]])
    deltas = BOX_TRANSFORM.get_deltas(anchor, box)
    assert deltas[0].tolist() == pytest.approx([2.5, 0, 0, 0], abs=1e-5)
    # Smooth L1 of 2.5 is 2.0, times the weight 1.5.
    loss = 1.5 * torch.nn.functional.smooth_l1_loss(torch.zeros(1, 4), deltas, reduction="sum")
    assert loss.item() == pytest.approx(3.0, rel=1e-5)
    assert torch.allclose(BOX_TRANSFORM.apply_deltas(deltas, anchor), box, atol=1e-6)

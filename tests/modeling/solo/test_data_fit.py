"""Shares of a data set's objects in ranges and cells, worked by hand, and the proposals that follow from them."""

import math

import numpy as np
import pytest

from sparseinst.modeling.meta_arch import ImageObjects
from sparseinst.modeling.solo.data_fit import describe_fit, measure_fit, propose_grid, propose_ranges, size_warnings
from sparseinst.modeling.solo.model import SOLO
from tests.modeling.solo.tiny_solo import tiny_solo_cfg


def image(*objects, size=(100, 100)):
    """Return an image with objects (center y, center x, side): squares."""
    centers = np.array([(y, x) for y, x, _ in objects], float).reshape(-1, 2)
    sides = np.array([side for *_, side in objects], float)[:, None]
    boxes = np.concatenate([centers[:, ::-1] - sides / 2, centers[:, ::-1] + sides / 2], axis=1)
    return ImageObjects(size, boxes, centers)


def test_ranges_and_levels_are_counted():
    images = [image((50, 50, 5), (50, 50, 15), (50, 50, 25), (50, 50, 60)), image()]
    # 5: the first level; 15: both; 25: the second; 60: none.
    fit = measure_fit(images, [10, 10], [(1, 20), (10, 40)], sigma=0.2)
    assert (fit.in_no_range, fit.on_one_level) == (0.25, 0.5)


def test_a_shared_cell_counts_for_both_objects_and_the_earlier_one_is_lost():
    # On 10 x 10 cells of 10 pixels: the first two have cell (1, 1), the third one another cell.
    images = [image((15, 15, 4), (18, 12, 4), (85, 85, 4))]
    fit = measure_fit(images, [10], [(1, 100)], sigma=0.2)
    assert (fit.sharing, fit.lost) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    # Cells of 1 pixel hold them apart.
    fit = measure_fit(images, [100], [(1, 100)], sigma=0.2)
    assert (fit.sharing, fit.lost) == (0, 0)
    # An object that a second level keeps is not lost.
    fit = measure_fit(images, [10, 100], [(1, 100), (1, 100)], sigma=0.2)
    assert fit.sharing > 0 and fit.lost == 0


def test_objects_of_different_images_share_no_cell():
    assert measure_fit([image((15, 15, 4)), image((15, 15, 4))], [10], [(1, 100)], 0.2).sharing == 0


def test_without_objects_there_is_nothing_to_say():
    assert math.isnan(measure_fit([image()], [10], [(1, 100)], 0.2).sharing)
    assert list(describe_fit([image()], "MODEL.SOLO", [10], [(1, 100)], 0.2)) == []


def test_proposed_ranges_cover_all_sizes_twice():
    random = np.random.default_rng(0)
    sides = np.exp(random.uniform(math.log(10), math.log(600), 400))
    images = [image(*[(400, 400, side) for side in sides], size=(800, 1344))]
    ranges = propose_ranges(images, 5)
    assert ranges[0][0] == 1 and ranges[-1][1] >= 2048 and ranges == sorted(ranges)
    fit = measure_fit(images, [40] * 5, ranges, 0.2)
    assert fit.in_no_range == 0 and fit.on_one_level < 0.25
    # Objects of one size have ranges too.
    ranges = propose_ranges([image((50, 50, 20))], 5)
    assert any(low <= 20 <= high for low, high in ranges) and all(low <= high for low, high in ranges)


def test_a_proposed_grid_is_the_smallest_that_holds_objects_apart():
    # Cells of 12.5 pixels hold 26 and 40 apart; 26 and 36 lie in one of them, and in two of 8.3.
    assert propose_grid([image((26, 26, 2), (40, 40, 2))], (1, 100), 0.2) == 8
    assert propose_grid([image((26, 26, 2), (36, 36, 2))], (1, 100), 0.2) == 12
    # No grid holds apart what has one center.
    assert propose_grid([image((26, 26, 2), (26, 26, 3))], (1, 100), 0.2) == 40


def test_the_lines_name_the_keys_and_both_fits():
    lines = list(describe_fit([image((15, 15, 4), (16, 14, 4))], "MODEL.SOLOV2", [10], [(5, 9)], 0.2))
    assert lines[0].startswith("MODEL.SOLOV2: 100.0% of the objects in no range")
    assert "MODEL.SOLOV2.SCALE_RANGES [[1, " in lines[1] and "0.0% of the objects in no range" in lines[1]


RANGES = ((1, 96), (48, 192), (96, 384), (192, 768), (384, 2048))


@pytest.mark.parametrize(
    ("ranges", "sizes", "longest", "expected"),
    [
        (RANGES, (640, 800), 1333, None),
        (RANGES, (224, 288), 384, "larger images: no object is in [[384, 2048]]"),
        (((1, 32), (16, 64)), (640, 800), 1333, "smaller images: objects above 64 pixels"),
        (RANGES, (0,), 1333, None),
    ],
)
def test_ranges_of_other_image_sizes_are_warned_of(ranges, sizes, longest, expected):
    warnings = list(size_warnings("MODEL.SOLO", ranges, sizes, longest))
    assert len(warnings) == (expected is not None)
    if expected:
        assert expected in warnings[0] and "MODEL.SOLO.SCALE_RANGES" in warnings[0]


def test_the_model_reads_its_own_keys():
    cfg = tiny_solo_cfg("solo", "INPUT.MIN_SIZE_TRAIN", (32,), "INPUT.MAX_SIZE_TRAIN", 64)
    assert "[[48, 192], [96, 2048]]" in next(SOLO.training_warnings(cfg))
    assert next(SOLO.describe_objects(cfg, [image((15, 15, 4))])).startswith("MODEL.SOLO: 0.0%")

"""Shares of a data set's objects in ranges and cells, worked by hand, and the proposals that follow from them."""

import math

import numpy as np
import pytest

from sparseinst.modeling.solo.data_fit import describe_fit, measure_fit, propose_grid, propose_ranges, size_warnings
from sparseinst.modeling.solo.model import SOLO
from sparseinst.structures.image_objects import ImageObjects
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


STRIDES = (8, 8, 16, 32, 32)


def test_without_objects_nothing_is_proposed():
    assert list(describe_fit([image()], "MODEL.SOLO", STRIDES, [10] * 5, [(1, 100)] * 5, 0.2)) == []
    # Objects in every second image only, and more images than are measured.
    images = [image(), image((50, 50, 30))] * 501
    assert len(list(describe_fit(images, "MODEL.SOLO", STRIDES, [10] * 5, [(1, 100)] * 5, 0.2))) == 4


@pytest.mark.parametrize(("smallest", "largest"), [(10, 600), (60, 90), (8, 12), (300, 700)])
def test_proposed_ranges_cover_all_sizes(smallest, largest):
    random = np.random.default_rng(0)
    sides = np.exp(random.uniform(math.log(smallest), math.log(largest), 400))
    images = [image(*[(400, 400, side) for side in sides], size=(800, 1344))]
    ranges = propose_ranges(images, STRIDES)
    assert ranges[0][0] == 1 and ranges[-1][1] >= 2048 and ranges == sorted(ranges)
    assert all(low >= 2 * stride for (low, _), stride in zip(ranges[1:], STRIDES[1:]))
    assert all(finer[1] >= 2 * coarser[0] for finer, coarser in zip(ranges, ranges[1:]))
    fit = measure_fit(images, [40] * 5, ranges, 0.2)
    assert fit.in_no_range == 0 and (fit.on_one_level < 0.25 or largest < 16)


def test_a_proposed_grid_is_finer_than_the_objects_and_not_than_the_map():
    # Objects of 96 pixels in 800: 5 cells each are 41.7; a map of stride 32 has 25 pixels.
    assert propose_grid([image((400, 400, 90), size=(800, 800))], 8, (48, 192), 0.2) == 40
    assert propose_grid([image((400, 400, 90), size=(800, 800))], 32, (48, 192), 0.2) == 28
    assert propose_grid([image((400, 400, 500), size=(800, 800))], 32, (250, 2048), 0.2) == 8


def test_a_proposed_grid_grows_where_the_levels_own_objects_are_lost():
    # 1000 small objects are not of the level, and do not count.
    others = [(y * 8.0, x * 8.0, 2) for y in range(10) for x in range(100)]
    close = [(400, 400, 300), (420, 420, 300)]
    alone = propose_grid([image((400, 400, 300), size=(800, 800))], 32, (250, 2048), 0.2)
    assert alone == 8
    together = propose_grid([image(*others, *close, size=(800, 800))], 32, (250, 2048), 0.2)
    # 28, the size of the map, where no grid holds them apart: their boxes' middles overlap.
    assert together > alone


def test_the_lines_name_the_keys_and_both_fits():
    lines = list(describe_fit([image((15, 15, 4), (16, 14, 4))], "MODEL.SOLOV2", [8], [10], [(5, 9)], 0.2))
    assert lines[0].startswith("MODEL.SOLOV2, at the training's largest size")
    assert "now: 100.0% of the objects in no range" in lines[1]
    assert "MODEL.SOLOV2.SCALE_RANGES [[1, " in lines[2] and "MODEL.SOLOV2.NUM_GRIDS [" in lines[2]
    assert "0.0% of the objects in no range" in lines[3]


RANGES = ((1, 96), (48, 192), (96, 384), (192, 768), (384, 2048))


@pytest.mark.parametrize(
    ("ranges", "sizes", "longest", "expected"),
    [
        (RANGES, (640, 800), 1333, None),
        (RANGES, (224, 288), 384, "larger images: the last one begins at 384 pixels"),
        (RANGES, (352, 512), 768, "larger images"),
        (((1, 56), (28, 112), (56, 224), (112, 448), (224, 896)), (352, 512), 768, None),
        (
            ((1, 56), (28, 112), (56, 224), (112, 448), (224, 896)),
            (640, 800),
            1333,
            "smaller images: objects above 896",
        ),
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
    assert "begins at 96 pixels" in next(SOLO.training_warnings(cfg))
    assert "now: 0.0% of the objects in no range" in list(SOLO.describe_objects(cfg, [image((15, 15, 4))]))[1]

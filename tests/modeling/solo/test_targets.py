"""Grid targets, worked by hand: the cells, their order, what overlaps and what vanishes."""

import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances

from sparseinst.modeling.solo.targets import GridSpec, grid_targets, reduce_masks

GRIDS = (40, 36, 24, 16, 12)
RANGES = ((1, 96), (48, 192), (96, 384), (192, 768), (384, 2048))
SOLO = GridSpec(GRIDS, RANGES, (4, 4, 8, 16, 16), 0.2, keeps_every_pair=False)
SOLOV2 = GridSpec(GRIDS, RANGES, (4, 4, 4, 4, 4), 0.2, keeps_every_pair=True)
CPU = torch.device("cpu")


def instances(size, *objects):
    """Return Instances of rectangles or masks: (class, (x0, y0, x1, y1)) or (class, mask, box)."""
    masks, boxes = [], []
    for _, *shape in objects:
        if len(shape) == 1:
            (x0, y0, x1, y1) = shape[0]
            mask = torch.zeros(size, dtype=torch.bool)
            mask[y0:y1, x0:x1] = True
            shape = (mask, shape[0])
        masks.append(shape[0])
        boxes.append(shape[1])
    return Instances(
        size,
        gt_classes=torch.tensor([each[0] for each in objects], dtype=torch.int64),
        gt_masks=BitMasks(torch.stack(masks) if masks else torch.zeros(0, *size)),
        gt_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
    )


def cells_of(targets):
    """Return the cells of each level that has some."""
    return {level: pairs.cells.tolist() for level, pairs in enumerate(targets.levels) if len(pairs.cells)}


def sums_of(targets, spec):
    """Return the pixels of each pair's mask target, by level."""
    return {
        level: targets.masks[stride][pairs.objects].flatten(1).sum(1).tolist()
        for level, (pairs, stride) in enumerate(zip(targets.levels, spec.mask_strides))
        if len(pairs.cells)
    }


def single_object(padded_size, box, spec=SOLO):
    return grid_targets(instances(padded_size, (0, box)), padded_size, spec, CPU)


def test_one_object_on_two_levels():
    for spec, sums in ((SOLO, (1200, 300)), (SOLOV2, (1200, 1200))):
        targets = single_object((800, 1216), (400, 200, 560, 320), spec)
        assert cells_of(targets) == {1: [409, 410, 445, 446], 2: [177, 201]}
        assert sums_of(targets, spec) == {1: [sums[0]] * 4, 2: [sums[1]] * 2}


@pytest.mark.parametrize(
    ("end", "level_2"), [(385, (11, 12, 13)), (384, (10, 11, 12))], ids=["center on a grid line", "center below it"]
)
def test_grid_lines(end, level_2):
    targets = single_object((512, 512), (128, 128, end, end))
    assert cells_of(targets)[2] == [row * 24 + column for row in level_2 for column in level_2]
    assert cells_of(targets)[3] == [row * 16 + column for row in (7, 8) for column in (7, 8)]


@pytest.mark.parametrize(("side", "levels"), [(48, [0, 1]), (96, [0, 1, 2]), (192, [1, 2, 3])])
def test_ranges_include_their_ends(side, levels):
    assert list(cells_of(single_object((512, 512), (100, 100, 100 + side, 100 + side)))) == levels


def test_the_center_is_that_of_the_mask_not_of_the_box():
    mask = torch.zeros(512, 512, dtype=torch.bool)
    mask[100:300, 100:140] = True
    mask[260:300, 100:300] = True
    targets = grid_targets(instances((512, 512), (0, mask, (100, 100, 300, 300))), (512, 512), SOLO, CPU)
    cells, sums = cells_of(targets), sums_of(targets, SOLO)
    assert cells[2] == [246, 247, 248, 270, 271, 272] and sums[2] == [271] * 6
    assert cells[3] == [100, 101, 116, 117] and sums[3] == [69] * 4


def test_cells_depend_on_the_padding():
    box = (300, 200, 400, 300)
    assert cells_of(single_object((512, 512), box))[2] == [279, 280, 303, 304]
    wide = grid_targets(instances((512, 512), (0, box)), (512, 768), SOLO, CPU)
    assert cells_of(wide)[2] == [274, 275, 298, 299]


def test_at_most_three_cells_each_way():
    cells = cells_of(single_object((512, 512), (0, 0, 500, 30)))
    assert cells[1] == [16, 17, 18, 52, 53, 54] and cells[2] == [10, 11, 12]


def test_a_later_object_takes_the_cell():
    objects = instances((512, 512), (4, (100, 100, 200, 200)), (6, (104, 104, 200, 200)))
    targets = grid_targets(objects, (512, 512), SOLO, CPU)
    cells = {0: [451, 452, 491, 492], 1: [333, 334, 335, 369, 370, 371, 405, 406, 407], 2: [150, 151, 174, 175]}
    assert cells_of(targets) == cells
    assert all((targets.levels[level].categories[cells[level]] == 6).all() for level in cells)
    assert {level: set(sums) for level, sums in sums_of(targets, SOLO).items()} == {0: {576}, 1: {576}, 2: {144}}
    # SOLOv2 learns both masks.
    both = grid_targets(objects, (512, 512), SOLOV2, CPU)
    assert [len(both.levels[level].cells) for level in range(3)] == [4, 18, 8]
    assert [len(both.levels[level].cells.unique()) for level in range(3)] == [4, 9, 4]
    assert [level.num_overwritten for level in both.levels] == [0, 9, 4, 0, 0]
    assert sums_of(both, SOLOV2) == {0: [576] * 4, 1: [625] * 9 + [576] * 9, 2: [625] * 4 + [576] * 4}


@pytest.mark.parametrize(("side", "stride", "vanished", "of"), [(2, 4, 3, 4), (3, 4, 2, 4), (4, 4, 1, 4), (8, 8, 1, 8)])
def test_small_squares_vanish(side, stride, vanished, of):
    masks = torch.zeros(of, 64, 64, dtype=torch.bool)
    for start in range(of):
        masks[start, 16 + start : 16 + start + side, 16 + start : 16 + start + side] = True
    assert int((~reduce_masks(masks, stride).flatten(1).any(1)).sum()) == vanished
    larger = torch.zeros(stride, 64, 64, dtype=torch.bool)
    for start in range(stride):
        larger[start, 16 + start : 17 + start + stride, 16 + start : 17 + start + stride] = True
    assert reduce_masks(larger, stride).flatten(1).any(1).all()


def test_reduction_is_bilinear():
    masks = torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(0)) > 0.5
    for stride in (1, 2, 4, 8, 16):
        size = (64 // stride, 96 // stride)
        expected = torch.nn.functional.interpolate(masks[None].float(), size=size, mode="bilinear")[0] >= 0.5
        assert torch.equal(reduce_masks(masks, stride), expected)


def test_an_object_that_vanishes_keeps_its_cells():
    targets = single_object((512, 512), (6, 6, 8, 8))
    assert len(targets.levels[0].cells) == 1 and sums_of(targets, SOLO)[0] == [0]


def test_no_objects_and_empty_masks():
    for objects in ([], [(1, torch.zeros(64, 96, dtype=torch.bool), (0.0, 0.0, 50.0, 50.0))]):
        targets = grid_targets(instances((64, 96), *objects), (64, 96), SOLO, CPU)
        assert cells_of(targets) == {}
        assert all((level.categories == -1).all() for level in targets.levels)
        assert targets.masks[4].shape == (len(objects), 16, 24)


def test_boxes_of_the_masks_where_there_are_none():
    given = instances((512, 512), (4, (100, 100, 200, 200)), (6, (300, 104, 396, 200)))
    expected = cells_of(grid_targets(given, (512, 512), SOLO, CPU))
    given.remove("gt_boxes")
    assert cells_of(grid_targets(given, (512, 512), SOLO, CPU)) == expected

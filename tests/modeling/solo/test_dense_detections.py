"""The post-processing with fixed shapes of SOLO and SOLOv2 against the one of all other engines."""

import pytest
import torch

from tests.modeling.dense import assert_dense_equals_postprocess
from tests.modeling.solo.tiny_solo import GRIDS, NUM_CLASSES, tiny_solo

NODE = "MODEL.SOLOV2"
NUM_PAIRS = NUM_CLASSES * sum(size * size for size in GRIDS)
IMAGES = torch.randn(3, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("opts", "max_detections"),
    [
        ((), 100),
        ((f"{NODE}.NMS.KERNEL", "linear"), 100),
        ((f"{NODE}.NMS.UPDATE_THRESHOLD", 0.3), 100),
        (("MODEL.OUTPUT.SCORE_THRESHOLD", 0.3), 100),
        ((), 3),
        ((f"{NODE}.MAX_DETECTIONS", 5), 100),
    ],
)
def test_it_finds_what_detect_finds(opts, max_detections):
    # All pairs may enter NMS, because `detect` scores the masks before it counts.
    model = tiny_solo("solov2", f"{NODE}.NMS.PRE", NUM_PAIRS, *opts)
    counts = assert_dense_equals_postprocess(model, IMAGES, max_detections)
    assert min(counts) > 2 and (max_detections == 100 or max(counts) == max_detections)


@pytest.mark.parametrize("variant", ["solo", "decoupled", "decoupled_light"])
def test_heads_of_solo(variant):
    model = tiny_solo(variant, "MODEL.SOLO.NMS.PRE", NUM_PAIRS)
    assert min(assert_dense_equals_postprocess(model, IMAGES)) > 2


# The masks of a level of stride 1 are finer than the image, and are resized as well.
@pytest.mark.parametrize("strides", [[8, 8, 16, 32, 32], [1, 8, 8, 16, 32], [2, 1, 8, 16, 32]])
@pytest.mark.parametrize("variant", ["solo", "decoupled", "solov2"])
def test_masks_of_cells_of_all_levels(variant, strides):
    """Cells in any order, some twice, give the masks that `mask_probs` computes level by level."""
    node = NODE if variant == "solov2" else "MODEL.SOLO"
    model = tiny_solo(variant, f"{node}.STRIDES", strides)
    generator = torch.Generator().manual_seed(0)
    cells = torch.randint(sum(model.head.level_sizes), (3, 40), generator=generator)
    cells[:, :5] = torch.tensor([0, 99, 100, 224, 0])
    stride = min(model.head.mask_strides)
    size = (64 // stride, 96 // stride)
    with torch.no_grad():
        outputs = model.network(IMAGES)
        dense = model.head.dense_mask_probs(outputs, cells, size)
        for image in range(3):
            for cell, found in zip(cells[image].tolist(), dense[image]):
                level = 0
                while cell >= model.head.level_sizes[level]:
                    cell -= model.head.level_sizes[level]
                    level += 1
                expected = model.head.mask_probs(outputs, image, level, torch.tensor([cell]), size)[0]
                assert torch.allclose(found, expected, atol=1e-5)


def test_candidates_beyond_the_limit_are_left_out():
    model = tiny_solo("solov2", f"{NODE}.NMS.PRE", 4)
    with torch.no_grad():
        outputs = model.network(IMAGES)
        assert model.dense_detections(outputs, (64, 96), 100)["scores"].shape == (3, 4)


def test_no_candidates():
    assert assert_dense_equals_postprocess(tiny_solo("solov2", f"{NODE}.SCORE_THRESHOLD", 1.0), IMAGES) == [0, 0, 0]


@pytest.mark.parametrize(
    ("variant", "opts", "message"),
    [
        ("solov2", (f"{NODE}.NMS.TYPE", "mask"), "MODEL.SOLOV2.NMS.TYPE is mask; --end-to-end supports matrix only"),
        ("solo", ("MODEL.SOLO.NMS.TYPE", "mask"), "MODEL.SOLO.NMS.TYPE is mask; --end-to-end supports matrix only"),
    ],
)
def test_others_are_refused(variant, opts, message):
    with pytest.raises(ValueError, match=message):
        tiny_solo(variant, *opts).dense_detections({}, (64, 96), 100)

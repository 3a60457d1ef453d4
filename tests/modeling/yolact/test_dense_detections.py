"""YOLACT's post-processing with fixed shapes against the one of all other engines."""

import pytest
import torch

from tests.modeling.dense import assert_dense_equals_postprocess
from tests.modeling.yolact.tiny_yolact import PLUS, SIDE, spread_scores, tiny_yolact

NODE = "MODEL.YOLACT"


@pytest.mark.parametrize(
    "opts",
    [
        (),
        (f"{NODE}.NMS.TYPE", "cross_class"),
        (f"{NODE}.NMS.TOP_K", 7),
        (f"{NODE}.NMS.SECOND_THRESHOLD", True, f"{NODE}.SCORE_THRESHOLD", 0.9),
        (f"{NODE}.SCORE_THRESHOLD", 0.5, "MODEL.OUTPUT.SCORE_THRESHOLD", 0.55),
        (f"{NODE}.MAX_DETECTIONS", 3),
        PLUS,
    ],
    ids=["fast", "cross_class", "top_k", "second_threshold", "score_threshold", "three", "plus"],
)
def test_it_finds_what_detect_finds(opts):
    model = spread_scores(tiny_yolact(*opts))
    side = 256 if opts is PLUS else SIDE
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    assert min(assert_dense_equals_postprocess(model, images)) > 1


@pytest.mark.parametrize("opts", [(), PLUS], ids=["yolact", "plus"])
def test_fewer_than_max_detections(opts):
    """Rescored by mask IoU and without the empty masks, of which random weights make many."""
    model = spread_scores(tiny_yolact(*opts))
    side = 256 if opts else SIDE
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    assert assert_dense_equals_postprocess(model, images, max_detections=10) == [10, 10]


def test_no_candidates():
    model = tiny_yolact(f"{NODE}.SCORE_THRESHOLD", 1.0)
    assert assert_dense_equals_postprocess(model, torch.randn(2, 3, SIDE, SIDE)) == [0, 0]


def test_greedy_nms_is_refused():
    with pytest.raises(ValueError, match="MODEL.YOLACT.NMS.TYPE is greedy; --end-to-end supports fast and cross_class"):
        tiny_yolact(f"{NODE}.NMS.TYPE", "greedy").dense_detections({}, (SIDE, SIDE), 100)

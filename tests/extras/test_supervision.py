"""Detections and tracks of supervision from the predictor's instances, with boolean and with encoded masks."""

import numpy as np
import pytest

from sparseinst.inference import Predictor
from sparseinst.structures.mask_memory import MaskMemoryError
from tests.tiny_model import tiny_cfg, tiny_model

sv = pytest.importorskip("supervision")
OPTS = ("MODEL.SPARSE_INST.CLS_THRESHOLD", 0.0)


def predictor_of(*opts):
    return Predictor(tiny_cfg(*OPTS, *opts), model=tiny_model(*OPTS, *opts))


def image_of(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (50, 70, 3), dtype=np.uint8)


def test_detections_are_the_predictions():
    (instances,) = predictor_of()([image_of()])
    detections = sv.Detections.from_detectron2({"instances": instances})
    assert len(detections) == len(instances) > 1
    assert np.array_equal(detections.xyxy, instances.pred_boxes.tensor.numpy())
    assert np.array_equal(detections.mask, instances.pred_masks.numpy())
    assert np.array_equal(detections.confidence, instances.scores.numpy())
    assert np.array_equal(detections.class_id, instances.pred_classes.numpy())
    # An area of supervision's own, of boolean masks.
    assert np.array_equal(detections.area, instances.pred_masks.flatten(1).sum(1).numpy())
    drawn = sv.MaskAnnotator().annotate(image_of(), detections)
    assert drawn.shape == (50, 70, 3) and not np.array_equal(drawn, image_of())


def test_encoded_masks_give_the_same_detections():
    expected, encoded = (
        sv.Detections.from_detectron2({"instances": predictor_of(*opts)([image_of()])[0]})
        for opts in ((), ("MODEL.OUTPUT.MASK_FORMAT", "rle"))
    )
    assert encoded == expected and encoded.mask.dtype == bool


def test_encoded_masks_beyond_the_limit_are_refused():
    (instances,) = predictor_of("MODEL.OUTPUT.MASK_FORMAT", "rle", "MODEL.OUTPUT.MAX_MASK_GIB", 1e-6)([image_of()])
    with pytest.raises(MaskMemoryError, match="MODEL.OUTPUT.MAX_MASK_GIB"):
        sv.Detections.from_detectron2({"instances": instances})


def test_no_detections():
    (instances,) = predictor_of("MODEL.OUTPUT.SCORE_THRESHOLD", 1.0, "MODEL.OUTPUT.MASK_FORMAT", "rle")([image_of()])
    detections = sv.Detections.from_detectron2({"instances": instances})
    assert len(detections) == 0 and detections.mask.shape == (0, 50, 70)

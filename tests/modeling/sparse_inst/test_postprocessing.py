"""Post-processing: scores and rescoring by hand, the selection, and masks against the plain computation."""

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_api
from torch.nn import functional as F

from sparseinst.modeling.sparse_inst.postprocessing import class_scores, detect
from sparseinst.ops import mask_output
from sparseinst.ops.mask_output import MaskMemoryError
from sparseinst.ops.mask_resize import resize_masks
from sparseinst.ops.masks import mask_nms, maskness

SIZES = {"padded_size": (32, 64), "image_size": (30, 41), "output_size": (47, 90)}
THRESHOLDS = {"cls_threshold": 0.005, "mask_threshold": 0.45, "max_detections": 100}


def random_outputs(num_masks=12, num_classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # Blobs, so that masks have an inside: noise on a coarse grid.
    coarse = torch.randn(1, num_masks, 3, 4, generator=generator) * 4
    return {
        "class_logits": torch.randn(num_masks, num_classes, generator=generator),
        "objectness_logits": torch.randn(num_masks, generator=generator),
        "mask_logits": F.interpolate(coarse, size=(8, 16), mode="bicubic")[0],
    }


def test_class_scores_by_hand():
    # p(class) = 0.9 and 0.2; objectness 0.4: sqrt(0.36) = 0.6.
    scores, classes = class_scores(torch.tensor([[0.2, 0.9]]).logit(), torch.tensor([0.4]).logit())
    assert classes.tolist() == [1]
    torch.testing.assert_close(scores, torch.tensor([0.6]))


def test_maskness_by_hand():
    # Above 0.45: 0.5, 0.9 and 0.46; 0.45 itself is not. Mean = 1.86 / (3 + 1e-6).
    probs = torch.tensor([[[0.5, 0.9], [0.45, 0.46]], [[0.1, 0.2], [0.3, 0.45]]])
    torch.testing.assert_close(maskness(probs, 0.45), torch.tensor([1.86 / 3.000001, 0.0]))


def test_rescored_and_sorted_by_hand():
    # Two predictions with class score 0.6 (0.9 * 0.4) and 0.8 (0.8 * 0.8), masks of constant probability 0.9 and 0.5:
    # rescored 0.54 and 0.40, so the first is best.
    detections = detect(
        torch.tensor([[0.9], [0.8]]).logit(),
        torch.tensor([0.4, 0.8]).logit(),
        torch.tensor([0.9, 0.5]).logit()[:, None, None].expand(2, 4, 4),
        padded_size=(16, 16),
        image_size=(16, 16),
        output_size=(16, 16),
        **THRESHOLDS,
    )
    torch.testing.assert_close(detections.scores, torch.tensor([0.54, 0.40]), atol=1e-5, rtol=0)
    assert detections.prediction_idx.tolist() == [0, 1]
    assert detections.boxes.tolist() == [[0, 0, 16, 16]] * 2


@pytest.mark.parametrize("output_size", [(47, 90), (30, 41), (7, 9), (1, 1)])
def test_equals_the_plain_computation(output_size):
    outputs = random_outputs()
    sizes = {**SIZES, "output_size": output_size}
    detections = detect(**outputs, **sizes, **THRESHOLDS)

    scores = (outputs["class_logits"].sigmoid().amax(1) * outputs["objectness_logits"].sigmoid()).sqrt()
    probs = outputs["mask_logits"].sigmoid()
    above = probs > 0.45
    scores = scores * (probs * above).sum((1, 2)) / (above.sum((1, 2)) + 1e-6)
    full = F.interpolate(probs[None], size=(32, 64), mode="bilinear", align_corners=False)[..., :30, :41]
    masks = F.interpolate(full, size=output_size, mode="bilinear", align_corners=False)[0] > 0.45
    order = [i for i in scores.argsort(descending=True).tolist() if masks[i].any()]
    assert len(order) > 3
    assert torch.equal(detections.prediction_idx, torch.tensor(order))
    assert torch.equal(detections.masks, masks[order])
    torch.testing.assert_close(detections.scores, scores[order])
    assert torch.equal(detections.boxes, BitMasks(masks[order]).get_bounding_boxes().tensor)
    assert torch.equal(detections.classes, outputs["class_logits"].argmax(1)[order])


def test_the_best_are_kept():
    outputs = random_outputs()
    every = detect(**outputs, **SIZES, **THRESHOLDS)
    best = detect(**outputs, **SIZES, **{**THRESHOLDS, "max_detections": 3})
    assert (every.scores.diff() <= 0).all()
    assert torch.equal(best.scores, every.scores[:3])
    assert torch.equal(best.masks, every.masks[:3])


def test_threshold_is_on_the_score_before_rescoring():
    # Class score 0.6; rescored by 0.5 it is 0.3, below the threshold of 0.5, and stays.
    outputs = {
        "class_logits": torch.tensor([[0.9]]).logit(),
        "objectness_logits": torch.tensor([0.4]).logit(),
        "mask_logits": torch.full((1, 8, 16), 0.5).logit(),
    }
    assert len(detect(**outputs, **SIZES, **{**THRESHOLDS, "cls_threshold": 0.5}).scores) == 1
    assert len(detect(**outputs, **SIZES, **{**THRESHOLDS, "cls_threshold": 0.7}).scores) == 0


def test_empty_masks_are_dropped():
    outputs = random_outputs()
    outputs["mask_logits"][::2] = -5
    # A mask that lies in the padding alone is empty too.
    outputs["mask_logits"][1] = -5
    outputs["mask_logits"][1, :, 14:] = 5
    detections = detect(**outputs, **SIZES, **THRESHOLDS)
    assert set(detections.prediction_idx.tolist()) <= {3, 5, 7, 9, 11}
    assert detections.masks.flatten(1).any(1).all()


def test_nothing_found_has_all_fields():
    detections = detect(**random_outputs(), **SIZES, **{**THRESHOLDS, "cls_threshold": 1.0})
    assert detections.boxes.shape == (0, 4)
    assert detections.masks.shape == (0, 47, 90) and detections.masks.dtype == torch.bool
    assert detections.scores.shape == detections.classes.shape == (0,)


def test_mask_nms():
    # Masks of 4, 3 and 4 pixels; the second lies in the first (IoU 3/4), the third shares 1 of 7 with it.
    masks = torch.zeros(4, 3, 3, dtype=torch.bool)
    masks[0, :2, :2] = True
    masks[1, :2, :2] = torch.tensor([[True, True], [True, False]])
    masks[2, 1:, 1:] = True
    masks[3] = masks[1]
    classes = torch.tensor([0, 0, 0, 1])
    assert mask_nms(masks, classes, 0.7).tolist() == [0, 2, 3]
    assert mask_nms(masks, classes, 0.75).tolist() == [0, 1, 2, 3]
    assert mask_nms(masks, torch.zeros(4), 0.1).tolist() == [0]
    assert mask_nms(masks[:0], classes[:0], 0.5).tolist() == []


def test_mask_nms_is_off_by_default_and_keeps_the_best():
    outputs = random_outputs(num_masks=6)
    outputs = {name: torch.cat([value, value]) for name, value in outputs.items()}
    plain = detect(**outputs, **SIZES, **THRESHOLDS)
    suppressed = detect(**outputs, **SIZES, **THRESHOLDS, mask_nms_threshold=0.99)
    assert len(plain.scores) == 2 * len(suppressed.scores)
    assert torch.equal(suppressed.scores, plain.scores[::2])


@pytest.mark.parametrize("logit", [1e4, -1e4, 0.0])
def test_saturated_and_equal_logits_are_finite(logit):
    detections = detect(
        torch.full((3, 2), logit), torch.full((3,), logit), torch.full((3, 1, 1), logit),
        padded_size=(32, 32), image_size=(1, 1), output_size=(1, 1), **THRESHOLDS,
    )  # fmt: skip
    assert torch.isfinite(detections.scores).all()
    assert len(detections.scores) == (0 if logit < 0 else 3)


def test_maskness_is_the_plain_formula_to_the_last_bit():
    probs = (random_outputs(num_masks=40)["mask_logits"]).sigmoid()
    above = probs > 0.45
    assert torch.equal(maskness(probs, 0.45), (probs * above).sum((1, 2)) / (above.sum((1, 2)) + 1e-6))


def decoded(detections):
    return torch.from_numpy(np.stack([mask_api.decode(rle) for rle in detections.masks])).bool()


def test_encoded_masks_are_the_boolean_ones():
    outputs = random_outputs()
    outputs["mask_logits"][3] = -5
    plain = detect(**outputs, **SIZES, **THRESHOLDS)
    encoded = detect(**outputs, **SIZES, **THRESHOLDS, mask_format="rle")
    assert torch.equal(decoded(encoded), plain.masks)
    for field in ("boxes", "scores", "classes", "prediction_idx"):
        assert torch.equal(getattr(encoded, field), getattr(plain, field))
    nothing = detect(**outputs, **SIZES, **{**THRESHOLDS, "cls_threshold": 1.0}, mask_format="rle")
    assert nothing.masks == [] and nothing.boxes.shape == (0, 4)


def test_a_limit_stops_before_boolean_masks_are_made(monkeypatch):
    outputs = random_outputs(num_masks=12)
    num_bytes = 12 * 47 * 90
    detections = detect(**outputs, **SIZES, **THRESHOLDS, max_mask_gib=num_bytes / 2**30)
    assert len(detections.scores) == 12
    monkeypatch.setattr(mask_output, "_boolean_masks", None)
    # Masks of 1 TB: nothing of that size may be asked for.
    for size, limit, figure in (((47, 90), num_bytes - 1, "0.00 GiB"), ((300000, 300000), 2**32, "1005.83 GiB")):
        sizes = {**SIZES, "output_size": size}
        with pytest.raises(MaskMemoryError, match=f"12 boolean masks of {size[0]}x{size[1]}.*{figure}") as error:
            detect(**outputs, **sizes, **THRESHOLDS, max_mask_gib=limit / 2**30)
        assert "MAX_MASK_GIB" in str(error.value) and "MASK_FORMAT to rle" in str(error.value)
    # Encoded, they are not limited; fewer detections fit.
    assert len(detect(**outputs, **SIZES, **THRESHOLDS, max_mask_gib=1e-9, mask_format="rle").masks) == 12
    monkeypatch.undo()
    few = {**THRESHOLDS, "max_detections": 2}
    assert len(detect(**outputs, **SIZES, **few, max_mask_gib=2 * 47 * 90 / 2**30).scores) == 2


sizes = st.tuples(st.integers(1, 40), st.integers(1, 40)) | st.tuples(st.just(1), st.integers(1, 300))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**16),
    num_masks=st.integers(0, 8),
    mask_size=st.tuples(st.integers(2, 40), st.integers(1, 40)),
    image_size=sizes,
    padding=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    output_size=sizes,
    mask_threshold=st.floats(0.05, 0.95),
    max_detections=st.integers(0, 6),
    spread=st.sampled_from([0.0, 3.0, 1e4]),
)
def test_detections_of_any_size(
    seed, num_masks, mask_size, image_size, padding, output_size, mask_threshold, max_detections, spread
):
    generator = torch.Generator().manual_seed(seed)
    mask_logits = torch.randn(num_masks, *mask_size, generator=generator) * spread
    arguments = {
        "class_logits": torch.randn(num_masks, 3, generator=generator) * max(spread, 1),
        "objectness_logits": torch.randn(num_masks, generator=generator) * max(spread, 1),
        "mask_logits": mask_logits,
        "padded_size": (image_size[0] + padding[0], image_size[1] + padding[1]),
        "image_size": image_size,
        "output_size": output_size,
        "cls_threshold": 0.3,
        "mask_threshold": mask_threshold,
        "max_detections": max_detections,
    }
    detections = detect(**arguments)
    count = len(detections.scores)
    assert count <= min(num_masks, max_detections)
    assert {len(field) for field in detections} == {count}
    assert (detections.scores.diff() <= 0).all() and ((detections.scores >= 0) & (detections.scores <= 1)).all()
    assert detections.masks.shape == (count, *output_size) and detections.masks.flatten(1).any(1).all()
    assert torch.equal(detections.boxes, BitMasks(detections.masks).get_bounding_boxes().tensor)
    assert len(set(detections.prediction_idx.tolist())) == count

    padded_size = arguments["padded_size"]
    probs = mask_logits[detections.prediction_idx].sigmoid()
    assert torch.equal(detections.masks, resize_masks(probs, padded_size, image_size, output_size, mask_threshold))
    encoded = detect(**arguments, mask_format="rle")
    assert torch.equal(encoded.boxes, detections.boxes) and torch.equal(encoded.scores, detections.scores)
    assert len(encoded.masks) == count and (count == 0 or torch.equal(decoded(encoded), detections.masks))

"""NMS and masks of YOLACT: worked by hand, and against the definitions."""

import math

import pytest
import torch
from detectron2.structures import Boxes, pairwise_iou

from sparseinst.modeling.yolact import postprocessing
from sparseinst.modeling.yolact.masks import crop_masks, mask_logits
from sparseinst.modeling.yolact.postprocessing import (
    DetectionOptions,
    cross_class_nms,
    detect,
    fast_nms,
    greedy_box_nms,
)

# IoU 0.6, 0.6 and 1 / 3.
CHAIN = torch.tensor([[0.0, 0, 1, 1], [0.25, 0, 1.25, 1], [0.5, 0, 1.5, 1]])
CHAIN_SCORES = torch.tensor([[0.9], [0.8], [0.7]])
OPTIONS = DetectionOptions()


def test_a_dropped_box_still_drops_others():
    assert fast_nms(CHAIN, CHAIN_SCORES, OPTIONS).candidates.tolist() == [0]
    # At 550 pixels the additional pixel changes little.
    assert greedy_box_nms(CHAIN, CHAIN_SCORES, OPTIONS, 550).candidates.tolist() == [0, 2]


def reference_fast_nms(boxes, scores, threshold, top_k):
    """Return {(candidate, class)} by the definition, one class after the other."""
    ious, kept = pairwise_iou(Boxes(boxes), Boxes(boxes)), set()
    for category in range(scores.shape[1]):
        order = scores[:, category].argsort(descending=True).tolist()[:top_k]
        for rank, candidate in enumerate(order):
            if all(ious[candidate, better] <= threshold for better in order[:rank]):
                kept.add((candidate, category))
    return kept


def reference_greedy(boxes, scores, threshold, side):
    """Return {(candidate, class)}: the best remaining one drops what overlaps it."""
    kept = set()
    pixels = (boxes.double() * side).tolist()

    def area(box):
        return (box[2] - box[0] + 1) * (box[3] - box[1] + 1)

    def iou(a, b):
        width = min(a[2], b[2]) - max(a[0], b[0]) + 1
        height = min(a[3], b[3]) - max(a[1], b[1]) + 1
        shared = max(0, width) * max(0, height)
        return shared / (area(a) + area(b) - shared)

    for category in range(scores.shape[1]):
        order = [i for i in scores[:, category].argsort(descending=True).tolist() if scores[i, category] > 0.05]
        while order:
            best = order.pop(0)
            kept.add((best, category))
            order = [other for other in order if iou(pixels[best], pixels[other]) < threshold]
    return kept


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_definitions(seed):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(60, 2, generator=generator) * 0.5
    boxes = torch.cat([corner, corner + 0.1 + 0.3 * torch.rand(60, 2, generator=generator)], dim=1)
    scores = torch.rand(60, 4, generator=generator).softmax(1)
    options = OPTIONS._replace(max_detections=1000, top_k=40)
    kept = fast_nms(boxes, scores, options)
    found = set(zip(kept.candidates.tolist(), kept.classes.tolist()))
    assert found == reference_fast_nms(boxes, scores, 0.5, 40)
    assert (kept.scores.diff() <= 0).all() and torch.equal(kept.scores, scores[kept.candidates, kept.classes])
    greedy = greedy_box_nms(boxes, scores, options, 550)
    found_greedy = set(zip(greedy.candidates.tolist(), greedy.classes.tolist()))
    assert found_greedy == reference_greedy(boxes, scores, 0.5, 550)
    # Without a limit before it, greedy NMS keeps what Fast NMS keeps, and more; the additional pixel is nothing here.
    kept, greedy = fast_nms(boxes, scores, options._replace(top_k=60)), greedy_box_nms(boxes, scores, options, 10**6)
    assert set(zip(kept.candidates.tolist(), kept.classes.tolist())) < set(
        zip(greedy.candidates.tolist(), greedy.classes.tolist())
    )


@pytest.mark.parametrize("most", [5, 40, 10_000])
@pytest.mark.parametrize("sharpness", [0.5, 1.5])
def test_comparing_few_candidates_changes_nothing(most, sharpness, monkeypatch):
    generator = torch.Generator().manual_seed(most)
    corner = torch.rand(300, 2, generator=generator) * 0.8
    boxes = torch.cat([corner, corner + 0.05 + 0.15 * torch.rand(300, 2, generator=generator)], dim=1)
    # Sharp scores: most good candidates are of a few classes, which need the second comparison.
    favors = torch.tensor([4.0, 2.0, *[0.0] * 18])
    scores = (sharpness * (torch.randn(300, 20, generator=generator) + favors)).softmax(1)
    options = OPTIONS._replace(max_detections=most)
    found = fast_nms(boxes, scores, options)
    monkeypatch.setattr(postprocessing, "FIRST_CANDIDATES", 1000)
    assert all(torch.equal(*pair) for pair in zip(found, fast_nms(boxes, scores, options)))
    expected = reference_fast_nms(boxes, scores, 0.5, 200)
    assert len(found.scores) == min(most, len(expected))
    assert set(zip(found.candidates.tolist(), found.classes.tolist())) <= expected


def test_both_agree_where_nothing_drops_twice():
    boxes = torch.tensor([[0.0, 0, 0.2, 0.2], [0.01, 0, 0.21, 0.2], [0.5, 0.5, 0.9, 0.9]])
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
    fast, greedy = fast_nms(boxes, scores, OPTIONS), greedy_box_nms(boxes, scores, OPTIONS, 550)
    assert all(torch.equal(*pair) for pair in zip(fast, greedy))


def test_the_threshold_itself():
    # IoU of exactly 0.5.
    boxes = torch.tensor([[0.0, 0, 1, 1], [0.0, 0, 1, 0.5]])
    scores = torch.tensor([[0.9], [0.8]])
    assert len(fast_nms(boxes, scores, OPTIONS).scores) == 2
    # (63 + 1) x (31 + 1) of (63 + 1) x (63 + 1) pixels: exactly 0.5 too, where the box falls.
    boxes = torch.tensor([[0.0, 0, 63 / 64, 63 / 64], [0.0, 0, 63 / 64, 31 / 64]])
    assert len(greedy_box_nms(boxes, scores, OPTIONS, 64).scores) == 1
    assert len(greedy_box_nms(boxes, scores, OPTIONS._replace(iou_threshold=0.51), 64).scores) == 2


def test_each_candidate_competes_in_each_class():
    scores = torch.tensor([[0.6, 0.01, 0.0], [0.02, 0.7, 0.0]])
    boxes = torch.tensor([[0.0, 0, 0.1, 0.1], [0.5, 0.5, 0.9, 0.9]])
    kept = fast_nms(boxes, scores, OPTIONS)
    assert list(zip(kept.candidates.tolist(), kept.classes.tolist())) == [(1, 1), (0, 0), (1, 0), (0, 1)]
    kept = fast_nms(boxes, scores, OPTIONS._replace(second_threshold=True))
    assert list(zip(kept.candidates.tolist(), kept.classes.tolist())) == [(1, 1), (0, 0)]
    assert len(fast_nms(boxes, scores, OPTIONS._replace(max_detections=3)).scores) == 3


def test_between_classes():
    boxes = torch.tensor([[0.0, 0, 0.2, 0.2], [0.01, 0, 0.21, 0.2], [0.5, 0.5, 0.9, 0.9]])
    scores = torch.tensor([[0.6, 0.1], [0.2, 0.7], [0.5, 0.4]])
    kept = cross_class_nms(boxes, scores, OPTIONS)
    assert kept.candidates.tolist() == [1, 2] and kept.classes.tolist() == [1, 0]
    assert cross_class_nms(boxes, scores, OPTIONS._replace(top_k=1)).candidates.tolist() == [1]


@pytest.mark.parametrize("nms", [fast_nms, cross_class_nms, lambda *args: greedy_box_nms(*args, 550)])
def test_nothing_in_nothing_out(nms):
    kept = nms(torch.zeros(0, 4), torch.zeros(0, 3), OPTIONS)
    assert [len(values) for values in kept] == [0, 0, 0]


@pytest.mark.parametrize(
    ("x0", "x1", "columns"), [(0.25, 0.5, [1, 2, 3, 4]), (0.3, 0.5, [2, 3, 4]), (0.5, 0.3, [2, 3, 4])]
)
def test_the_crop_has_a_margin_of_a_cell(x0, x1, columns):
    crop = crop_masks(torch.tensor([[x0, 0.0, x1, 1.0]]), (3, 8))[0]
    assert crop.all(0).nonzero().flatten().tolist() == columns and crop.any(0).sum() == len(columns)
    # Rows alike.
    rows = crop_masks(torch.tensor([[0.0, x0, 1.0, x1]]), (8, 3))[0]
    assert torch.equal(rows.T, crop)


def outputs_of(boxes, classes, num_classes=3, side=32, k=2):
    """Return outputs with one anchor for each box, which is the anchor itself, and prototypes of ones."""
    logits = torch.full((1, len(boxes), num_classes + 1), -9.0)
    logits[0, range(len(boxes)), classes] = torch.linspace(6, 3, len(boxes))
    return {
        "class_logits": logits,
        "box_deltas": torch.zeros(1, len(boxes), 4),
        "coefficients": torch.ones(1, len(boxes), k) * 3,
        "prototypes": torch.ones(1, k, side, side),
    }, torch.tensor(boxes)


def test_masks_are_the_boxes_and_boxes_are_clipped():
    outputs, anchors = outputs_of([[0.25, 0.25, 0.5, 0.75], [-0.25, 0.5, 0.25, 1.25]], [1, 2])
    found = detect(outputs, 0, anchors, OPTIONS._replace(second_threshold=True), side=64, output_size=(100, 200))
    assert found.classes.tolist() == [1, 2] and found.prediction_idx.tolist() == [0, 1]
    assert found.boxes.tolist() == [[50, 25, 100, 75], [0, 50, 50, 100]]
    # Cells 7 to 16 of 32, with the margin: a cell beyond each side, resized to 200 columns.
    columns = found.masks[0].any(0).nonzero().flatten()
    assert abs(columns[0] - 7 * 200 / 32) <= 2 and abs(columns[-1] + 1 - 17 * 200 / 32) <= 2


def test_one_resize_from_the_prototypes_to_the_output():
    generator = torch.Generator().manual_seed(0)
    outputs, anchors = outputs_of([[0.1, 0.1, 0.9, 0.9]], [0])
    outputs["prototypes"] = torch.randn(1, 2, 32, 32, generator=generator)
    found = detect(outputs, 0, anchors, OPTIONS._replace(second_threshold=True), side=64, output_size=(50, 70))
    probs = mask_logits(outputs["prototypes"][0], outputs["coefficients"][0]).sigmoid()
    probs = probs * crop_masks(anchors, (32, 32))
    expected = torch.nn.functional.interpolate(probs[None], (50, 70), mode="bilinear", align_corners=False)[0] > 0.5
    assert torch.equal(found.masks, expected)


def test_the_mask_iou_multiplies_and_sorts():
    outputs, anchors = outputs_of([[0.0, 0.0, 0.3, 0.3], [0.5, 0.5, 0.9, 0.9]], [0, 1])

    def head(masks):
        # The first mask is bad, the second one better than possible.
        assert masks.shape == (2, 32, 32) and masks.amax() <= 1
        return torch.tensor([[0.2, 0.9, 0.9], [0.9, 1.5, 0.9]])

    options = OPTIONS._replace(second_threshold=True)
    plain = detect(outputs, 0, anchors, options, side=64, output_size=(64, 64))
    found = detect(outputs, 0, anchors, options, side=64, output_size=(64, 64), mask_iou_head=head)
    assert plain.classes.tolist() == [0, 1] and found.classes.tolist() == [1, 0]
    assert found.scores.tolist() == pytest.approx([plain.scores[1].item(), 0.2 * plain.scores[0].item()])
    assert torch.equal(found.masks[0], plain.masks[1]) and torch.equal(found.boxes[1], plain.boxes[0])
    cut = detect(outputs, 0, anchors, options, side=64, output_size=(64, 64), mask_iou_head=head, score_threshold=0.5)
    assert cut.classes.tolist() == [1]


def test_nothing_above_the_threshold():
    outputs, anchors = outputs_of([[0.0, 0.0, 0.3, 0.3]], [0])
    outputs["class_logits"] = torch.zeros(1, 1, 100)
    for nms in ("fast", "cross_class", "greedy"):
        for mask_format in ("bitmask", "rle"):
            found = detect(
                outputs, 0, anchors, OPTIONS._replace(nms_type=nms), side=64, output_size=(20, 30),
                mask_format=mask_format, mask_iou_head=lambda masks: 1 / 0,
            )  # fmt: skip
            assert found.boxes.shape == (0, 4) and len(found.masks) == len(found.scores) == 0


def test_an_empty_mask_is_dropped():
    outputs, anchors = outputs_of([[0.0, 0.0, 0.3, 0.3], [0.5, 0.5, 0.9, 0.9]], [0, 1])
    outputs["coefficients"][0, 0] = -1.0
    found = detect(outputs, 0, anchors, OPTIONS._replace(second_threshold=True), side=64, output_size=(64, 64))
    assert found.classes.tolist() == [1] and found.boxes.tolist()[0] == pytest.approx([32, 32, 57.6, 57.6])


def test_a_huge_box_stays_finite():
    outputs, anchors = outputs_of([[0.4, 0.4, 0.6, 0.6]], [0])
    outputs["box_deltas"][0, 0, 2:] = 1e4
    found = detect(outputs, 0, anchors, OPTIONS._replace(second_threshold=True), side=64, output_size=(10, 10))
    assert found.boxes.tolist() == [[0, 0, 10, 10]] and found.masks.all()
    assert math.isfinite(found.scores.item())

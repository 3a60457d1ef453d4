"""The matching of objects and anchors: worked by hand, and against a search over the whole matrix."""

import pytest
import torch
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, pairwise_ioa, pairwise_iou

from sparseinst.modeling.yolact import matcher
from sparseinst.modeling.yolact.matcher import NEUTRAL, MatcherOptions, forced_matches, match

NO_CROWD = torch.zeros(0, 4)
K = 10


def search(ious):
    """Return the forced matches by searching the whole matrix for each object."""
    ious, matched = ious.clone(), [-1] * len(ious)
    for _ in range(len(ious)):
        gt, anchor = divmod(ious.argmax().item(), ious.shape[1])
        matched[gt] = anchor
        ious[gt], ious[:, anchor] = -1, -1
    return matched


def brute_force(gt_boxes, gt_classes, crowds, anchors, options):
    """Return the labels and the objects by the rules, anchor by anchor."""
    ious = pairwise_iou(Boxes(gt_boxes), Boxes(anchors))
    owner = {anchor: gt for gt, anchor in enumerate(search(ious))}
    labels, objects = [], []
    for index, anchor in enumerate(anchors):
        best, gt = ious[:, index].max(0)
        gt = owner.get(index, gt.item())
        if index in owner or best >= options.iou_thresholds[1]:
            labels.append(gt_classes[gt].item())
        elif best >= options.iou_thresholds[0]:
            labels.append(NEUTRAL)
        else:
            covered = pairwise_ioa(Boxes(crowds), Boxes(anchor[None])).flatten().tolist()
            labels.append(NEUTRAL if any(share > options.crowd_ioa for share in covered) else K)
        objects.append(gt)
    return labels, objects


def random_boxes(count, generator, largest=0.4):
    corner = torch.rand(count, 2, generator=generator) * 0.6
    return torch.cat([corner, corner + 0.05 + largest * torch.rand(count, 2, generator=generator)], dim=1)


def test_every_object_gets_an_anchor_of_its_own():
    # Both objects want anchor 0; the second one takes anchor 1, although 0.3 is background.
    ious = torch.tensor([[0.6, 0.55], [0.58, 0.3]])
    assert forced_matches(ious).tolist() == [0, 1]
    # Without overlap at all: still an anchor each.
    assert len(set(forced_matches(torch.zeros(3, 5)).tolist())) == 3


def test_the_class_of_two_rivals(monkeypatch):
    ious = torch.tensor([[0.6, 0.55], [0.58, 0.3]])
    monkeypatch.setattr(matcher, "pairwise_iou", lambda *_: ious)
    boxes = torch.rand(2, 4)
    labels, gt_idx = match(boxes, torch.tensor([3, 8]), NO_CROWD, boxes, K, MatcherOptions())
    assert labels.tolist() == [3, 8] and gt_idx.tolist() == [0, 1]
    # Detectron2's rule leaves the second object without an anchor.
    stock_idx, stock_labels = Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True)(ious)
    assert stock_idx.tolist() == [0, 0] and stock_labels.tolist() == [1, 1]


@pytest.mark.parametrize("seed", range(8))
def test_equals_brute_force(seed):
    generator = torch.Generator().manual_seed(seed)
    gt_boxes, anchors = random_boxes(6, generator), random_boxes(80, generator)
    # Two objects of the same box want the same anchors.
    gt_boxes[1] = gt_boxes[0] + 0.001
    classes = torch.randint(K, (6,), generator=generator)
    crowds = random_boxes(seed % 3, generator, 0.9)
    options = MatcherOptions()
    labels, gt_idx = match(gt_boxes, classes, crowds, anchors, K, options)
    expected_labels, expected_idx = brute_force(gt_boxes, classes, crowds, anchors, options)
    assert labels.tolist() == expected_labels
    positive = (labels >= 0) & (labels < K)
    assert gt_idx[positive].tolist() == torch.tensor(expected_idx)[positive].tolist()
    assert set(gt_idx[positive].tolist()) == set(range(6))


def test_thresholds():
    # IoU 0.5, 0.45, 0.4, 0.39 with one object; another object takes its own anchor.
    anchors = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 0.5], [0, 0, 1, 0.45], [0, 0, 1, 0.4], [0, 0, 1, 0.39]])
    labels, _ = match(anchors[:1], torch.tensor([7]), NO_CROWD, anchors, K, MatcherOptions())
    assert labels.tolist() == [7, 7, NEUTRAL, NEUTRAL, K]


def test_crowds_make_background_neutral_and_nothing_else():
    anchors = torch.tensor([[0.0, 0, 0.2, 0.2], [0.5, 0.5, 0.7, 0.7], [0.5, 0.5, 0.9, 0.9], [0.9, 0.9, 1, 1]])
    crowd = torch.tensor([[0.45, 0.45, 0.75, 0.75], [0.0, 0, 0.3, 0.3]])
    labels, _ = match(anchors[:1], torch.tensor([2]), crowd, anchors, K, MatcherOptions())
    # Anchor 0 is positive; 1 is inside of a crowd; a crowd covers 0.39 of anchor 2.
    assert labels.tolist() == [2, NEUTRAL, K, K]


@pytest.mark.parametrize("num_crowds", [0, 1])
def test_without_objects(num_crowds):
    anchors = torch.tensor([[0.0, 0, 0.2, 0.2], [0.8, 0.8, 1, 1]])
    crowds = torch.tensor([[0.0, 0, 0.5, 0.5]])[:num_crowds]
    labels, _ = match(NO_CROWD, torch.zeros(0, dtype=torch.int64), crowds, anchors, K, MatcherOptions())
    assert labels.tolist() == [NEUTRAL if num_crowds else K, K]


def test_inputs_stay_unchanged():
    ious = torch.rand(4, 9, generator=torch.Generator().manual_seed(0))
    before = ious.clone()
    assert forced_matches(ious).tolist() == search(before)
    assert torch.equal(ious, before)

"""Scores and losses against numbers worked by hand."""

import math

import pytest
import torch
from fvcore.nn import sigmoid_focal_loss

from sparseinst.ops.losses import binary_mask_iou, box_loss, dice_loss, mask_bce_loss, pairwise_dice_score

# 4x4 masks. The prediction has probability 0.5 on its 8 left pixels and (nearly) 0 elsewhere.
LEFT_HALF = torch.tensor([[1.0, 1.0, 0.0, 0.0]]).expand(4, 4)
TOP_HALF = LEFT_HALF.T
HALF_LOGITS = torch.where(LEFT_HALF > 0, 0.0, -40.0)


def test_pairwise_dice_score_by_hand():
    # sum(m t) = 8 * 0.5 = 4; sum(m^2) = 8 * 0.25 = 2; sum(t^2) = 8. DICE = 2 * 4 / (2 + 8 + 1e-4).
    # With the top half the overlap is 4 pixels: sum(m t) = 2, DICE = 4 / 10.0001.
    scores = pairwise_dice_score(
        HALF_LOGITS.sigmoid().flatten()[None], torch.stack([LEFT_HALF.flatten(), TOP_HALF.flatten()])
    )
    assert scores.shape == (1, 2)
    torch.testing.assert_close(scores, torch.tensor([[8 / 10.0001, 4 / 10.0001]]))


def test_nan_boxes_have_a_nan_loss():
    # An error would end the training before its check of the losses.
    boxes = torch.tensor([[math.nan, 0.0, 1.0, 1.0]])
    assert box_loss(boxes, torch.tensor([[0.0, 0.0, 1.0, 1.0]])).isnan()


def test_dice_of_empty_masks_is_zero():
    assert pairwise_dice_score(torch.zeros(1, 16), torch.zeros(1, 16)).item() == 0


def test_dice_loss_by_hand():
    # As above: 1 - 8 / 10.0001; the fractional target 0.5 on the left half: sum(m t) = 2, sums of squares 2 and 2.
    logits = torch.stack([HALF_LOGITS, HALF_LOGITS])
    targets = torch.stack([LEFT_HALF, LEFT_HALF / 2])
    torch.testing.assert_close(dice_loss(logits.sigmoid(), targets), torch.tensor([1 - 8 / 10.0001, 1 - 4 / 4.0001]))


def test_mask_bce_by_hand():
    # 8 pixels at probability 0.5 cost log 2 each whatever the target, the other 8 nothing: mean = log(2) / 2.
    # Against the top half: 8 left pixels log 2 each, and the 4 upper right pixels cost 40 each.
    expected = [math.log(2) / 2, (8 * math.log(2) + 4 * 40) / 16]
    for masks, value in zip((LEFT_HALF, TOP_HALF), expected):
        assert mask_bce_loss(HALF_LOGITS[None], masks[None]).item() == pytest.approx(value, rel=1e-6)
    both = mask_bce_loss(torch.stack([HALF_LOGITS, HALF_LOGITS]), torch.stack([LEFT_HALF, TOP_HALF]))
    assert both.item() == pytest.approx(sum(expected), rel=1e-6)


def test_binary_mask_iou_by_hand():
    # Left half against top half: 4 of 12 pixels. Against itself: 8 of 8.
    logits = torch.stack([HALF_LOGITS, HALF_LOGITS])
    iou = binary_mask_iou(logits.sigmoid(), torch.stack([TOP_HALF, LEFT_HALF]))
    torch.testing.assert_close(iou, torch.tensor([4 / (12 + 1e-6), 8 / (8 + 1e-6)]))


def test_binary_mask_iou_thresholds():
    # Predicted where p >= 0.4: logits of 0.39 are not, 0.41 are. The target counts above 0.5, so 0.5 does not.
    logits = torch.tensor([0.41, 0.41, 0.39, 0.39]).logit().view(1, 2, 2)
    targets = torch.tensor([1.0, 0.5, 1.0, 0.0]).view(1, 2, 2)
    # Predicted {0, 1}, target {0, 2}: 1 of 3.
    torch.testing.assert_close(binary_mask_iou(logits.sigmoid(), targets), torch.tensor([1 / 3]), rtol=1e-5, atol=0)


def test_binary_mask_iou_of_empty_masks_is_zero_and_has_no_gradient():
    logits = torch.full((1, 4, 4), -9.0, requires_grad=True)
    iou = binary_mask_iou(logits.sigmoid(), torch.zeros(1, 4, 4))
    assert iou.item() == 0
    assert not iou.requires_grad


@pytest.mark.parametrize("logit", [1e4, -1e4])
def test_saturated_logits_are_finite(logit):
    logits = torch.full((1, 1, 1), logit, requires_grad=True)
    for target in (torch.zeros(1, 1, 1), torch.ones(1, 1, 1)):
        total = (
            dice_loss(logits.sigmoid(), target).sum()
            + mask_bce_loss(logits, target).sum()
            + sigmoid_focal_loss(logits, target, 0.25, 2.0, "sum")
        )
        (gradient,) = torch.autograd.grad(total, logits)
        assert torch.isfinite(total) and torch.isfinite(gradient).all()

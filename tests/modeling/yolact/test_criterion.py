"""The losses of YOLACT, worked by hand on six anchors and one object."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparseinst.modeling.yolact.criterion import YOLACTCriterion, count_targets
from sparseinst.modeling.yolact.matcher import MatcherOptions, match
from sparseinst.modeling.yolact.targets import AnchorTargets

K = 80
BOX = torch.tensor([[0.25, 0.25, 0.75, 0.75]])


def corners(cx, cy, w, h):
    return [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]


# IoU with the box: 1, 0, 0, 0, 0, 0.72.
ANCHORS = torch.tensor(
    [corners(0.5, 0.5, 0.5, 0.5), *(corners(x, y, 0.1, 0.1) for x in (0.1, 0.9) for y in (0.1, 0.9)),
     corners(0.5, 0.5, 0.36, 0.5)]
)  # fmt: skip


def targets_of(size, boxes=BOX, classes=(5,), anchors=ANCHORS):
    labels, gt_idx = match(
        boxes, torch.tensor(classes, dtype=torch.int64), torch.zeros(0, 4), anchors, K, MatcherOptions()
    )
    masks = torch.zeros(len(boxes), size, size, dtype=torch.bool)
    for mask, box in zip(masks, (boxes * size).round().int().tolist()):
        mask[box[1] : box[3], box[0] : box[2]] = True
    return AnchorTargets(labels, gt_idx, boxes, masks, K, torch.zeros(K, 4, 4, dtype=torch.bool))


def zero_outputs(size, num_images=1, num_anchors=6):
    outputs = {
        "class_logits": torch.zeros(num_images, num_anchors, K + 1),
        "box_deltas": torch.zeros(num_images, num_anchors, 4),
        "coefficients": torch.zeros(num_images, num_anchors, 2),
        "prototypes": torch.ones(num_images, 2, size, size),
        "sem_seg_logits": torch.zeros(num_images, K, 4, 4),
    }
    return {name: value.requires_grad_() for name, value in outputs.items()}


class ConstantHead(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, masks):
        return torch.full((len(masks), K), self.value) + 0 * masks.sum()


def test_all_zeros():
    target = targets_of(16)
    assert target.is_positive.tolist() == [True, False, False, False, False, True]
    losses = YOLACTCriterion()(zero_outputs(16), [target], ANCHORS, None, ConstantHead(0.5))
    # Two positives and four backgrounds (six are wanted) with 1 / 81 each, over two positives.
    assert losses["loss_cls"].item() == pytest.approx(6 * math.log(81) / 2, rel=1e-5)
    # The narrow anchor: log(0.5 / 0.36) / 0.2 = 1.64, whose smooth L1 is 1.14.
    assert losses["loss_box"].item() == pytest.approx(1.5 * (math.log(0.5 / 0.36) / 0.2 - 0.5) / 2, rel=1e-4)
    assert losses["loss_box"].item() == pytest.approx(0.85689, rel=1e-4)
    assert losses["loss_sem_seg"].item() == pytest.approx(80 * math.log(2), rel=1e-5)
    # A box of 8 x 8 cells, cropped with a margin of one cell: 10 x 10 pixels of log 2 over 64.
    assert losses["loss_mask"].item() == pytest.approx(6.125 * 100 * math.log(2) / 64, rel=1e-4)
    # The IoU to learn is 0, because 0.5 is not above 0.5.
    assert losses["loss_mask_iou"].item() == pytest.approx(25 * 0.125, rel=1e-5)


def test_a_coarse_grid():
    losses = YOLACTCriterion()(zero_outputs(4), [targets_of(4)], ANCHORS, None, ConstantHead(0.5))
    # The margin reaches every one of 4 x 4 cells; the divisor is 2 x 2.
    assert losses["loss_mask"].item() == pytest.approx(6.125 * 16 * math.log(2) / 4, rel=1e-4)
    # The object has four cells, not more than 25.
    assert losses["loss_mask_iou"].item() == 0


def test_enough_backgrounds():
    anchors = torch.cat([ANCHORS, ANCHORS[1:5] * 0.5])
    losses = YOLACTCriterion()(zero_outputs(4, 1, 10), [targets_of(4, anchors=anchors)], anchors)
    # Two positives and six of eight backgrounds.
    assert losses["loss_cls"].item() == pytest.approx(4 * math.log(81), rel=1e-5)


def test_the_backgrounds_with_the_largest_loss():
    outputs = zero_outputs(4)
    criterion = YOLACTCriterion(neg_pos_ratio=0.5)
    with torch.no_grad():
        outputs["class_logits"][0, 3, 11] = 4.0
        # One row is far above the others, which must not turn theirs into minus infinity.
        outputs["class_logits"][0, 0] += 300
    loss = criterion(outputs, [targets_of(4)], ANCHORS)["loss_cls"]
    hard = math.log(80 + math.exp(4))
    assert loss.item() == pytest.approx((2 * math.log(81) + hard) / 2, rel=1e-4)
    loss.backward()
    assert outputs["class_logits"].grad[0].abs().sum(1).nonzero().flatten().tolist() == [0, 3, 5]


def test_neutral_anchors_are_never_used():
    # IoU 0.45 with the box.
    anchors = torch.cat([ANCHORS, torch.tensor([corners(0.5, 0.5, 0.225, 0.5)])])
    target = targets_of(4, anchors=anchors)
    assert target.labels[6] == -1
    outputs = zero_outputs(4, 1, 7)
    with torch.no_grad():
        outputs["class_logits"][0, 6, 0] = 9.0
    YOLACTCriterion()(outputs, [target], anchors)["loss_cls"].backward()
    assert not outputs["class_logits"].grad[0, 6].any()


def test_pixels_outside_of_the_crop_do_not_count_and_wrong_ones_have_a_gradient():
    target = targets_of(16)
    target.gt_masks[:, 0, 0] = True
    outputs = zero_outputs(16)
    with torch.no_grad():
        outputs["coefficients"][..., 0] = -40.0
    loss = YOLACTCriterion()(outputs, [target], ANCHORS)["loss_mask"]
    # 64 pixels of the object are wholly wrong, by 40 each; those of the margin are right.
    assert loss.item() == pytest.approx(6.125 * 64 * 40 / 64, rel=1e-4)
    loss.backward()
    assert outputs["coefficients"].grad[0, 0, 0].item() == pytest.approx(-6.125 / 2, rel=1e-3)


def test_few_masks_stand_for_all(monkeypatch):
    outputs = zero_outputs(16)
    with torch.no_grad():
        outputs["coefficients"][0, 0, 0] = 1.0
    each = [
        6.125 * ((64 * F.softplus(torch.tensor(sign * value)) + 36 * F.softplus(torch.tensor(value))) / 64).item()
        for sign, value in ((-1, 1.0), (-1, 0.0))
    ]
    whole = YOLACTCriterion()(outputs, [targets_of(16)], ANCHORS)["loss_mask"].item()
    assert whole == pytest.approx(sum(each) / 2, rel=1e-4)
    for chosen in (0, 1):
        monkeypatch.setattr(torch, "randperm", lambda count, device, first=chosen: torch.tensor([first, 1 - first]))
        loss = YOLACTCriterion(max_train_masks=1)(outputs, [targets_of(16)], ANCHORS)["loss_mask"].item()
        # One of two masks, times two, over two positives.
        assert loss == pytest.approx(each[chosen], rel=1e-4)


def test_the_gradient_of_the_mask_iou_reaches_the_masks():
    class Mean(nn.Module):
        def forward(self, masks):
            return masks.mean((1, 2))[:, None].expand(-1, K)

    outputs = zero_outputs(16)
    YOLACTCriterion()(outputs, [targets_of(16)], ANCHORS, None, Mean())["loss_mask_iou"].backward()
    assert outputs["coefficients"].grad[0, [0, 5]].abs().min() > 0


def test_an_image_without_objects():
    empty = targets_of(4, torch.zeros(0, 4), ())
    outputs = zero_outputs(4)
    losses = YOLACTCriterion()(outputs, [empty], ANCHORS, None, ConstantHead(0.5))
    # Three backgrounds, over 1.
    assert losses["loss_cls"].item() == pytest.approx(3 * math.log(81), rel=1e-5)
    assert losses["loss_box"].item() == losses["loss_mask"].item() == losses["loss_mask_iou"].item() == 0
    # Beside an image with objects its backgrounds are divided by that image's positives.
    both = YOLACTCriterion()(zero_outputs(4, 2), [targets_of(4), empty], ANCHORS)
    assert both["loss_cls"].item() == pytest.approx(9 * math.log(81) / 2, rel=1e-5)


def test_parts_of_a_step_add_up():
    generator = torch.Generator().manual_seed(0)
    targets = [targets_of(16), targets_of(16, torch.tensor([[0.1, 0.1, 0.5, 0.6]]), (9,))]
    outputs = {name: torch.randn(value.shape, generator=generator) for name, value in zero_outputs(16, 2).items()}
    criterion = YOLACTCriterion()
    whole = criterion(outputs, targets, ANCHORS)
    counts = count_targets(targets)
    parts = [
        criterion({name: value[index : index + 1] for name, value in outputs.items()}, targets[index : index + 1],
                  ANCHORS, counts)
        for index in range(2)
    ]  # fmt: skip
    for name, loss in whole.items():
        assert sum(part[name] for part in parts).item() == pytest.approx(loss.item(), rel=1e-5), name


def test_float16_outputs_are_summed_in_float32():
    outputs = {name: value.detach().half() for name, value in zero_outputs(16).items()}
    with torch.autocast("cpu", torch.bfloat16):
        losses = YOLACTCriterion()(outputs, [targets_of(16)], ANCHORS)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert losses["loss_cls"].item() == pytest.approx(6 * math.log(81) / 2, rel=1e-5)

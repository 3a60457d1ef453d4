"""The auxiliary loss of semantic segmentation: worked by hand, and in SparseInst, SOLO and SOLOv2."""

import math

import pytest
import torch
from detectron2.modeling import build_model

from sparseinst.modeling.auxiliary import SemSegHead
from sparseinst.ops.losses import sem_seg_loss, semantic_masks
from tests.modeling.solo.tiny_solo import tiny_solo
from tests.tiny_model import random_input, tiny_cfg, tiny_model

WEIGHT = {
    "sparse_inst": "MODEL.SPARSE_INST.LOSS.SEM_SEG_WEIGHT",
    "solo": "MODEL.SOLO.LOSS.SEM_SEG_WEIGHT",
    "solov2": "MODEL.SOLOV2.LOSS.SEM_SEG_WEIGHT",
}


def build(family, *opts):
    return tiny_model(*opts) if family == "sparse_inst" else tiny_solo(family, *opts)


def test_union_of_each_class():
    masks = torch.zeros(3, 2, 3, dtype=torch.bool)
    masks[0, 0, 0] = masks[1, 0, :2] = masks[2, 1, 2] = True
    union = semantic_masks(masks, torch.tensor([1, 1, 0]), 3)
    assert union.int().tolist() == [[[0, 0, 0], [0, 0, 1]], [[1, 1, 0], [0, 0, 0]], [[0] * 3] * 2]
    assert not semantic_masks(masks[:0], torch.zeros(0, dtype=torch.int64), 3).any()


def test_mean_over_pixels_sum_over_classes_and_images():
    logits = torch.zeros(2, 5, 3, 4)
    target = torch.zeros(2, 5, 3, 4, dtype=torch.bool)
    assert sem_seg_loss(logits, target).item() == pytest.approx(10 * math.log(2))
    # One pixel of 12 that is wrong by 3: log(1 + e^3).
    logits[0, 0, 0, 0] = 3.0
    expected = 10 * math.log(2) + (math.log1p(math.exp(3)) - math.log(2)) / 12
    assert sem_seg_loss(logits, target).item() == pytest.approx(expected, rel=1e-6)


def test_targets_on_the_heads_grid():
    head = SemSegHead(2, 2)
    # A cell belongs to the object where more than half of it does.
    masks = torch.zeros(1, 4, 4)
    masks[0, :2, :2], masks[0, 2:, :2] = 0.75, 0.5
    logits = torch.zeros(1, 2, 2, 2)
    logits[0, 1, 0, 0], logits[0, 1, 1, 0] = 9.0, -9.0
    loss = head.loss(logits, [(masks, torch.tensor([1]))], None)
    assert loss.item() == pytest.approx((6 * math.log(2) + 2 * math.log1p(math.exp(-9))) / 4, rel=1e-5)
    halved = head.loss(logits, [(masks, torch.tensor([1]))], {"num_images": torch.tensor(2)})
    assert halved.item() == pytest.approx(loss.item() / 2)


@pytest.mark.parametrize("family", WEIGHT)
def test_off_by_default_and_in_training_only(family):
    plain, model = build(family), build(family, WEIGHT[family], 1.0)
    assert plain.sem_seg_head is None and "loss_sem_seg" not in plain.train()([random_input(64, 96, 2)])
    more = model.state_dict().keys() - plain.state_dict().keys()
    assert more == {"sem_seg_head.predictor.weight", "sem_seg_head.predictor.bias"}
    with torch.no_grad():
        assert "sem_seg_logits" not in model.network(torch.randn(1, 3, 64, 96))


@pytest.mark.parametrize("family", WEIGHT)
def test_its_gradient_reaches_the_backbone(family):
    model = build(family, WEIGHT[family], 2.0).train()
    inputs = [random_input(64, 96, 2), random_input(64, 96, 0, seed=1)]
    loss = model(inputs)["loss_sem_seg"]
    loss.backward()
    assert model.sem_seg_head.predictor.weight.grad.any()
    assert any(value.grad is not None and value.grad.any() for value in model.backbone.parameters())
    # The mean over images, weighted.
    model.sem_seg_head.predictor.weight.data.zero_()
    num_classes = model.sem_seg_head.predictor.out_channels
    assert model(inputs)["loss_sem_seg"].item() == pytest.approx(2.0 * num_classes * math.log(2), rel=1e-5)


@pytest.mark.parametrize("family", WEIGHT)
def test_parts_of_a_step_add_up(family):
    frozen = ("MODEL.RESNETS.NORM", "FrozenBN")
    model = build(family, WEIGHT[family], 1.0, *frozen).train()
    inputs = [random_input(64, 96, 2), random_input(64, 96, 1, seed=1)]
    parts = model.prepare_parts([inputs[:1], inputs[1:]])
    found = sum(model([x], part)["loss_sem_seg"].item() for x, part in zip(inputs, parts))
    assert found == pytest.approx(model(inputs)["loss_sem_seg"].item(), rel=1e-4)


def test_a_decoder_that_is_trained_at_centers_has_it_too():
    placed = ("MODEL.SPARSE_INST.DECODER.NAME", "PlacedIAMDecoder", "MODEL.SPARSE_INST.LOSS.NAME", "PlacedCriterion")
    model = build_model(tiny_cfg(*placed, WEIGHT["sparse_inst"], 1.0)).train()
    losses = model([random_input(64, 96, 2)])
    assert losses.keys() >= {"loss_heatmap", "loss_sem_seg"}
    losses["loss_sem_seg"].backward()
    assert model.sem_seg_head.predictor.weight.grad.abs().sum() > 0

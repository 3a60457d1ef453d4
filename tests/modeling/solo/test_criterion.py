"""Losses: worked by hand, with nothing to learn, over parts and under autocast."""

import pytest
import torch

from sparseinst.modeling.solo.criterion import SOLOCriterion, dice_losses
from sparseinst.modeling.solo.targets import GridTargets, LevelTargets
from tests.modeling.solo.tiny_solo import NUM_CLASSES, VARIANTS, tiny_solo
from tests.tiny_model import random_input


def test_dice():
    probs, masks = torch.tensor([[[0.5, 0.5, 1, 0]]]), torch.tensor([[[True, False, True, False]]])
    index = torch.tensor([0])
    assert dice_losses(probs, masks, index, index).item() == pytest.approx(0.14335, abs=1e-5)
    nothing = torch.zeros(1, 1, 4)
    assert dice_losses(nothing, nothing.bool(), index, index).item() == 1


class OneMask:
    mask_strides = (4, 4)


def test_focal_loss_over_all_cells():
    logits = torch.tensor([[[0.0, 1.0], [-2.0, 0.5]]])
    none = torch.zeros(0, dtype=torch.int64)
    levels = [LevelTargets(torch.tensor([category]), none, none, 0) for category in (-1, 1)]
    losses = SOLOCriterion()(OneMask(), {"cate_logits": logits}, [GridTargets(levels, {}, none)])
    assert losses["loss_cate"].item() == pytest.approx(0.3373, abs=1e-4) and losses["loss_mask"] == 0


@pytest.mark.parametrize(
    ("cell", "category", "logit", "term"),
    [(0, 0, 0.0, 0.1300), (0, 1, -2.0, 0.0014), (1, 0, 1.0, 0.5264), (1, 1, 0.5, 0.0169)],
)
def test_terms_of_the_focal_loss(cell, category, logit, term):
    # The other logits are certain and right, so that their terms are 0. Only (cell 1, class 1) is positive.
    logits = torch.tensor([[[-50.0, -50.0], [-50.0, 50.0]]])
    logits[0, category, cell] = logit
    none = torch.zeros(0, dtype=torch.int64)
    levels = [LevelTargets(torch.tensor([target]), none, none, 0) for target in (-1, 1)]
    losses = SOLOCriterion()(OneMask(), {"cate_logits": logits}, [GridTargets(levels, {}, none)])
    # The divisor is one positive cell plus 1.
    assert 2 * losses["loss_cate"].item() == pytest.approx(term, abs=5e-5)


def batch_of(*numbers):
    return [random_input(64, 96, num_instances=number, seed=index) for index, number in enumerate(numbers)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("numbers", [(3, 2), (0, 2), (0, 0)])
def test_every_parameter_gets_a_gradient(variant, numbers):
    model = tiny_solo(variant).train()
    losses = model(batch_of(*numbers))
    assert losses.keys() == {"loss_cate", "loss_mask"}
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert (losses["loss_mask"] > 0) == (sum(numbers) > 0)


def test_objects_outside_every_range():
    model = tiny_solo("solov2", "MODEL.SOLOV2.SCALE_RANGES", [[500, 600]] * 5).train()
    losses = model(batch_of(3, 2))
    assert losses["loss_mask"] == 0 and losses["loss_cate"] > 0


@pytest.mark.parametrize("variant", ["solo", "decoupled", "solov2"])
def test_parts_sum_up_to_one_batch(variant):
    model = tiny_solo(variant).train()
    # Batch statistics differ between the parts and the whole.
    model.backbone.eval()
    batch = batch_of(3, 0, 2)
    expected = model(batch)
    parts = [batch[:1], batch[1:]]
    found = [model(inputs, part) for inputs, part in zip(parts, model.prepare_parts(parts))]
    for name, loss in expected.items():
        # The divisor of loss_cate is the number of positive cells plus 1 in the whole step.
        assert sum(losses[name] for losses in found).item() == pytest.approx(loss.item(), rel=1e-4), name


@pytest.mark.parametrize("variant", ["solo", "decoupled", "solov2"])
def test_losses_are_computed_in_float32(variant):
    model = tiny_solo(variant).train()
    batch = batch_of(3, 2)
    part = model.prepare_parts([batch])[0]
    outputs = model.network(part.images.tensor)
    expected = model.losses(outputs, part.targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.losses(outputs, part.targets)
    assert all(torch.equal(found[name], loss) and loss.dtype == torch.float32 for name, loss in expected.items())


def test_class_0_is_a_class():
    model = tiny_solo("decoupled").train()
    batch = batch_of(2)
    batch[0]["instances"].gt_classes[:] = 0
    targets = model.prepare_targets(batch, model.preprocess(batch))
    assert model.loss_counts(targets)["num_positive"] == sum(len(level.cells) for level in targets[0].levels) > 0
    assert NUM_CLASSES > 1

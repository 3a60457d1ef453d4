"""Matcher and criterion against the plain way: every prediction of a batch against every instance of it, in copies."""

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from sparseinst.modeling.sparse_inst.criterion import SparseInstCriterion, matched_predictions
from sparseinst.modeling.sparse_inst.matcher import MatchedPairs, SparseInstMatcher
from sparseinst.structures.targets import InstanceTargets

NUM_MASKS, NUM_CLASSES, SIZE = 9, 5, (14, 10)


def make_problem(counts, seed=0, dtype=torch.float32, memory_format=torch.contiguous_format):
    generator = torch.Generator().manual_seed(seed)
    batch = len(counts)
    outputs = {
        "pred_logits": torch.randn(batch, NUM_MASKS, NUM_CLASSES, generator=generator) * 2,
        "pred_masks": torch.randn(batch, NUM_MASKS, *SIZE, generator=generator) * 3,
        "pred_scores": torch.randn(batch, NUM_MASKS, 1, generator=generator) * 2,
    }
    outputs["pred_masks"] = outputs["pred_masks"].contiguous(memory_format=memory_format)
    targets = [
        InstanceTargets(
            torch.randint(NUM_CLASSES, (count,), generator=generator),
            torch.randint(5, (count, *SIZE), generator=generator) / 4,
        )
        for count in counts
    ]
    return {name: value.to(dtype).requires_grad_() for name, value in outputs.items()}, targets


def plain_pairs(outputs, targets):
    """As published: p^0.2 * DICE^0.8; an image's block of the batch's table."""
    gt_masks = torch.cat([target.gt_masks for target in targets]).flatten(1)
    gt_classes = torch.cat([target.gt_classes for target in targets])
    probs = outputs["pred_masks"].flatten(0, 1).flatten(1).sigmoid()
    dice = 2 * probs @ gt_masks.T / ((probs**2).sum(1)[:, None] + (gt_masks**2).sum(1) + 1e-4)
    scores = outputs["pred_logits"].flatten(0, 1).sigmoid()[:, gt_classes] ** 0.2 * dice**0.8
    counts = [len(target.gt_classes) for target in targets]
    blocks = scores.unflatten(0, (-1, NUM_MASKS)).split(counts, dim=2)
    chosen = [linear_sum_assignment(block[image].numpy(), maximize=True) for image, block in enumerate(blocks)]
    return [MatchedPairs(torch.as_tensor(rows), torch.as_tensor(columns)) for rows, columns in chosen]


def plain_losses(outputs, targets):
    outputs = {name: value.float() for name, value in outputs.items()}
    pairs = plain_pairs({name: value.detach() for name, value in outputs.items()}, targets)
    chosen = [(image, pair.prediction_idx) for image, pair in enumerate(pairs)]
    gt_masks = torch.cat([target.gt_masks[pair.gt_idx] for target, pair in zip(targets, pairs)])
    masks = torch.cat([outputs["pred_masks"][image][idx] for image, idx in chosen])
    objectness = torch.cat([outputs["pred_scores"][image][idx, 0] for image, idx in chosen])
    num_instances, num_pairs = max(1, sum(len(target.gt_classes) for target in targets)), max(1, len(masks))

    labels = torch.zeros_like(outputs["pred_logits"])
    for (image, idx), target, pair in zip(chosen, targets, pairs):
        labels[image, idx, target.gt_classes[pair.gt_idx]] = 1
    probs = outputs["pred_logits"].sigmoid()
    focal = F.binary_cross_entropy_with_logits(outputs["pred_logits"], labels, reduction="none")
    focal = focal * torch.where(labels == 1, 0.25 * (1 - probs) ** 2, 0.75 * probs**2)

    probs = masks.sigmoid().flatten(1)
    truth = gt_masks.flatten(1)
    dice = 1 - 2 * (probs * truth).sum(1) / ((probs**2).sum(1) + (truth**2).sum(1) + 1e-4)
    predicted, covered = probs >= 0.4, truth > 0.5
    iou = (predicted & covered).sum(1) / ((predicted | covered).sum(1) + 1e-6)
    bce = F.binary_cross_entropy_with_logits(masks, gt_masks, reduction="none").flatten(1).mean(1)
    objectness_loss = F.binary_cross_entropy_with_logits(objectness, iou.detach(), reduction="none")
    return {
        "loss_ce": 2 * focal.sum() / num_instances,
        "loss_objectness": objectness_loss.sum() / num_pairs,
        "loss_dice": 2 * dice.sum() / num_instances,
        "loss_mask": 5 * bce.sum() / num_pairs,
    }


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("counts", [(0, 0), (1,), (0, 3, 1), (30, 2), (9, 7, 12)], ids=str)
def test_losses_and_gradients_are_those_of_the_plain_way(counts, dtype, memory_format):
    criterion = SparseInstCriterion(matcher=SparseInstMatcher())
    for seed in range(4):
        outputs, targets = make_problem(counts, seed, dtype, memory_format)
        expected, losses = plain_losses(outputs, targets), criterion(outputs, targets)
        assert set(losses) == set(expected)
        for name, loss in losses.items():
            torch.testing.assert_close(loss, expected[name], rtol=1e-6, atol=1e-6, msg=name)
        gradients, expected = (
            torch.autograd.grad(sum(part.values()), [*outputs.values()]) for part in (losses, expected)
        )
        for name, gradient, other in zip(outputs, gradients, expected, strict=True):
            # Half precision: the last bit of the largest.
            rounding = max(1e-6, torch.finfo(dtype).eps)
            assert gradient.dtype == dtype and (gradient - other).abs().max() <= rounding * other.abs().max(), name


def test_pairs_are_those_of_the_plain_way():
    for seed in range(10):
        outputs, targets = make_problem((4, 0, 12, 1), seed)
        outputs = {name: value.detach() for name, value in outputs.items()}
        for pair, expected in zip(SparseInstMatcher()(outputs, targets), plain_pairs(outputs, targets)):
            assert all(torch.equal(a, b) for a, b in zip(pair, expected))


def test_matched_predictions_are_each_image_s_own():
    maps = torch.arange(2 * 3 * 2).view(2, 3, 2)
    pairs = [
        MatchedPairs(torch.tensor([0, 2]), torch.tensor([1, 0])),
        MatchedPairs(torch.tensor([1]), torch.tensor([0])),
    ]
    assert matched_predictions(maps, pairs).tolist() == [[0, 1], [4, 5], [8, 9]]


def test_nothing_asks_the_device_for_a_number():
    """Each such question waits for all that the device still has to do. One copy of the scores is made, and no more."""
    outputs, targets = make_problem((4, 0, 12, 1))
    criterion = SparseInstCriterion(matcher=SparseInstMatcher())
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        losses = criterion(outputs, targets)
        sum(losses.values()).backward()
    called = {event.key for event in profiler.key_averages()}
    assert "aten::index_select" in called
    assert not called & {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero"}

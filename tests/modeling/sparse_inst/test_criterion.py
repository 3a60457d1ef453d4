"""The criterion: what is summed, what it is divided by, and batches without instances."""

import pytest
import torch
from fvcore.nn import sigmoid_focal_loss as focal_loss
from torch.nn import functional as F

from sparseinst.modeling.sparse_inst.criterion import SparseInstCriterion
from sparseinst.modeling.sparse_inst.matcher import SparseInstMatcher
from sparseinst.structures.targets import InstanceTargets

LOSSES = {"loss_ce", "loss_objectness", "loss_dice", "loss_mask"}


def make_outputs(batch=2, num_masks=4, num_classes=3, size=(6, 5), seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "pred_logits": (batch, num_masks, num_classes),
        "pred_masks": (batch, num_masks, *size),
        "pred_scores": (batch, num_masks, 1),
    }
    return {name: torch.randn(shape, generator=generator).requires_grad_() for name, shape in shapes.items()}


def make_targets(count, num_classes=3, size=(6, 5), seed=0):
    generator = torch.Generator().manual_seed(100 + seed)
    return InstanceTargets(
        torch.randint(num_classes, (count,), generator=generator), torch.rand(count, *size, generator=generator)
    )


def make_criterion(**kwargs):
    return SparseInstCriterion(matcher=SparseInstMatcher(), **kwargs)


def test_losses_of_one_pair_by_hand():
    # One prediction, one instance of class 0, two classes, a mask of 2 pixels with target (1, 0); all logits 0.
    outputs = {
        "pred_logits": torch.zeros(1, 1, 2),
        "pred_masks": torch.zeros(1, 1, 1, 2),
        "pred_scores": torch.zeros(1, 1, 1),
    }
    targets = [InstanceTargets(torch.tensor([0]), torch.tensor([[[1.0, 0.0]]]))]
    losses = make_criterion()(outputs, targets)
    log2 = torch.tensor(2.0).log().item()
    # Focal: positive 0.25 * 0.25 log 2, negative 0.75 * 0.25 log 2, sum 0.25 log 2; weight 2.
    assert losses["loss_ce"].item() == pytest.approx(2 * 0.25 * log2, rel=1e-5)
    # DICE = 2 * 0.5 / (0.5 + 1 + 1e-4); weight 2.
    assert losses["loss_dice"].item() == pytest.approx(2 * (1 - 1 / 1.5001), rel=1e-5)
    assert losses["loss_mask"].item() == pytest.approx(5 * log2, rel=1e-5)
    # p = 0.5 >= 0.4 on both pixels, IoU = 1/2; BCE of 0.5 against 0.5 is log 2.
    assert losses["loss_objectness"].item() == pytest.approx(log2, rel=1e-5)


def test_weights():
    outputs, targets = make_outputs(), [make_targets(2), make_targets(3, seed=1)]
    plain = make_criterion()(outputs, targets)
    weighted = make_criterion(class_weight=4, mask_pixel_weight=1, mask_dice_weight=6, objectness_weight=0.5)(
        outputs, targets
    )
    ratios = {"loss_ce": 2, "loss_mask": 0.2, "loss_dice": 3, "loss_objectness": 0.5}
    for name, ratio in ratios.items():
        torch.testing.assert_close(weighted[name], plain[name] * ratio)


def test_items():
    outputs, targets = make_outputs(), [make_targets(2), make_targets(1)]
    assert set(make_criterion(items=("labels",))(outputs, targets)) == {"loss_ce"}
    assert set(make_criterion(items=["masks"])(outputs, targets)) == LOSSES - {"loss_ce"}
    with pytest.raises(ValueError, match="LOSS.ITEMS"):
        make_criterion(items=("labels", "points"))


def test_without_instances_only_the_negatives_count_and_all_gets_a_gradient():
    outputs = make_outputs()
    losses = make_criterion()(outputs, [make_targets(0), make_targets(0)])
    assert set(losses) == LOSSES
    negatives = focal_loss(outputs["pred_logits"], torch.zeros_like(outputs["pred_logits"]), 0.25, 2.0, "sum")
    torch.testing.assert_close(losses["loss_ce"], 2 * negatives)
    assert [losses[name].item() for name in sorted(LOSSES - {"loss_ce"})] == [0, 0, 0]
    sum(losses.values()).backward()
    for name, output in outputs.items():
        assert torch.isfinite(output.grad).all(), name
        assert (output.grad != 0).any() == (name == "pred_logits"), name


def test_more_instances_than_masks_leave_the_next_image_its_own_targets():
    # Image 0 has 7 instances for 4 masks. The losses are those of the images apart.
    outputs = make_outputs()
    targets = [make_targets(7), make_targets(2, seed=1)]
    normalizer = {"num_instances": torch.tensor(9), "num_matched": torch.tensor(6)}
    criterion = make_criterion()
    together = criterion(outputs, targets, normalizer)
    apart = [
        criterion({name: output[i : i + 1] for name, output in outputs.items()}, targets[i : i + 1], normalizer)
        for i in range(2)
    ]
    for name in LOSSES:
        torch.testing.assert_close(together[name], apart[0][name] + apart[1][name])


def test_all_instances_are_counted_and_mask_losses_are_means_over_pairs():
    outputs = make_outputs(batch=1)
    targets = [make_targets(7)]
    criterion = make_criterion()
    losses = criterion(outputs, targets)
    expected = criterion(outputs, targets, {"num_instances": torch.tensor(7), "num_matched": torch.tensor(4)})
    for name in LOSSES:
        torch.testing.assert_close(losses[name], expected[name])


def test_mask_loss_is_the_mean_over_all_pixels_of_all_pairs():
    outputs, targets = make_outputs(), [make_targets(3), make_targets(1, seed=1)]
    criterion = make_criterion()
    pairs = criterion.matcher(outputs, targets)
    logits = torch.cat([masks[pair.prediction_idx] for masks, pair in zip(outputs["pred_masks"], pairs)])
    gt_masks = torch.cat([target.gt_masks[pair.gt_idx] for target, pair in zip(targets, pairs)])
    expected = 5 * F.binary_cross_entropy_with_logits(logits, gt_masks)
    torch.testing.assert_close(criterion(outputs, targets)["loss_mask"], expected)


def test_permuting_the_ground_truth_leaves_the_losses():
    outputs, target = make_outputs(batch=1), make_targets(4)
    order = torch.tensor([3, 1, 0, 2])
    criterion = make_criterion()
    plain = criterion(outputs, [target])
    permuted = criterion(outputs, [InstanceTargets(*(field[order] for field in target))])
    for name in LOSSES:
        torch.testing.assert_close(plain[name], permuted[name])


def test_float32_under_autocast():
    outputs, targets = make_outputs(), [make_targets(2), make_targets(3)]
    criterion = make_criterion()
    plain = criterion(outputs, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for name, loss in criterion(outputs, targets).items():
            assert loss.dtype == torch.float32
            assert torch.equal(loss, plain[name]), name


def test_half_precision_outputs_give_float32_losses():
    outputs = {name: output.detach().half() for name, output in make_outputs().items()}
    losses = make_criterion()(outputs, [make_targets(2), make_targets(0)])
    assert all(loss.dtype == torch.float32 and torch.isfinite(loss) for loss in losses.values())


def test_arguments_are_not_changed():
    outputs, targets = make_outputs(), [make_targets(2), make_targets(3)]
    outputs_before = {name: output.detach().clone() for name, output in outputs.items()}
    masks_before = [target.gt_masks.clone() for target in targets]
    make_criterion()(outputs, targets)
    assert all(torch.equal(outputs[name], value) for name, value in outputs_before.items())
    assert all(torch.equal(target.gt_masks, value) for target, value in zip(targets, masks_before))

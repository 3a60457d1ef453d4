"""The matcher by hand, and against brute force."""

import itertools

import pytest
import torch

from sparseinst.modeling.sparse_inst.matcher import SparseInstMatcher, matching_scores
from sparseinst.structures.targets import InstanceTargets


def random_problem(seed, num_masks, num_instances, num_classes=3, size=(5, 4)):
    generator = torch.Generator().manual_seed(seed)
    outputs = {
        "pred_logits": torch.randn(1, num_masks, num_classes, generator=generator),
        "pred_masks": torch.randn(1, num_masks, *size, generator=generator) * 3,
    }
    targets = InstanceTargets(
        torch.randint(num_classes, (num_instances,), generator=generator),
        torch.rand(num_instances, *size, generator=generator),
    )
    return outputs, targets


def test_matching_score_by_hand():
    # One pixel, logits 0: p = 0.5 for the class, m = 0.5, t = 1. DICE = 2 * 0.5 / (0.25 + 1 + 1e-4).
    score = matching_scores(
        torch.zeros(1, 2), torch.zeros(1, 1, 1), InstanceTargets(torch.tensor([1]), torch.ones(1, 1, 1))
    )
    assert score.item() == pytest.approx(0.5**0.2 * (1 / 1.2501) ** 0.8, rel=1e-6)


def test_matching_score_uses_each_instance_own_class():
    class_logits = torch.tensor([[2.0, -2.0]])
    targets = InstanceTargets(torch.tensor([0, 1]), torch.ones(2, 1, 1))
    scores = matching_scores(class_logits, torch.zeros(1, 1, 1), targets)
    ratio = (torch.tensor(2.0).sigmoid() / torch.tensor(-2.0).sigmoid()) ** 0.2
    assert (scores[0, 0] / scores[0, 1]).item() == pytest.approx(ratio.item(), rel=1e-5)


@pytest.mark.parametrize(("num_masks", "num_instances"), [(4, 3), (3, 3), (3, 5), (1, 4), (5, 1)])
@pytest.mark.parametrize("seed", range(4))
def test_equals_brute_force(seed, num_masks, num_instances):
    outputs, targets = random_problem(seed, num_masks, num_instances)
    scores = matching_scores(outputs["pred_logits"][0], outputs["pred_masks"][0], targets).double()
    (pair,) = SparseInstMatcher()(outputs, [targets])
    num_pairs = min(num_masks, num_instances)
    assert len(set(pair.prediction_idx.tolist())) == len(set(pair.gt_idx.tolist())) == num_pairs
    best = max(
        sum(scores[row, column] for row, column in zip(rows, columns))
        for rows in itertools.combinations(range(num_masks), num_pairs)
        for columns in itertools.permutations(range(num_instances), num_pairs)
    )
    assert scores[pair.prediction_idx, pair.gt_idx].sum().item() == pytest.approx(best.item(), abs=1e-6)


def test_a_batch_is_matched_image_by_image():
    problems = [random_problem(seed, 4, count) for seed, count in enumerate([2, 0, 6])]
    outputs = {name: torch.cat([problem[0][name] for problem in problems]) for name in ("pred_logits", "pred_masks")}
    together = SparseInstMatcher()(outputs, [targets for _, targets in problems])
    for (alone_outputs, targets), pair in zip(problems, together):
        (alone,) = SparseInstMatcher()(alone_outputs, [targets])
        assert torch.equal(alone.prediction_idx, pair.prediction_idx)
        assert torch.equal(alone.gt_idx, pair.gt_idx)
    assert [len(pair.gt_idx) for pair in together] == [2, 0, 4]


def test_permuting_the_ground_truth_permutes_the_match():
    outputs, targets = random_problem(0, 6, 4)
    order = torch.tensor([2, 0, 3, 1])
    (pair,) = SparseInstMatcher()(outputs, [targets])
    (permuted,) = SparseInstMatcher()(outputs, [InstanceTargets(*(field[order] for field in targets))])
    assert torch.equal(pair.prediction_idx, permuted.prediction_idx)
    assert torch.equal(pair.gt_idx, order[permuted.gt_idx])


def test_float32_under_autocast():
    outputs, targets = random_problem(0, 4, 3)
    plain = matching_scores(outputs["pred_logits"][0], outputs["pred_masks"][0], targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(matching_scores(outputs["pred_logits"][0], outputs["pred_masks"][0], targets), plain)


@pytest.mark.parametrize(("name", "num_instances"), [("pred_masks", 1), ("pred_masks", 3), ("pred_logits", 2)])
def test_scores_that_are_not_finite_are_matched_first(name, num_instances):
    # So that a loss tells of them, also where other predictions fit much better.
    outputs, targets = random_problem(0, 4, num_instances)
    outputs[name][0, 1] = float("nan")
    (pair,) = SparseInstMatcher()(outputs, [targets])
    assert len(pair.gt_idx) == num_instances and 1 in pair.prediction_idx.tolist()

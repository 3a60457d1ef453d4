"""Matcher and criterion for any finite logits and any ground truth: what holds whatever the numbers."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import linear_sum_assignment

from sparseinst.modeling.sparse_inst.criterion import SparseInstCriterion
from sparseinst.modeling.sparse_inst.matcher import SparseInstMatcher, matching_scores
from sparseinst.structures.targets import InstanceTargets

# Above it sums over a few logits leave float32.
LARGEST = float(np.float32(1e30))
# Rounding of a DICE of 1.
ROUNDING = 1e-6

logit = st.one_of(
    st.floats(-8, 8, width=32), st.floats(-LARGEST, LARGEST, width=32), st.sampled_from([0.0, 1e4, -1e4, 65504.0])
)
share = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1, width=32))


def draw_tensor(draw, shape, elements):
    return torch.from_numpy(draw(arrays(np.float32, shape, elements=elements)))


@st.composite
def problems(draw, max_masks=4, max_instances=6, max_batch=2):
    """A batch: the decoder's outputs, with gradients, and ground truth."""
    batch, num_masks = draw(st.integers(1, max_batch)), draw(st.integers(1, max_masks))
    num_classes, size = draw(st.integers(1, 3)), (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    outputs = {
        "pred_logits": draw_tensor(draw, (batch, num_masks, num_classes), logit),
        "pred_masks": draw_tensor(draw, (batch, num_masks, *size), logit),
        "pred_scores": draw_tensor(draw, (batch, num_masks, 1), logit),
    }
    targets = []
    for _ in range(batch):
        count = draw(st.integers(0, max_instances))
        classes = draw(st.lists(st.integers(0, num_classes - 1), min_size=count, max_size=count))
        masks = draw_tensor(draw, (count, *size), share)
        targets.append(InstanceTargets(torch.tensor(classes, dtype=torch.int64), masks))
    return {name: value.requires_grad_() for name, value in outputs.items()}, targets


def permuted(targets, order):
    return InstanceTargets(*(field[order] for field in targets))


def scores_of(outputs, targets):
    """Scores of a batch of one image."""
    return matching_scores(outputs["pred_logits"][0], outputs["pred_masks"][0], targets).detach()


@settings(max_examples=100, deadline=None)
@given(problems())
def test_losses_and_gradients_are_finite_and_losses_not_negative(problem):
    outputs, targets = problem
    criterion = SparseInstCriterion(matcher=SparseInstMatcher())
    losses = criterion(outputs, targets)
    for name, loss in losses.items():
        assert torch.isfinite(loss) and loss >= -ROUNDING, (name, loss)
    sum(losses.values()).backward()
    for name, value in outputs.items():
        assert torch.isfinite(value.grad).all(), name


@settings(max_examples=100, deadline=None)
@given(problems())
def test_pairs_are_one_to_one_and_as_many_as_can_be(problem):
    outputs, targets = problem
    num_masks, num_classes = outputs["pred_logits"].shape[1:]
    pairs = SparseInstMatcher()(outputs, targets)
    assert len(pairs) == len(targets)
    for pair, target in zip(pairs, targets):
        predictions, instances = pair.prediction_idx.tolist(), pair.gt_idx.tolist()
        assert len(predictions) == len(instances) == min(num_masks, len(target.gt_classes))
        assert sorted(set(predictions)) == predictions and set(predictions) <= set(range(num_masks))
        assert len(set(instances)) == len(instances) and set(instances) <= set(range(len(target.gt_classes)))


@settings(max_examples=60, deadline=None)
@given(problems(max_masks=3, max_instances=4, max_batch=1))
def test_no_other_assignment_scores_more(problem):
    outputs, (targets,) = problem
    scores = scores_of(outputs, targets)
    (pair,) = SparseInstMatcher()(outputs, [targets])
    num_masks, num_instances = scores.shape
    best = max(
        sum((scores[row, column].item() for row, column in zip(rows, columns)), 0.0)
        for rows in itertools.combinations(range(num_masks), min(num_masks, num_instances))
        for columns in itertools.permutations(range(num_instances), min(num_masks, num_instances))
    )
    assert scores[pair.prediction_idx, pair.gt_idx].sum().item() == pytest.approx(best, abs=1e-6)
    assert ((scores >= 0) & (scores <= 1 + ROUNDING)).all()


@settings(max_examples=60, deadline=None)
@given(problems(max_batch=1), st.randoms(use_true_random=False))
def test_the_order_of_the_ground_truth_does_not_matter(problem, random):
    outputs, (targets,) = problem
    order = list(range(len(targets.gt_classes)))
    random.shuffle(order)
    order = torch.tensor(order, dtype=torch.int64)
    scores = scores_of(outputs, targets)
    matcher = SparseInstMatcher()
    (pair,), (other,) = matcher(outputs, [targets]), matcher(outputs, [permuted(targets, order)])
    total = scores[pair.prediction_idx, pair.gt_idx].sum()
    torch.testing.assert_close(scores[other.prediction_idx, order[other.gt_idx]].sum(), total)

    # Where one assignment is the best by more than rounding, it is the match, and the losses are the same.
    assume(_is_unique(scores, pair))
    assert torch.equal(pair.prediction_idx, other.prediction_idx)
    assert torch.equal(pair.gt_idx, order[other.gt_idx])
    criterion = SparseInstCriterion(matcher=matcher)
    losses, permuted_losses = criterion(outputs, [targets]), criterion(outputs, [permuted(targets, order)])
    for name, loss in losses.items():
        torch.testing.assert_close(loss, permuted_losses[name])


def _is_unique(scores, pair):
    """Whether every assignment without one of the pairs scores less, by more than rounding."""
    total = scores[pair.prediction_idx, pair.gt_idx].sum().item()
    for prediction, gt in zip(pair.prediction_idx, pair.gt_idx):
        without = scores.clone()
        without[prediction, gt] = -1
        rows, columns = linear_sum_assignment(without.numpy(), maximize=True)
        if without[rows, columns].sum().item() > total - 1e-4:
            return False
    return True

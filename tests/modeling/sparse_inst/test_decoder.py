"""The decoder: coordinates, activation maps against a loop, groups, initialisation."""

import math

import pytest
import torch

from sparseinst.modeling.sparse_inst.decoder import (
    InstanceBranch,
    normalize_iams,
    pool_instances,
)
from sparseinst.ops.coordinates import append_coordinates


def make_branch(**kwargs):
    settings = {"in_channels": 6, "dim": 8, "num_convs": 1, "num_masks": 5, "num_classes": 3, "kernel_dim": 4}
    return InstanceBranch(**{**settings, **kwargs})


def test_coordinates():
    features = torch.randn(2, 3, 3, 5)
    output = append_coordinates(features)
    assert torch.equal(output[:, 2:], features)
    for image in output:
        assert image[0].tolist() == [[-1, -0.5, 0, 0.5, 1]] * 3
        assert image[1].T.tolist() == [[-1, 0, 1]] * 5


def test_coordinates_of_one_pixel_are_finite():
    assert append_coordinates(torch.zeros(1, 1, 1, 1)).flatten().tolist() == [-1, -1, 0]


@pytest.mark.parametrize("normalization", ["sigmoid", "softmax"])
def test_pooling_against_a_loop(normalization):
    logits, features = torch.randn(2, 3, 4, 5), torch.randn(2, 6, 4, 5)
    pooled = pool_instances(normalize_iams(logits, normalization), features)
    for b in range(2):
        for r in range(3):
            weights = logits[b, r].sigmoid() if normalization == "sigmoid" else logits[b, r].exp()
            expected = torch.stack([(weights * channel).sum() for channel in features[b]]) / weights.sum()
            torch.testing.assert_close(pooled[b, r], expected)


@pytest.mark.parametrize("normalization", ["sigmoid", "softmax"])
@pytest.mark.parametrize("logit", [0.0, 1e4, -10.0])
def test_weights_sum_to_one(normalization, logit):
    pooled = pool_instances(normalize_iams(torch.full((1, 2, 3, 4), logit), normalization), torch.ones(1, 1, 3, 4))
    torch.testing.assert_close(pooled, torch.ones(1, 2, 1))


def test_the_sum_has_a_floor():
    # sigmoid(-1e4) is 0: the vector is 0, not NaN. With a sum of 2e-7 the floor of 1e-6 divides.
    assert normalize_iams(torch.full((1, 1, 1, 2), -1e4)).tolist() == [[[[0, 0]]]]
    logits = torch.full((1, 1, 1, 2), math.log(1e-7))
    assert normalize_iams(logits).sum().item() == pytest.approx(0.2, rel=1e-4)


def test_pooling_is_float32_under_autocast():
    logits, features = torch.randn(1, 3, 4, 5), torch.randn(1, 6, 4, 5)
    plain = pool_instances(normalize_iams(logits), features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pool_instances(normalize_iams(logits), features), plain)
    # Over a large map the weights leave float16's range; the result does not.
    half = pool_instances(normalize_iams(torch.zeros(1, 1, 400, 400).half()), torch.ones(1, 1, 400, 400).half())
    # (Summing 160,000 numbers rounds by 1e-4 in float32 too.)
    torch.testing.assert_close(half, torch.ones(1, 1, 1), rtol=1e-3, atol=0)


@pytest.mark.parametrize("num_groups", [1, 2, 4, 8])
def test_groups_keep_their_instances_apart(num_groups):
    # Output g * N + n of iam_conv is group g of instance n: changing instance 2's maps changes instance 2 alone.
    branch = make_branch(num_groups=num_groups, with_fc=True).eval()
    features = append_coordinates(torch.randn(1, 6, 7, 6))
    before = branch(features)
    with torch.no_grad():
        for group in range(num_groups):
            branch.iam_conv.weight[group * 5 + 2] += 1.0
    after = branch(features)
    for old, new in zip(before[:3], after[:3]):
        changed = (old - new).abs().amax(-1)[0] > 1e-6
        assert changed.tolist() == [False, False, True, False, False]


def test_vectors_are_joined_in_group_order():
    branch = make_branch(num_groups=2).eval()
    with torch.no_grad():
        # The class logit reads channel 0 of the second group's vector.
        branch.cls_score.weight.zero_()
        branch.cls_score.bias.zero_()
        branch.cls_score.weight[:, 8] = 1.0
    features = append_coordinates(torch.randn(1, 6, 7, 6))
    output = branch(features)
    convolved = branch.inst_convs(features)
    expected = pool_instances(normalize_iams(output.iam_logits[:, 5:]), convolved)[..., 0]
    torch.testing.assert_close(output.class_logits[..., 0], expected)


def test_softmax_bias_does_nothing():
    branch = make_branch(num_groups=2, with_fc=True, iam_normalization="softmax").eval()
    features = append_coordinates(torch.randn(1, 6, 7, 6))
    before = branch(features)
    with torch.no_grad():
        branch.softmax_bias += 3
    for old, new in zip(before[:3], branch(features)[:3]):
        torch.testing.assert_close(old, new)

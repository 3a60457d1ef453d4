"""The decoder: coordinates, activation maps against a loop, groups, initialisation."""

import math

import pytest
import torch

from sparseinst.modeling.sparse_inst.decoder import (
    BaseIAMDecoder,
    InstanceBranch,
    MaskBranch,
    normalize_iams,
    pool_instances,
)
from sparseinst.modeling.sparse_inst.location_prior import window_logits
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


def test_location_prior_moves_the_maps_of_every_group():
    branch = make_branch(num_groups=2, num_masks=4, location_prior=3.0).eval()
    features = append_coordinates(torch.zeros(1, 6, 8, 8))
    weights = branch(features).iam_weights.unflatten(1, (2, 4))[0]
    for group in weights:
        # The quarter of the picture that the instance stands in has most of the weight.
        quarters = [group[i, 4 * (i // 2) :, 4 * (i % 2) :][:4, :4].sum() for i in range(4)]
        assert min(quarters) > 0.5


def test_mask_window_starts_as_asked_and_draws_the_maps():
    torch.manual_seed(0)
    decoder = BaseIAMDecoder(
        inst_branch=make_branch(mask_window=0.3, location_prior=1.0, num_masks=6),
        mask_branch=MaskBranch(in_channels=6, dim=8, num_convs=1, kernel_dim=4),
    )
    torch.nn.init.zeros_(decoder.inst_branch.mask_window.weight)
    torch.nn.init.zeros_(decoder.inst_branch.mask_kernel.weight)
    features = torch.randn(2, 6, 8, 12)
    outputs = decoder(features)
    windows = torch.tensor([0.3, 0.0]).expand(2, 6, 2)
    expected = window_logits(windows, outputs["iam_weights"])
    torch.testing.assert_close(
        outputs["pred_masks"],
        torch.nn.functional.interpolate(expected, scale_factor=2, mode="bilinear", align_corners=False),
    )
    # A mask that is too far to the right moves the maps.
    outputs["pred_masks"][:, 0, :, :12].sum().backward()
    assert decoder.inst_branch.iam_conv.weight.grad[0].abs().sum() > 0
    assert decoder.inst_branch.mask_window.weight.grad is not None


def test_no_window_no_parameter():
    assert not [name for name, _ in make_branch().named_parameters() if "window" in name]


def test_output_dict_and_mask_product():
    decoder = BaseIAMDecoder(
        inst_branch=make_branch(), mask_branch=MaskBranch(in_channels=6, dim=8, num_convs=1, kernel_dim=4)
    ).eval()
    features = torch.randn(2, 6, 5, 7)
    outputs = decoder(features)
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {
        "pred_logits": (2, 5, 3),
        "pred_masks": (2, 5, 10, 14),
        "pred_scores": (2, 5, 1),
    }
    assert decoder.train()(features)["iam_weights"].shape == (2, 5, 5, 7)
    with_coordinates = append_coordinates(features)
    kernels, mask_features = decoder.inst_branch(with_coordinates)[1], decoder.mask_branch(with_coordinates)
    masks = torch.einsum("bnd,bdhw->bnhw", kernels, mask_features)
    masks = torch.nn.functional.interpolate(masks, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(outputs["pred_masks"], masks)


def test_output_iam():
    decoder = BaseIAMDecoder(
        inst_branch=make_branch(num_groups=4),
        mask_branch=MaskBranch(in_channels=6, dim=8, num_convs=1, kernel_dim=4),
    ).eval()
    assert "pred_iam" not in decoder(torch.randn(1, 6, 5, 7))
    assert decoder(torch.randn(1, 6, 5, 7), with_iams=True)["pred_iam"].shape == (1, 20, 10, 14)


def test_initialisation():
    torch.manual_seed(0)
    branch = InstanceBranch(in_channels=64, dim=64, num_groups=4, with_fc=True, iam_normalization="softmax")
    prior = -math.log(99)
    for layer in (branch.iam_conv, branch.cls_score):
        assert layer.bias.unique().item() == pytest.approx(prior)
    for layer in (branch.iam_conv, branch.cls_score, branch.mask_kernel):
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert branch.mask_kernel.bias.abs().max() == 0
    assert branch.softmax_bias.item() == 1
    # MSRA: N(0, 2 / fan_out).
    assert branch.inst_convs[2].weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.05)
    # Xavier as fvcore has it: U(-b, b) with b = sqrt(3 / fan_in).
    assert branch.fc.weight.abs().max().item() == pytest.approx(math.sqrt(3 / 256), rel=0.01)


def test_errors():
    with pytest.raises(ValueError, match="INST.DIM is 8.*GROUPS, 3"):
        make_branch(num_groups=3)
    with pytest.raises(ValueError, match="iam_normalization"):
        make_branch(iam_normalization="tanh")
    with pytest.raises(ValueError, match="CONVS"):
        make_branch(num_convs=0)

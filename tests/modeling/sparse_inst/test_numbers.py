"""Numbers through the whole of the model: float32 under autocast, extreme values, single pixels, batches."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import BitMasks, Instances
from torch import nn

from sparseinst.modeling.sparse_inst.criterion import SparseInstCriterion
from sparseinst.modeling.sparse_inst.decoder import (
    BaseIAMDecoder,
    InstanceBranch,
    MaskBranch,
    normalize_iams,
    pool_instances,
)
from sparseinst.modeling.sparse_inst.encoder import InstanceContextEncoder
from sparseinst.modeling.sparse_inst.matcher import SparseInstMatcher, matching_scores
from sparseinst.ops.precision import no_autocast
from sparseinst.structures.targets import InstanceTargets
from tests.tiny_model import random_input, tiny_model

HALF_DTYPES = [torch.float16, torch.bfloat16]
HALF_MAX = 65504.0
EXTREMES = [0.0, 1e4, -1e4, HALF_MAX, -HALF_MAX, 1e30, -1e30]


def make_outputs(size=(6, 5), batch=1, num_masks=4, num_classes=3, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "pred_logits": torch.randn(batch, num_masks, num_classes, generator=generator) * scale,
        "pred_masks": torch.randn(batch, num_masks, *size, generator=generator) * scale,
        "pred_scores": torch.randn(batch, num_masks, 1, generator=generator) * scale,
    }


def make_targets(count, size=(6, 5), num_classes=3, seed=0):
    generator = torch.Generator().manual_seed(100 + seed)
    return InstanceTargets(
        torch.randint(num_classes, (count,), generator=generator), torch.rand(count, *size, generator=generator)
    )


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_what_sums_and_what_takes_powers_is_float32_under_autocast(dtype):
    """The same as in float32 on the same inputs, to the last bit; the inputs are what autocast would hand over."""
    logits, features = torch.randn(2, 6, 9, 8).to(dtype), torch.randn(2, 5, 9, 8).to(dtype)
    outputs = {name: value.to(dtype) for name, value in make_outputs(batch=2).items()}
    targets = [make_targets(2), make_targets(5, seed=1)]

    def computed(cast):
        results = {}
        for normalization in ("sigmoid", "softmax"):
            weights = normalize_iams(cast(logits), normalization)
            results[f"weights {normalization}"] = weights
            results[f"vectors {normalization}"] = pool_instances(weights, cast(features))
        cast_outputs = {name: cast(value) for name, value in outputs.items()}
        results["scores"] = matching_scores(cast_outputs["pred_logits"][1], cast_outputs["pred_masks"][1], targets[1])
        pairs = SparseInstMatcher()(cast_outputs, targets)
        results.update({f"pairs {index}": torch.stack(pair) for index, pair in enumerate(pairs)})
        return {**results, **SparseInstCriterion(matcher=SparseInstMatcher())(cast_outputs, targets)}

    expected = computed(lambda value: value.float())
    with torch.autocast("cpu", dtype=dtype):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
        results = computed(lambda value: value)
    for name, value in results.items():
        assert value.dtype == (torch.int64 if name.startswith("pairs") else torch.float32), name
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_gradients_of_the_losses_are_those_of_float32_under_autocast(dtype):
    outputs = {name: value.detach().requires_grad_() for name, value in make_outputs(batch=2).items()}
    targets = [make_targets(2), make_targets(0)]
    expected = torch.autograd.grad(
        sum(SparseInstCriterion(matcher=SparseInstMatcher())(outputs, targets).values()), list(outputs.values())
    )
    with torch.autocast("cpu", dtype=dtype):
        total = sum(SparseInstCriterion(matcher=SparseInstMatcher())(outputs, targets).values())
    for value, gradient in zip(expected, torch.autograd.grad(total, list(outputs.values()))):
        assert gradient.dtype == torch.float32 and torch.equal(value, gradient)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_devices_with_and_without_autocast(device):
    with no_autocast(torch.device(device)):
        assert (torch.ones(2, 2, device=device) @ torch.ones(2, 2, device=device)).dtype == torch.float32
    weights = normalize_iams(torch.zeros(1, 2, 3, 3, device=device))
    assert pool_instances(weights, torch.zeros(1, 4, 3, 3, device=device)).shape == (1, 2, 4)


@pytest.mark.parametrize("value", EXTREMES)
@pytest.mark.parametrize("size", [(1, 1), (3, 4)])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_maps_that_are_all_equal_and_logits_that_are_saturated(value, size, count):
    """Losses and gradients are finite, and no loss negative, from raw logits on; up to what sums may be: 1e30."""
    for normalization in ("sigmoid", "softmax"):
        for target in (0.0, 1e-8, 0.5, 1.0):
            outputs = {
                "pred_logits": torch.full((1, 4, 3), value, requires_grad=True),
                "pred_masks": torch.full((1, 4, *size), value, requires_grad=True),
                "pred_scores": torch.full((1, 4, 1), value, requires_grad=True),
            }
            iam_logits = torch.full((1, 8, *size), value, requires_grad=True)
            targets = InstanceTargets(torch.arange(count) % 3, torch.full((count, *size), target))
            weights = normalize_iams(iam_logits, normalization)
            losses = SparseInstCriterion(matcher=SparseInstMatcher())(outputs, [targets])
            assert all(torch.isfinite(loss) and loss >= 0 for loss in losses.values()), losses
            total = sum(losses.values()) + pool_instances(weights, torch.zeros(1, 2, *size)).sum()
            for gradient in torch.autograd.grad(total, [*outputs.values(), iam_logits]):
                assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES])
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 4)])
@pytest.mark.parametrize("fill", [0.0, 1.0, None])
def test_encoder_and_decoder_on_single_pixels_and_on_equal_features(dtype, size, fill):
    torch.manual_seed(0)
    shapes = {"res3": ShapeSpec(channels=4, stride=8), "res4": ShapeSpec(channels=6, stride=16)}
    encoder = InstanceContextEncoder(input_shape=shapes, in_features=("res3", "res4"), num_channels=8)
    branches = {"in_channels": 8, "dim": 8, "num_convs": 1, "kernel_dim": 4}
    decoder = BaseIAMDecoder(
        inst_branch=InstanceBranch(**branches, num_masks=4, num_classes=3),
        mask_branch=MaskBranch(**branches),
    )
    model = nn.Sequential(encoder, decoder).train()
    features = {}
    for name, channels, cells in (("res3", 4, size), ("res4", 6, [(side + 1) // 2 for side in size])):
        maps = torch.randn(2, channels, *cells) if fill is None else torch.full((2, channels, *cells), fill)
        features[name] = maps.requires_grad_()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        outputs = model(features)
        targets = [make_targets(2, outputs["pred_masks"].shape[-2:]), make_targets(0, outputs["pred_masks"].shape[-2:])]
        losses = SparseInstCriterion(matcher=SparseInstMatcher())(outputs, targets)
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
    assert all(torch.isfinite(value.grad).all() for value in features.values())


@pytest.mark.parametrize("pixel", [0, 255])
@pytest.mark.parametrize("size", [(1, 1), (40, 70)])
@pytest.mark.parametrize("counts", [(0, 0), (2, 0), (2, 9)])
def test_the_whole_model_on_images_of_one_colour(pixel, size, counts):
    model = tiny_model().train()
    inputs = [
        {
            "image": torch.full((3, *size), pixel, dtype=torch.uint8),
            "instances": Instances(
                size, gt_classes=torch.arange(count) % 3, gt_masks=BitMasks(torch.ones(count, *size, dtype=torch.bool))
            ),
        }
        for count in counts
    ]
    losses = model(inputs)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    with torch.no_grad():
        predictions = model.eval()(inputs)
    assert all(torch.isfinite(x["instances"].scores).all() for x in predictions)


@pytest.mark.parametrize("decoder", ["BaseIAMDecoder", "GroupIAMDecoder", "GroupIAMSoftDecoder"])
def test_an_image_alone_and_in_a_batch_of_equal_sizes(decoder):
    model = tiny_model("MODEL.SPARSE_INST.DECODER.NAME", decoder)
    inputs = [random_input(50, 70, num_instances=count, seed=count) for count in (2, 3, 7, 1)]
    with torch.no_grad():
        together, apart = model(inputs), [model([x])[0] for x in inputs]
        batch_outputs = model.network(model.preprocess(inputs).tensor)
        for index, (batched, alone) in enumerate(zip(together, apart)):
            for name, value in model.network(model.preprocess([inputs[index]]).tensor).items():
                # Rounding, relative to what is summed; random weights without norms magnify it from layer to layer.
                assert (batch_outputs[name][index] - value[0]).abs().max() <= 1e-4 * value.abs().max(), name
            batched, alone = batched["instances"], alone["instances"]
            assert len(batched) == len(alone) > 0
            torch.testing.assert_close(batched.scores, alone.scores, rtol=1e-3, atol=1e-5)
            assert torch.equal(batched.pred_classes, alone.pred_classes)
            assert (batched.pred_masks != alone.pred_masks).float().mean() < 1e-4


def test_losses_of_images_in_a_batch_are_the_sum_of_theirs_alone():
    # FrozenBN: statistics of a batch are no image's own. What is divided by is held fixed, for the same reason.
    model = tiny_model("MODEL.RESNETS.NORM", "FrozenBN").train()
    inputs = [random_input(50, 70, num_instances=count, seed=count) for count in (2, 0, 7)]
    together = model(inputs)
    apart = [model([x], part) for x, part in zip(inputs, model.prepare_parts([[x] for x in inputs]))]
    for name, loss in together.items():
        torch.testing.assert_close(loss, sum(losses[name] for losses in apart), rtol=1e-5, atol=1e-6)


def test_padding_changes_an_image_more_than_rounding():
    """What docs/reliability.md says: coordinates, pooled context and activation maps go over the padded picture."""
    model = tiny_model()
    x = random_input(50, 70)
    with torch.no_grad():
        (alone,) = model([x])
        padded, _ = model([x, random_input(128, 160, seed=1)])
    assert len(padded["instances"]) > 0
    assert not torch.allclose(alone["instances"].scores[:1], padded["instances"].scores[:1], rtol=1e-3)

"""The encoder: levels of any number, stride and size; pooling against a loop; errors."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from torch.nn import functional as F

from sparseinst.modeling.sparse_inst.encoder import InstanceContextEncoder, PyramidPooling


def make_encoder(strides, num_channels=8, **kwargs):
    input_shape = {f"f{s}": ShapeSpec(channels=4 + s, stride=s) for s in strides}
    return InstanceContextEncoder(
        input_shape=input_shape, in_features=list(input_shape), num_channels=num_channels, **kwargs
    ).eval()


@pytest.mark.parametrize(
    ("strides", "sizes"),
    [
        ((8, 16, 32), ((12, 20), (6, 10), (3, 5))),
        ((8, 16, 32), ((13, 9), (7, 5), (4, 3))),
        ((8, 16), ((5, 4), (3, 2))),
        ((4, 8, 16, 32), ((16, 16), (8, 8), (4, 4), (2, 2))),
        ((4, 32), ((24, 8), (3, 1))),
        ((8, 16, 32), ((1, 1), (1, 1), (1, 1))),
        ((16, 16), ((4, 6), (4, 6))),
    ],
)
def test_any_levels(strides, sizes):
    input_shape = {f"f{i}": ShapeSpec(channels=3 + i, stride=s) for i, s in enumerate(strides)}
    encoder = InstanceContextEncoder(input_shape=input_shape, in_features=list(input_shape), num_channels=8)
    features = {name: torch.randn(2, spec.channels, *size) for (name, spec), size in zip(input_shape.items(), sizes)}
    output = encoder(features)
    assert output.shape == (2, 8, *sizes[0])
    assert torch.isfinite(output).all()
    assert encoder.output_shape() == ShapeSpec(channels=8, stride=strides[0])


def test_top_down_path_by_hand():
    # Two levels; identity laterals, outputs that pass the centre, pooling switched off but for its input.
    encoder = InstanceContextEncoder(
        input_shape={"a": ShapeSpec(channels=4, stride=8), "b": ShapeSpec(channels=4, stride=16)},
        in_features=["a", "b"],
        num_channels=4,
    )
    identity = torch.eye(4)[:, :, None, None]
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()
        for conv in encoder.fpn_laterals:
            conv.weight.copy_(identity)
        for conv in encoder.fpn_outputs:
            conv.weight[:, :, 1, 1] = torch.eye(4)
        encoder.ppm.bottleneck.weight[:, -4:] = identity
        # The fusion gives fine + 10 * coarse: the order of its inputs is from the finest.
        encoder.fusion.weight.copy_(torch.cat([identity, 10 * identity], dim=1))
    fine, coarse = torch.rand(1, 4, 4, 4), torch.rand(1, 4, 2, 2)
    top_down = fine + F.interpolate(coarse, scale_factor=2, mode="nearest")
    expected = top_down + 10 * F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(encoder({"a": fine, "b": coarse}), expected)


def test_pyramid_pooling_against_a_loop():
    pooling = PyramidPooling(8)
    features = torch.randn(1, 8, 7, 10)
    parts = []
    for size, stage in zip((1, 2, 3, 6), pooling.stages):
        pooled = torch.zeros(1, 8, size, size)
        for y in range(size):
            for x in range(size):
                # Bin i of n covers the pixels from floor(i * length / n) to ceil((i + 1) * length / n).
                rows = slice(y * 7 // size, -(-(y + 1) * 7 // size))
                columns = slice(x * 10 // size, -(-(x + 1) * 10 // size))
                pooled[:, :, y, x] = features[:, :, rows, columns].mean((2, 3))
        parts.append(F.interpolate(stage[1](pooled).relu(), size=(7, 10), mode="bilinear", align_corners=False))
    expected = pooling.bottleneck(torch.cat([*parts, features], dim=1)).relu()
    torch.testing.assert_close(pooling(features), expected)


def test_errors_name_the_keys():
    shapes = {"res4": ShapeSpec(channels=8, stride=16)}
    with pytest.raises(ValueError, match="ENCODER.IN_FEATURES.*res3.*res5.*MODEL.RESNETS.OUT_FEATURES"):
        InstanceContextEncoder(input_shape=shapes, in_features=["res3", "res4", "res5"], num_channels=8)
    with pytest.raises(ValueError, match="two to four"):
        InstanceContextEncoder(input_shape=shapes, in_features=["res4"], num_channels=8)
    with pytest.raises(ValueError, match="finest"):
        make_encoder((16, 8))
    with pytest.raises(ValueError, match="ENCODER.NUM_CHANNELS"):
        make_encoder((8, 16), num_channels=10)


def test_norm_adds_norms_and_takes_the_biases():
    encoder = make_encoder((8, 16), num_channels=32, norm="GN")
    assert encoder.fpn_laterals[0].bias is None
    assert isinstance(encoder.fpn_outputs[1].norm, torch.nn.GroupNorm)
    assert make_encoder((8, 16)).fpn_laterals[0].norm is None

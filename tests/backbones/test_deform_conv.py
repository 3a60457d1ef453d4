"""Deformable convolution: by hand, against conv2d, and against a loop over pixels and taps."""

import copy
import math

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn

from sparseinst.ops.deform_conv import DeformConv2d, own_name, published_name


def random_offsets(layer, std=0.5):
    for parameter in layer.offset.parameters():
        nn.init.normal_(parameter, std=std)
    return layer


def sample(image, y, x):
    """Bilinear value of an image (h, w) at a place in pixels; zero outside."""
    total = 0.0
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < image.shape[0] and 0 <= column < image.shape[1]:
                total += (1 - abs(y - row)) * (1 - abs(x - column)) * image[row, column].item()
    return total


def by_loop(layer, features, num_groups):
    """The definition, from the channels of ``layer.offset`` on."""
    offset_map = layer.offset(features)
    batch, _, height, width = offset_map.shape
    out_channels, in_channels, rows, columns = layer.weight.shape
    taps = rows * columns
    offsets = offset_map[:, : 2 * taps * num_groups].reshape(batch, num_groups, taps, 2, height, width)
    factors = torch.ones(batch, num_groups, taps, height, width)
    if layer.modulated:
        factors = offset_map[:, 2 * taps * num_groups :].reshape(factors.shape).sigmoid()
    result = torch.zeros(batch, out_channels, height, width)
    for b in range(batch):
        for i in range(height):
            for j in range(width):
                for c in range(in_channels):
                    group = c * num_groups // in_channels
                    for tap in range(taps):
                        dy, dx = offsets[b, group, tap, :, i, j].tolist()
                        y = i * layer.stride[0] - layer.padding[0] + tap // columns * layer.dilation[0] + dy
                        x = j * layer.stride[1] - layer.padding[1] + tap % columns * layer.dilation[1] + dx
                        value = sample(features[b, c], y, x) * factors[b, group, tap, i, j]
                        result[b, :, i, j] += layer.weight[:, c, tap // columns, tap % columns] * value
    return result


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"dilation": 2, "padding": 2}, {"groups": 2}, {"bias": True}])
def test_with_zero_offsets_it_is_the_convolution_it_replaces(options):
    conv = Conv2d(4, 6, 3, **{"padding": 1, "bias": False, **options}, norm=FrozenBatchNorm2d(6))
    nn.init.uniform_(conv.norm.weight)
    features = torch.randn(2, 4, 7, 9)
    torch.testing.assert_close(DeformConv2d(conv)(features), conv(features))
    # v2: with logits of 0 each tap counts half.
    conv.norm = None
    halved = DeformConv2d(conv, num_groups=2, modulated=True)(features)
    bias = 0 if conv.bias is None else conv.bias[:, None, None]
    torch.testing.assert_close(halved - bias, (conv(features) - bias) / 2)


def test_whole_offsets_by_hand():
    layer = DeformConv2d(nn.Conv2d(1, 1, 3, padding=1, bias=False))
    nn.init.zeros_(layer.weight)
    layer.weight.data[0, 0, 1, 2] = 1  # the tap on the right: the sixth
    image = torch.arange(12.0).reshape(1, 1, 3, 4)
    # That tap alone: the image one to the left.
    assert layer(image)[0, 0].tolist() == [[1, 2, 3, 0], [5, 6, 7, 0], [9, 10, 11, 0]]
    # One row further down and two columns back: in all, one down and one to the left.
    layer.offset.bias.data[2 * 5], layer.offset.bias.data[2 * 5 + 1] = 1, -2
    assert layer(image)[0, 0].tolist() == [[0, 4, 5, 6], [0, 8, 9, 10], [0, 0, 0, 0]]
    # Half a row down: the mean of two rows, with zeros below the image.
    layer.offset.bias.data[2 * 5], layer.offset.bias.data[2 * 5 + 1] = 0.5, -1
    assert layer(image)[0, 0].tolist() == [[2, 3, 4, 5], [6, 7, 8, 9], [4, 4.5, 5, 5.5]]


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("num_groups", [1, 2])
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"dilation": 2, "padding": 2}])
def test_against_a_loop(options, num_groups, modulated):
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3, **{"padding": 1, "bias": False, **options})
    layer = random_offsets(DeformConv2d(conv, num_groups=num_groups, modulated=modulated))
    features = torch.randn(2, 2, 5, 6)
    with torch.no_grad():
        torch.testing.assert_close(layer(features), by_loop(layer, features, num_groups), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("modulated", [False, True])
def test_gradients_against_differences(modulated):
    torch.manual_seed(0)
    layer = DeformConv2d(nn.Conv2d(2, 2, 3, padding=1, bias=False), modulated=modulated).double()
    random_offsets(layer, std=0.3)
    features = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    parameters = [layer.weight, layer.offset.weight, layer.offset.bias]
    assert torch.autograd.gradcheck(lambda *_: layer(features), [features, *parameters])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("modulated", [False, True])
def test_mixed_precision_on_the_cpu(dtype, modulated):
    torch.manual_seed(0)
    layer = random_offsets(DeformConv2d(nn.Conv2d(4, 4, 3, padding=1, bias=False), modulated=modulated), std=0.1)
    features = torch.randn(2, 4, 8, 8, requires_grad=True)
    expected = layer(features)
    with torch.autocast("cpu", dtype=dtype):
        output = layer(features)
        assert output.dtype == dtype  # as a convolution's
    torch.testing.assert_close(output.float(), expected, atol=0.05, rtol=0.05)
    output.float().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() and parameter.grad.any() for parameter in layer.parameters())
    low = copy.deepcopy(layer).to(dtype)
    assert low(features.detach().to(dtype)).dtype == dtype


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (0, 3)])
def test_small_and_empty_maps(size):
    layer = random_offsets(DeformConv2d(nn.Conv2d(2, 3, 3, padding=1, bias=False)))
    features = torch.randn(2 if size[0] else 0, 2, max(size[0], 1), size[1])
    assert layer(features).shape == (features.shape[0], 3, *features.shape[2:])


def test_offsets_of_a_frozen_convolution_are_frozen():
    conv = nn.Conv2d(2, 2, 3)
    assert all(parameter.requires_grad for parameter in DeformConv2d(conv).parameters())
    conv.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in DeformConv2d(conv).parameters())


@pytest.mark.parametrize("num_groups", [0, 3])
def test_groups_that_do_not_divide_the_channels(num_groups):
    with pytest.raises(ValueError, match=f"DEFORM_NUM_GROUPS is {num_groups}.*4 channels"):
        DeformConv2d(nn.Conv2d(4, 4, 3), num_groups=num_groups)


def test_names():
    assert published_name("res4.0.conv2.offset.weight") == "res4.0.conv2_offset.weight"
    for name in ("res4.0.conv2_offset.bias", "layer3.1.conv2.weight", "res4.0.conv2.norm.weight"):
        assert published_name(own_name(name)) == name

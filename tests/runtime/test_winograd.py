"""Winograd's convolution against the sum itself, in float64."""

import pytest
import torch
from detectron2 import layers
from torch import library, nn
from torch.nn import functional as F

from sparseinst.runtime.rewrites import winograd
from sparseinst.runtime.rewrites.winograd import WinogradConv2d, can_be_winograd, use_winograd

TOLERANCE = 1e-5


def make_conv(in_channels, out_channels, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)


def assert_close(found, expected, tolerance=TOLERANCE):
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert (found - expected).abs().max() < tolerance * expected.abs().max()


def arguments(module, x):
    return x, module.weight, module.bias, module.transform, module.transform_back


def in_float64(conv, x):
    bias = None if conv.bias is None else conv.bias.double()
    return F.conv2d(x.double(), conv.weight.double(), bias, padding=1)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (4, 4), (8, 12), (13, 18), (31, 2), (2, 50)])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_sizes(monkeypatch, size, batch, bias):
    monkeypatch.setattr(winograd, "MIN_TILES", 1)
    conv = make_conv(7, 5, bias)
    x = torch.randn(batch, 7, *size)
    with torch.no_grad():
        assert_close(WinogradConv2d(conv)(x), in_float64(conv, x))


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 12), (13, 18), (2, 50)])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_way_of_engines(size, batch):
    conv = make_conv(7, 5)
    fast = WinogradConv2d(conv)
    x = torch.randn(batch, 7, *size)
    with torch.no_grad():
        found = winograd.winograd_convolution(*arguments(fast, x), chunk_bytes=None)
        assert_close(found, in_float64(conv, x))


@pytest.mark.parametrize("chunk_bytes", [1, 40_000, 2**30])
def test_chunks_give_the_same(chunk_bytes):
    x = torch.randn(2, 16, 37, 22)
    conv = WinogradConv2d(make_conv(16, 8))
    with torch.no_grad():
        found = winograd.winograd_convolution(*arguments(conv, x), chunk_bytes=chunk_bytes)
        assert_close(found, in_float64(conv.conv, x))


def test_large_values_and_layouts():
    conv = make_conv(128, 192)
    x = 1e4 * torch.randn(1, 128, 20, 36) + 3e4
    with torch.no_grad():
        for layout in (torch.contiguous_format, torch.channels_last):
            found = WinogradConv2d(conv)(x.contiguous(memory_format=layout))
            assert found.is_contiguous(memory_format=torch.channels_last)
            assert_close(found, in_float64(conv, x))


def test_few_tiles_are_left_to_the_convolution(monkeypatch):
    conv = make_conv(4, 4)
    module = WinogradConv2d(conv)
    with torch.no_grad():
        few = torch.randn(1, 4, 4, 4 * (winograd.MIN_TILES - 1))
        assert torch.equal(module(few), conv(few))
        conv.weight.zero_()
        many = torch.randn(1, 4, 4, 4 * winograd.MIN_TILES)
        assert module(many).abs().max() > conv(many).abs().max()


@pytest.mark.parametrize(
    ("conv", "expected"),
    [
        (nn.Conv2d(128, 256, 3, padding=1), True),
        (layers.Conv2d(128, 128, 3, padding=1), True),
        (layers.Conv2d(128, 128, 3, padding=1, norm=nn.BatchNorm2d(128)), False),
        (layers.Conv2d(128, 128, 3, padding=1, activation=F.relu), False),
        (nn.Conv2d(128, 64, 3, padding=1), False),
        (nn.Conv2d(64, 128, 3, padding=1), False),
        (nn.Conv2d(128, 128, 3), False),
        (nn.Conv2d(128, 128, 3, padding=1, stride=2), False),
        (nn.Conv2d(128, 128, 3, padding=(1, 2)), False),
        (nn.Conv2d(128, 128, 3, padding=1, dilation=2), False),
        (nn.Conv2d(128, 128, 3, padding=1, padding_mode="reflect"), False),
        (nn.Conv2d(256, 256, 3, padding=1, groups=2), False),
        (nn.Conv2d(128, 128, 1), False),
        (nn.ConvTranspose2d(128, 128, 3, padding=1), False),
        (nn.Linear(128, 128), False),
    ],
)
def test_which_convolutions(conv, expected):
    assert can_be_winograd(conv) is expected


def test_replaced_in_place_and_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 128, 3, padding=1), nn.ReLU(), nn.Sequential(nn.Conv2d(128, 128, 3, padding=1)))
    x = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        expected = model(x)
        assert use_winograd(model) == 1 and isinstance(model[2][0], WinogradConv2d)
        assert_close(model(x), expected)
    assert use_winograd(model) == 0


@pytest.mark.parametrize("size", [(16, 24), (15, 22), (1, 97)])
def test_what_a_compiler_is_told_of_it(size):
    module = WinogradConv2d(make_conv(6, 5))
    x = torch.randn(2, 6, *size)
    library.opcheck(winograd._opaque_convolution, arguments(module, x))
    found = winograd._opaque_convolution(*arguments(module, x))
    assert torch.equal(found, winograd.winograd_convolution(*arguments(module, x)))

"""Pooling and coordinates whose sizes are data, against PyTorch's own functions."""

import pytest
import torch
from torch import nn

from sparseinst.ops.coordinates import append_coordinates, linear_coordinates, relative_centers
from sparseinst.ops.pooling import AdaptiveAveragePool


@pytest.mark.parametrize("output_size", [1, 2, 3, 6])
def test_adaptive_average_pooling(output_size):
    generator = torch.Generator().manual_seed(output_size)
    # Sizes below the output's repeat pixels.
    for size in (
        *((1, width) for width in range(1, 9)),
        (2, 3),
        (3, 2),
        (5, 5),
        (6, 6),
        (7, 13),
        (15, 20),
        (25, 42),
        (1, 1),
    ):
        features = torch.randn(2, 3, *size, generator=generator)
        expected = nn.AdaptiveAvgPool2d(output_size)(features)
        assert torch.allclose(AdaptiveAveragePool(output_size)(features), expected, atol=1e-6), size


def test_pooling_of_half_precision_and_its_gradient():
    features = torch.randn(1, 2, 7, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(AdaptiveAveragePool(3), features)
    half = torch.randn(1, 2, 7, 9).bfloat16()
    assert torch.allclose(AdaptiveAveragePool(3)(half), nn.AdaptiveAvgPool2d(3)(half), atol=0.02)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000])
def test_coordinates(size):
    assert torch.allclose(linear_coordinates(size), torch.linspace(-1, 1, size), atol=1e-6)
    assert torch.allclose(relative_centers(size), (torch.arange(size) + 0.5) / size, atol=1e-6)


def test_coordinates_are_x_then_y():
    features = torch.zeros(2, 1, 2, 3)
    found = append_coordinates(features)
    assert found.shape == (2, 3, 2, 3)
    assert found[1, 0].tolist() == [[-1, 0, 1], [-1, 0, 1]]
    assert found[1, 1].tolist() == [[-1, -1, -1], [1, 1, 1]]

"""Deformable convolution on CUDA, in full and in mixed precision."""

import copy

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from sparseinst.ops.deform_conv import DeformConv2d
from tests.tiny_model import random_input, tiny_cfg

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def random_layer(modulated):
    torch.manual_seed(0)
    layer = DeformConv2d(nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False), num_groups=2, modulated=modulated)
    for parameter in layer.offset.parameters():
        nn.init.normal_(parameter, std=0.1)
    return layer, torch.randn(2, 16, 20, 31)


def run(layer, features, dtype=None):
    layer.zero_grad()
    features = features.clone().requires_grad_()
    with torch.autocast("cuda", dtype=dtype or torch.float16, enabled=dtype is not None):
        output = layer(features)
    output.double().square().sum().backward()
    return [output, features.grad, *(parameter.grad.clone() for parameter in layer.parameters())]


def close(found, expected, tolerance):
    return all(
        (a.double().cpu() - b.double().cpu()).abs().max() <= tolerance * b.abs().max().item()
        for a, b in zip(found, expected)
    )


@pytest.mark.parametrize("modulated", [False, True])
def test_cuda_is_as_the_cpu(modulated):
    layer, features = random_layer(modulated)
    layer, features = layer.double(), features.double()  # float32 may be TensorFloat-32
    expected = run(layer, features)
    found = run(copy.deepcopy(layer).cuda(), features.cuda())
    assert close(found, expected, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("modulated", [False, True])
def test_mixed_precision(dtype, modulated):
    layer, features = random_layer(modulated)
    expected = run(layer, features)
    found = run(copy.deepcopy(layer).cuda(), features.cuda(), dtype)
    assert found[0].dtype == dtype
    assert all(torch.isfinite(value).all() for value in found)
    assert close(found[:1], expected[:1], 0.05)


@pytest.mark.parametrize("builder", ["build_resnet_dcn_backbone", "build_resnet_vd_backbone"])
def test_a_deformable_model_trains_in_mixed_precision(builder):
    torch.manual_seed(0)
    model = build_model(
        tiny_cfg(
            "MODEL.DEVICE", "cuda", "MODEL.BACKBONE.NAME", builder,
            "MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, False, True, True],
        )
    ).train()  # fmt: skip
    # ResNet-vd's norm behind a deformable convolution begins with a weight of 0, which stops the gradient.
    for module in model.backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        losses = model([random_input(num_instances=3), random_input(64, 96, num_instances=2)])
    sum(losses.values()).backward()
    offsets = [(name, parameter) for name, parameter in model.named_parameters() if "offset" in name]
    assert len(offsets) == 4
    for name, parameter in offsets:
        assert torch.isfinite(parameter.grad).all() and parameter.grad.any(), name

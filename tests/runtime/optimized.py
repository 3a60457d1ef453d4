"""Compare an optimized SparseInst with the model that it was made from."""

import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from sparseinst.modeling.sparse_inst.fused import FusedDecoder, FusedEncoder
from sparseinst.runtime.optimize import optimize_as_configured
from sparseinst.runtime.rewrites.winograd import WinogradConv2d


def assert_close(outputs, expected, tolerance=1e-4):
    """Compare the network's outputs, each relative to its largest value."""
    assert outputs.keys() == expected.keys()
    for name, value in expected.items():
        assert outputs[name].dtype == torch.float32 and outputs[name].shape == value.shape
        error = (outputs[name] - value).abs().max() / value.abs().max()
        assert error < tolerance, (name, error.item())


def assert_optimized_equals(cfg: CfgNode, model: nn.Module) -> None:
    """Optimize the model as its config says: the same outputs, no norm is left, and the model itself is unchanged."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = model.network(images)
    optimized = optimize_as_configured(cfg, model)
    assert isinstance(optimized.model.encoder, FusedEncoder) and isinstance(optimized.model.decoder, FusedDecoder)
    assert_close(optimized.network(images), expected)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert any(isinstance(module, WinogradConv2d) for module in optimized.model.decoder.modules())
    assert not [module for module in optimized.modules() if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d)]

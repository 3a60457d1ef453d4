"""torch.compile of a network: how often it compiles. The backend "eager" takes a second in place of a minute."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from sparseinst.runtime import compile as compiling
from sparseinst.runtime.optimize import optimize_for_inference
from tests.modeling.yolact.tiny_yolact import tiny_yolact
from tests.tiny_model import tiny_model

# The maps of these sizes lie on both sides of the limits below which PyTorch chooses another convolution.
SIZES = ((64, 96), (64, 64), (320, 480), (96, 64), (256, 256), (64, 96))


@pytest.fixture
def counter(monkeypatch):
    torch._dynamo.reset()
    counter, real_compile = CompileCounter(), torch.compile
    monkeypatch.setattr(compiling.torch, "compile", lambda network, **kw: real_compile(network, backend=counter, **kw))
    yield counter
    torch._dynamo.reset()


def test_yolact_compiles_once(counter):
    model = tiny_yolact()
    optimized = optimize_for_inference(model, compile=True)
    with torch.no_grad():
        for _ in range(2):
            images = torch.randn(1, 3, 64, 64)
            expected = model.network(images)
            for name, value in optimized.network(images).items():
                assert (value - expected[name]).abs().max() < 1e-4 * expected[name].abs().max()
    assert counter.frame_count == 1


def test_it_compiles_for_the_first_size_and_once_for_all_others(counter):
    model = tiny_model("MODEL.SPARSE_INST.ENCODER.NUM_CHANNELS", 64)
    optimized = optimize_for_inference(model, compile=True)
    counts = []
    with torch.no_grad():
        for size in SIZES:
            images = torch.randn(1, 3, *size)
            expected = model.network(images)
            # As an evaluation does.
            with optimized.output_as(mask_format="rle"):
                outputs = optimized.network(images)
            for name, value in outputs.items():
                assert (value - expected[name]).abs().max() < 1e-4 * expected[name].abs().max()
            counts.append(counter.frame_count)
        assert "pred_iam" not in optimized.network(images)
        counts.append(counter.frame_count)
        with optimized.output_as(with_maps=True):
            assert "pred_iam" in optimized.network(images)
    assert counts == [1, *[2] * len(SIZES)]
    assert torch.backends.mkldnn.enabled

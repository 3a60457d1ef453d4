"""TensorRT's reports of failures, with an engine that is a stub: no test runs TensorRT itself."""

import threading
from types import SimpleNamespace

import pytest
import torch

from sparseinst.runtime.tensorrt import TensorRTNetwork


def network_of(monkeypatch, context) -> TensorRTNetwork:
    """Return a network without outputs whose engine gives this execution context, on the CPU."""
    stream = SimpleNamespace(cuda_stream=0, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    network = TensorRTNetwork.__new__(TensorRTNetwork)
    network._engine = SimpleNamespace(create_execution_context=lambda: context)
    network._names, network._contexts = ["images"], threading.local()
    return network


def test_failures_are_runtime_errors(monkeypatch):
    images = torch.zeros(1, 3, 64, 96)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="cannot create an execution context"):
            network_of(monkeypatch, None)(images)
    done = []
    context = SimpleNamespace(
        set_input_shape=lambda name, shape: True,
        set_tensor_address=lambda name, address: None,
        execute_async_v3=lambda stream: bool(done),
    )
    network = network_of(monkeypatch, context)
    with pytest.raises(RuntimeError, match=r"TensorRT fails on images \(1, 3, 64, 96\)"):
        network(images)
    done.append(True)
    assert network(images) == {}

"""What is recorded, replayed and forgotten, on the CPU: graphs are imitated. tests/gpu has the real ones."""

import contextlib

import pytest
import torch

from sparseinst.modeling import cuda_graphs
from sparseinst.modeling.cuda_graphs import GraphedNetwork


class Graph:
    """Repeats what the network did while it was recorded."""

    current = None

    def __init__(self):
        self.steps = []

    def replay(self):
        for step in self.steps:
            step()


class Stream:
    def wait_stream(self, other):
        pass


class Network:
    """Twice the images; a wait for the device makes the real capture fail."""

    def __init__(self, waits=False):
        self.calls = 0
        self.waits = waits

    def __call__(self, images):
        self.calls += 1
        outputs = {"double": 2 * images}
        if Graph.current is not None:
            if self.waits:
                raise RuntimeError("operation not permitted when stream is capturing")
            Graph.current.steps.append(lambda: outputs["double"].copy_(2 * images))
        return outputs


@pytest.fixture(autouse=True)
def imitated_cuda(monkeypatch):
    @contextlib.contextmanager
    def record(graph):
        Graph.current = graph
        try:
            yield
        finally:
            Graph.current = None

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)


def test_a_shape_is_recorded_once_and_replayed():
    network = Network()
    graphed = GraphedNetwork(network)
    pictures = [torch.randn(1, 3, 8, 8) for _ in range(4)]
    found = [graphed(picture)["double"] for picture in pictures]
    # Those of earlier pictures are not written over.
    for value, picture in zip(found, pictures):
        assert torch.equal(value, 2 * picture)
    assert network.calls == cuda_graphs._WARMUP_CALLS + 1


def test_shapes_layouts_and_types_have_graphs_of_their_own():
    network = Network()
    graphed = GraphedNetwork(network)
    first = torch.randn(1, 3, 8, 8)
    others = [first.to(memory_format=torch.channels_last), first.double(), torch.randn(2, 3, 8, 8)]
    for picture in [first, *others, first]:
        assert torch.equal(graphed(picture)["double"], 2 * picture)
    assert network.calls == 4 * (cuda_graphs._WARMUP_CALLS + 1)


def test_the_oldest_graph_is_dropped():
    network = Network()
    graphed = GraphedNetwork(network)
    widths = range(1, cuda_graphs.MAX_GRAPHS + 2)
    for width in [*widths, 2]:
        graphed(torch.randn(1, 3, 4, width))
    recordings = cuda_graphs.MAX_GRAPHS + 1
    assert network.calls == recordings * (cuda_graphs._WARMUP_CALLS + 1)
    graphed(torch.randn(1, 3, 4, 1))
    assert network.calls == (recordings + 1) * (cuda_graphs._WARMUP_CALLS + 1)


def test_a_network_that_waits_is_told_with_the_key():
    with pytest.raises(ValueError, match="CUDA_GRAPHS is True.*not permitted.*set CUDA_GRAPHS False"):
        GraphedNetwork(Network(waits=True))(torch.randn(1, 3, 8, 8))

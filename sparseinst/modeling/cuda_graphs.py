"""A network as CUDA graphs: one launch a picture in place of hundreds, which a small model waits for."""

from typing import NamedTuple

import torch

from sparseinst.modeling.compilation import Network

# Sizes whose graphs are kept; each holds its feature maps' memory.
MAX_GRAPHS = 8
# Before the capture: libraries choose their kernels, and compilers compile, at the first calls.
_WARMUP_CALLS = 3


class _Recorded(NamedTuple):
    """A graph, and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    images: torch.Tensor
    outputs: dict[str, torch.Tensor]


class GraphedNetwork:
    """Calls a network whose kernels are recorded at the first picture of each shape, and replayed from then on.

    Args:
        network: without a wait for the device, and with the same kernels for the same shape.

    Raises:
        ValueError: at the first call, of a network that waits for the device.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self._recorded: dict[tuple, _Recorded] = {}

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """The network's dict, in memory of its own."""
        key = (images.shape, images.stride(), images.dtype)
        if key not in self._recorded:
            if len(self._recorded) >= MAX_GRAPHS:
                self._recorded.pop(next(iter(self._recorded)))
            self._recorded[key] = self._record(images)
        recorded = self._recorded[key]
        recorded.images.copy_(images)
        recorded.graph.replay()
        # The next replay writes into the same memory.
        return {name: output.clone() for name, output in recorded.outputs.items()}

    def _record(self, images: torch.Tensor) -> _Recorded:
        static_images = images.clone()
        current = torch.cuda.current_stream(images.device)
        # A capture must not begin with what another stream still does.
        side = torch.cuda.Stream(images.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(_WARMUP_CALLS):
                self._network(static_images)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(images.device), torch.cuda.graph(graph):
                outputs = self._network(static_images)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(
                "MODEL.SPARSE_INST.INFERENCE.CUDA_GRAPHS is True, and the network cannot be recorded: "
                f"{error}. A part of it waits for the device; set CUDA_GRAPHS False"
            ) from error
        return _Recorded(graph, static_images, outputs)

"""OpenVINO as the engine of a network on the CPU."""

import threading
from collections.abc import Callable

import numpy as np
import torch
from torch import nn


class OpenVINONetwork:
    """Run a network on the CPU in OpenVINO, in float32, for images of any size, one image after the other.

    Args:
        network: images (B, 3, h, w) to a dict of tensors.
        example: images for the trace.

    Raises:
        ImportError: OpenVINO is not installed.
    """

    def __init__(self, network: Callable[[torch.Tensor], dict[str, torch.Tensor]], example: torch.Tensor) -> None:
        try:
            import openvino
        except ImportError as error:
            raise ImportError(
                f"RUNTIME.ENGINE openvino needs the package openvino, which cannot be imported ({error}). Install it: "
                "pip install 'sparseinst[openvino]', or pip install openvino"
            ) from error
        with torch.no_grad():
            self._names = list(network(example))
            program = openvino.convert_model(
                _Outputs(network, self._names),
                example_input=example,
                # With a dynamic batch size, OpenVINO 2026.4 returned a single image for graphs with Winograd's gathers.
                input=[openvino.PartialShape([1, example.shape[1], -1, -1])],
            )
        settings = {
            # OpenVINO's default is bfloat16 on processors that have it.
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        self._program = openvino.Core().compile_model(program, "CPU", settings)
        # One request for each thread: the program's own request would return another thread's answer.
        self._requests = threading.local()

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the network's dict in float32. Threads may call it at the same time."""
        if not hasattr(self._requests, "request"):
            self._requests.request = self._program.create_infer_request()
        request = self._requests.request
        # A copied input (share_inputs=False) corrupts the heap at dynamic sizes.
        results = [request.infer(image.contiguous().numpy(), share_inputs=True) for image in images.split(1)]
        return {
            name: torch.from_numpy(np.concatenate([result[index] for result in results]))
            for index, name in enumerate(self._names)
        }


class _Outputs(nn.Module):
    """A network that returns a tuple, because a trace cannot return a dict."""

    def __init__(self, network: Callable[[torch.Tensor], dict[str, torch.Tensor]], names: list[str]) -> None:
        super().__init__()
        self._network = network
        self._names = names

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = self._network(images)
        return tuple(outputs[name] for name in self._names)

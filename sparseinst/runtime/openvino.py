"""OpenVINO as the engine of a network on the CPU."""

import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from sparseinst.runtime.batches import in_batches

if TYPE_CHECKING:
    import openvino


def import_openvino() -> "openvino":
    """Return the module. Raise ImportError, which names the extra, where it cannot be imported."""
    try:
        import openvino
    except ImportError as error:
        raise ImportError(
            f"RUNTIME.ENGINE openvino needs the package openvino, which cannot be imported ({error}). Install it: "
            "pip install 'sparseinst[openvino]', or pip install openvino"
        ) from error
    return openvino


def convert_network(
    network: Callable[[torch.Tensor], dict[str, torch.Tensor]], example: torch.Tensor
) -> "openvino.Model":
    """Trace a network, and convert it to a program of OpenVINO for single images of any size.

    Args:
        network: images (B, 3, h, w) to a dict of tensors.
        example: images for the trace.

    Raises:
        ImportError: OpenVINO is not installed.
    """
    openvino = import_openvino()
    with torch.no_grad():
        names = list(network(example))
        program = openvino.convert_model(
            _Outputs(network, names),
            example_input=example,
            # With a dynamic batch size, OpenVINO 2026.4 returned a single image for graphs with Winograd's gathers.
            input=[openvino.PartialShape([1, example.shape[1], -1, -1])],
        )
    name_outputs(program, names)
    return program


def name_outputs(program: "openvino.Model", names: list[str]) -> None:
    """Give the outputs of a program the names of the network's dict, in place."""
    for output, name in zip(program.outputs, names, strict=True):
        output.get_tensor().set_names({name})


class OpenVINONetwork:
    """Run a program on the CPU in OpenVINO.

    Args:
        program: with one input, images; its outputs are named.
        threads: of one image; 0: as many as PyTorch has.
        precision: "float32", or "bfloat16" of everything that the program does not quantize.
        batch_size: images that the program takes; None: any number.

    Raises:
        ImportError: OpenVINO is not installed.
        ValueError: bfloat16, and the processor has no such instructions.
    """

    def __init__(
        self,
        program: "openvino.Model",
        threads: int = 0,
        precision: str = "float32",
        batch_size: int | None = None,
    ) -> None:
        core = import_openvino().Core()
        if precision == "bfloat16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise ValueError(
                "RUNTIME.PRECISION bfloat16 needs a processor with bfloat16 instructions (AVX-512 BF16 or AMX), and "
                "OpenVINO finds none here: set it to float32"
            )
        settings = {
            # OpenVINO's default is bfloat16 on processors that have it.
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bfloat16" else "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
            # A thread that is pinned to a core waits there for another program while the other cores are idle.
            "ENABLE_CPU_PINNING": False,
        }
        self._names = [output.get_any_name() for output in program.outputs]
        self._batch_size = batch_size
        self._program = core.compile_model(program, "CPU", settings)
        # One request for each thread: the program's own request would return another thread's answer.
        self._requests = threading.local()

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the network's dict. Threads may call it at the same time."""
        return in_batches(self._run, images, self._batch_size)

    def _run(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        if not hasattr(self._requests, "request"):
            self._requests.request = self._program.create_infer_request()
        # A copied input (share_inputs=False) corrupts the heap at dynamic sizes.
        results = self._requests.request.infer(images.cpu().contiguous().numpy(), share_inputs=True)
        return {name: torch.from_numpy(results[index]) for index, name in enumerate(self._names)}


def read_program(path: str | os.PathLike) -> "openvino.Model":
    """Read a program from an .xml file with its .bin file, or from an .onnx file.

    Raises:
        ImportError: OpenVINO is not installed.
        ValueError: the file cannot be read.
    """
    openvino = import_openvino()
    try:
        return openvino.Core().read_model(os.fspath(path))
    except RuntimeError as error:
        text = " ".join(str(error).split())[-300:]
        raise ValueError(f"OpenVINO cannot read the program {path}: {text}") from error


class _Outputs(nn.Module):
    """A network that returns a tuple, because a trace cannot return a dict."""

    def __init__(self, network: Callable[[torch.Tensor], dict[str, torch.Tensor]], names: list[str]) -> None:
        super().__init__()
        self._network = network
        self._names = names

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = self._network(images)
        return tuple(outputs[name] for name in self._names)

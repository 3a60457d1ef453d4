"""TensorRT as the engine of a network on a GPU. UNTESTED: no machine with TensorRT was available."""

import os
import threading
from types import ModuleType

import numpy as np
import torch

_MISSING = "TensorRT engines need the package tensorrt and a CUDA device; the package cannot be imported ({})"


def import_tensorrt() -> ModuleType:
    """Return the module. Raise ImportError where it is missing, ValueError without a CUDA device."""
    try:
        import tensorrt
    except ImportError as error:
        raise ImportError(f"{_MISSING.format(error)}. Install it: pip install tensorrt") from error
    if not torch.cuda.is_available():
        raise ValueError("TensorRT engines are built and run on a CUDA device, and PyTorch finds none")
    return tensorrt


def build_engine(onnx_model: bytes, shapes: tuple[tuple[int, ...], ...]) -> bytes:
    """Build a strongly typed engine: the precision is the ONNX model's. UNTESTED.

    Args:
        onnx_model: with one input.
        shapes: smallest, usual and largest shape of the input.

    Raises:
        ImportError: TensorRT is not installed.
        ValueError: PyTorch finds no CUDA device, or TensorRT cannot build the model.
    """
    tensorrt = import_tensorrt()
    logger = tensorrt.Logger(tensorrt.Logger.ERROR)
    builder = tensorrt.Builder(logger)
    network = builder.create_network(1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse(onnx_model):
        raise ValueError(f"TensorRT cannot read the ONNX model: {parser.get_error(0)}")
    options = builder.create_builder_config()
    # On by default, and less accurate than the self-check of float32 allows.
    options.clear_flag(tensorrt.BuilderFlag.TF32)
    profile = builder.create_optimization_profile()
    profile.set_shape(network.get_input(0).name, *shapes)
    options.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, options)
    if engine is None:
        raise ValueError("TensorRT cannot build an engine of the ONNX model; its log has the reason")
    return bytes(engine)


class TensorRTNetwork:
    """Run an engine on the current CUDA device, one image batch at a time. UNTESTED.

    Args:
        path: of the engine's file.

    Raises:
        ImportError: TensorRT is not installed.
        ValueError: PyTorch finds no CUDA device, or the engine was built for another version, GPU or size.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        tensorrt = import_tensorrt()
        with open(path, "rb") as file:
            self._engine = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.ERROR)).deserialize_cuda_engine(file.read())
        if self._engine is None:
            raise ValueError(f"TensorRT cannot read {path}: build it on this machine, with this version")
        self._names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self._dtypes = {
            name: getattr(torch, np.dtype(tensorrt.nptype(self._engine.get_tensor_dtype(name))).name)
            for name in self._names
        }
        # An execution context belongs to one thread.
        self._contexts = threading.local()

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the network's dict on the GPU. Threads may call it at the same time.

        Raises:
            ValueError: the engine was built for other sizes.
            RuntimeError: the GPU has too little memory, or TensorRT fails.
        """
        if not hasattr(self._contexts, "context"):
            created = self._engine.create_execution_context()
            if created is None:
                raise RuntimeError("TensorRT cannot create an execution context, mostly for lack of GPU memory")
            self._contexts.context = created
        context, stream = self._contexts.context, torch.cuda.current_stream()
        images = images.cuda().contiguous()
        input_name, *output_names = self._names
        if not context.set_input_shape(input_name, tuple(images.shape)):
            raise ValueError(f"The TensorRT engine was not built for images {tuple(images.shape)}: export it for them")
        context.set_tensor_address(input_name, images.data_ptr())
        outputs = {}
        for name in output_names:
            outputs[name] = torch.empty(tuple(context.get_tensor_shape(name)), dtype=self._dtypes[name], device="cuda")
            context.set_tensor_address(name, outputs[name].data_ptr())
        if not context.execute_async_v3(stream.cuda_stream):
            raise RuntimeError(f"TensorRT fails on images {tuple(images.shape)}; its log has the reason")
        stream.synchronize()
        return outputs

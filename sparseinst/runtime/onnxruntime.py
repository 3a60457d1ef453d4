"""ONNX Runtime as the engine of a network, on the CPU or on a GPU."""

import os
from collections.abc import Sequence

import torch

from sparseinst.runtime.batches import in_batches

CPU_PROVIDER = "CPUExecutionProvider"


class ONNXRuntimeNetwork:
    """Run an ONNX model in ONNX Runtime.

    Args:
        model: path of the file, or its bytes; one input, images.
        threads: of one image on the CPU; 0: as many as PyTorch has.
        providers: execution providers in the order of preference, such as "CUDAExecutionProvider". A rank of torchrun
            takes the GPU of its number.
        batch_size: images that the model takes; None: any number.

    Raises:
        ImportError: ONNX Runtime is not installed.
        ValueError: a provider is not available or does not start, or the model cannot be read.
    """

    def __init__(
        self,
        model: str | os.PathLike | bytes,
        threads: int = 0,
        providers: Sequence[str] = (CPU_PROVIDER,),
        batch_size: int | None = None,
    ) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError(
                f"ONNX models need the package onnxruntime, which cannot be imported ({error}). Install it: "
                "pip install 'sparseinst[onnx]', or pip install onnxruntime"
            ) from error
        available = onnxruntime.get_available_providers()
        missing = [provider for provider in providers if provider not in available]
        if missing or not providers:
            raise ValueError(
                f"RUNTIME.PROVIDERS is {list(providers)}; this onnxruntime has {', '.join(available)} "
                "(pip install onnxruntime-gpu has CUDA's)"
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        # Errors only: it warns of constants that it leaves on the CPU.
        options.log_severity_level = 3
        source = model if isinstance(model, bytes) else os.fspath(model)
        try:
            self._session = onnxruntime.InferenceSession(source, options, providers=with_options(providers))
        # Its own errors have no common class besides Exception.
        except Exception as error:
            name = "the model" if isinstance(model, bytes) else source
            raise ValueError(f"ONNX Runtime cannot read {name}: {' '.join(str(error).split())[:300]}") from error
        started = self._session.get_providers()
        if missing := [provider for provider in providers if provider not in started]:
            raise ValueError(
                f"RUNTIME.PROVIDERS is {list(providers)}; ONNX Runtime cannot start {', '.join(missing)} and would use "
                f"{', '.join(started)}. Its log names the reason, mostly a missing version of CUDA or cuDNN"
            )
        # By default a provider that fails on an image is replaced by the CPU's.
        self._session.disable_fallback()
        (images,) = self._session.get_inputs()
        self._input_name = images.name
        self._batch_size = batch_size
        self._names = [output.name for output in self._session.get_outputs()]

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the network's dict, on the CPU. Threads may call it at the same time.

        Raises:
            RuntimeError: ONNX Runtime fails on these images.
        """
        return in_batches(self._run, images, self._batch_size)

    def _run(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        inputs = {self._input_name: images.cpu().contiguous().numpy()}
        try:
            results = self._session.run(None, inputs)
        # Callers expect RuntimeError, which ONNX Runtime's errors are not.
        except Exception as error:
            raise RuntimeError(f"ONNX Runtime: {' '.join(str(error).split())[:300]}") from error
        return {name: torch.from_numpy(result) for name, result in zip(self._names, results)}


def with_options(providers: Sequence[str]) -> list[tuple[str, dict[str, int]]]:
    """Return the providers with their options: CUDA computes in float32, and a rank of torchrun has its own GPU."""
    rank = os.environ.get("LOCAL_RANK")
    # The default is the first GPU. More ranks than GPUs share them.
    gpu = {} if rank is None else {"device_id": int(rank) % (torch.cuda.device_count() or int(rank) + 1)}
    # The default is TF32. The option is untested: no machine with onnxruntime-gpu was available.
    options = {"CUDAExecutionProvider": {"use_tf32": 0, **gpu}, "TensorrtExecutionProvider": gpu}
    return [(name, options.get(name, {})) for name in providers]

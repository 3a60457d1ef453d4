"""Make a model faster for inference: evaluation, demo, Predictor and benchmark call `optimize_for_inference`.

Only `network` is rewritten, in this order: replace each module that has a method ``fuse() -> nn.Module`` by the equal,
cheaper module that it returns; fold norms into convolutions, then ask the modules that norms prevented again; use
Winograd convolutions; set layout and precision, or build another engine; compare the outputs for an example with the
model's.
"""

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import torch
from detectron2 import layers
from detectron2.config import CfgNode
from detectron2.structures import ImageList
from torch import nn

from sparseinst.config import check_value
from sparseinst.modeling.meta_arch import InstanceSegmenter, Network, OutputOptions, check_not_traced
from sparseinst.runtime.compile import compiled_for_inference
from sparseinst.runtime.output_difference import is_close
from sparseinst.runtime.rewrites.fuse import example_images, fused_copy, inference_copy
from sparseinst.runtime.rewrites.winograd import use_winograd

logger = logging.getLogger(__name__)

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class OptimizedSegmenter(nn.Module):
    """Wrap an InstanceSegmenter in eval mode, and run another callable in place of its network.

    Args:
        model: preprocesses and postprocesses.
        network: normalized, padded images (B, 3, h, w) to the dict of the model's network.
        precision: of the network.

    Attributes:
        precision: of the network, for reports.
    """

    def __init__(self, model: InstanceSegmenter, network: Network, precision: str = "float32") -> None:
        super().__init__()
        self.model = model
        self.precision = precision
        self._network = network
        self.eval()

    @property
    def device(self) -> torch.device:
        """Return the device of the model's tensors."""
        return self.model.device

    @property
    def class_names(self) -> Sequence[str] | None:
        """Return the names of the classes that the weights were trained on."""
        return self.model.class_names

    @property
    def output(self) -> OutputOptions:
        """Return the options of the model's predictions."""
        return self.model.output

    def output_as(self, **changes: Any) -> contextlib.AbstractContextManager:
        """Change fields of `output` inside a with statement; activation maps need the engine "torch"."""
        return self.model.output_as(**changes)

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """Predict as the model does in eval mode."""
        check_not_traced()
        images = self.preprocess(batched_inputs)
        return self.postprocess(self.network(images.tensor), batched_inputs, images)

    def preprocess(self, batched_inputs: list[dict]) -> ImageList:
        """Normalize and pad as the model does."""
        return self.model.preprocess(batched_inputs)

    def network(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what the model's network returns, computed as it was optimized."""
        with torch.inference_mode():
            return self._network(images)

    def postprocess(
        self, outputs: dict[str, torch.Tensor], batched_inputs: list[dict], images: ImageList
    ) -> list[dict]:
        """Postprocess as the model does."""
        return self.model.postprocess(outputs, batched_inputs, images)

    def example_outputs(
        self, outputs: dict[str, torch.Tensor], num_objects: int, median_area: float
    ) -> dict[str, torch.Tensor]:
        """Draw outputs as the model does."""
        return self.model.example_outputs(outputs, num_objects, median_area)

    def train(self, mode: bool = True) -> "OptimizedSegmenter":
        """Stay in eval mode, because folded norms cannot learn."""
        return super().train(False)


def optimize_for_inference(
    model: nn.Module,
    *,
    fuse: bool = True,
    channels_last: bool = True,
    winograd: bool = True,
    precision: str = "float32",
    compile: bool = False,
    engine: str = "torch",
    threads: int = 0,
    providers: Sequence[str] = ("CPUExecutionProvider",),
) -> nn.Module:
    """Return an optimized copy of the model that makes the same predictions.

    Args:
        model: an InstanceSegmenter on its device; not changed. Other models are returned as they are.
        fuse: fold norms into convolutions and replace modules by the result of their ``fuse()``; float32 results differ
            by rounding only.
        channels_last: feature maps in channels-last layout.
        winograd: wide 3x3 convolutions with a quarter of the multiplications; float32 results differ by about 1e-5.
            On the CPU, in float32, with ``fuse``, and with ``channels_last`` where the engine is PyTorch; ignored
            elsewhere.
        precision: "float32"; "bfloat16" or "float16": PyTorch's autocast, with the weights of convolutions and linear
            layers stored in that type, which saves their conversion for each image. "float16" on the CPU, where it is
            slower, is "float32" with a warning.
        compile: run the network through ``torch.compile``, which compiles for the first images' size, and once more for
            all sizes at the first other size. Without a C++ compiler one line in the log says so, and the network runs
            as it is.
        engine: "torch"; "openvino": OpenVINO on the CPU in float32 or bfloat16, compiled once for all sizes;
            "onnxruntime": ONNX Runtime in float32, after an export in memory, which takes seconds.
        threads: of "openvino" and "onnxruntime" for one image; 0: as many as PyTorch has.
        providers: of "onnxruntime", in the order of preference.

    Raises:
        ValueError: an unknown name, or options that exclude each other.
        ImportError: the engine's package is not installed.
    """
    check_value("RUNTIME.PRECISION", precision)
    check_value("RUNTIME.ENGINE", engine)
    if not isinstance(model, InstanceSegmenter):
        return model
    precisions = {"openvino": ("float32", "bfloat16"), "onnxruntime": ("float32",)}.get(engine, tuple(PRECISIONS))
    if engine != "torch" and (precision not in precisions or compile or model.device.type != "cpu"):
        raise ValueError(
            f"RUNTIME.ENGINE {engine} runs on the CPU in {' or '.join(precisions)}, without RUNTIME.COMPILE; set "
            f"MODEL.DEVICE cpu, PRECISION {precisions[0]} and COMPILE False, or ENGINE torch"
        )
    if precision == "float16" and model.device.type == "cpu":
        logger.warning("RUNTIME.PRECISION float16 is slower than float32 on a CPU, so float32 is used")
        precision = "float32"
    original, model = model, inference_copy(model)
    example = example_images(model)
    with torch.no_grad():
        expected = model.network(example)
    if fuse:
        model = fused_copy(model)
    is_plain_cpu = precision == "float32" and model.device.type == "cpu"
    # ONNX Runtime's own convolutions are as fast.
    if winograd and fuse and is_plain_cpu and (channels_last or engine != "torch") and engine != "onnxruntime":
        use_winograd(model)
    if engine != "torch":
        network = _engine_network(model, example, engine, threads, providers, precision)
    else:
        network = _torch_network(model, channels_last, PRECISIONS[precision])
    optimized = OptimizedSegmenter(model, network, precision)
    if not is_close(optimized.network(example), expected, original.ranks_instances, precision):
        logger.warning(
            "The optimized network (RUNTIME.ENGINE %s, PRECISION %s) does not return the model's numbers, so the "
            "model runs as it is",
            engine,
            precision,
        )
        model = inference_copy(original)
        return OptimizedSegmenter(model, model.network)
    if compile:
        # After the self-check, because a first run at the example's size would be compiled too, which takes a minute.
        compiled = compiled_for_inference(model.network)
        network = _torch_network(model, channels_last, PRECISIONS[precision], compiled)
        return OptimizedSegmenter(model, network, precision)
    return optimized


def optimize_as_configured(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """Call `optimize_for_inference` with the options of RUNTIME."""
    keys = cfg.RUNTIME
    return optimize_for_inference(
        model,
        fuse=keys.FUSE,
        channels_last=keys.CHANNELS_LAST,
        winograd=keys.WINOGRAD,
        precision=keys.PRECISION,
        compile=keys.COMPILE,
        engine=keys.ENGINE,
        threads=keys.INTRA_OP_THREADS,
        providers=keys.PROVIDERS,
    )


def _engine_network(
    model: InstanceSegmenter, example: torch.Tensor, engine: str, threads: int, providers: Sequence[str], precision: str
) -> Network:
    # Imported here, because most processes use neither engine.
    if engine == "openvino":
        from sparseinst.runtime.openvino import OpenVINONetwork, convert_network

        return OpenVINONetwork(convert_network(model.network, example), threads, precision, batch_size=1)
    from sparseinst.runtime import export
    from sparseinst.runtime.onnxruntime import ONNXRuntimeNetwork

    export.check_packages("onnx")
    rule = export.input_rule(model)
    program = export.export_program(export.ExportableNetwork(model), rule.divisibility, rule.fixed_size, None)
    if "CUDAExecutionProvider" in providers and export.has_deform_conv(program):
        logger.warning("RUNTIME.PROVIDERS %s: %s", list(providers), export.DEFORMABLE_NOTE)
    return ONNXRuntimeNetwork(export.onnx_bytes(program, list(model.network(example))), threads, providers)


def _torch_network(
    model: InstanceSegmenter, channels_last: bool, dtype: torch.dtype, network: Network | None = None
) -> Network:
    network = network or model.network
    if channels_last:
        model.to(memory_format=torch.channels_last)
    is_half = dtype != torch.float32
    if is_half:
        _store_weights_as(model, dtype)
    device_type = model.device.type

    def run(images: torch.Tensor) -> dict[str, torch.Tensor]:
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device_type, dtype=dtype) if is_half else contextlib.nullcontext():
            return network(images)

    return run


def _store_weights_as(model: nn.Module, dtype: torch.dtype) -> None:
    # Exact types only, because a subclass may compute with its weights before it uses them.
    for module in model.modules():
        if type(module) in (nn.Conv2d, layers.Conv2d, nn.Linear):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)

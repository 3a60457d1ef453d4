"""Quantize a network to INT8 after training: NNCF for OpenVINO, ONNX Runtime's static quantization (QDQ) for ONNX.

The layers that a model names in `float_layers`, and every operation that reads their results, stay in float32:
quantized activation maps and scores lose most of the AP. Both engines use 7 of the 8 bits of the weights, because
processors without VNNI (AVX2, early AVX-512) add products of 8 and 8 bits in 16 bits, which overflow.
"""

import contextlib
import hashlib
import itertools
import logging
import tempfile
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram

from sparseinst.modeling.meta_arch import InstanceSegmenter
from sparseinst.runtime.progress import WithProgress

if TYPE_CHECKING:
    import nncf
    import openvino

logger = logging.getLogger(__name__)

# Names in the lines of progress.
_CALIBRATION, _ERRORS = "Calibration images", "Errors of single layers"
_Node = TypeVar("_Node", bound=Hashable)
# The operations of layers, as each graph names them.
_TORCH_LAYERS = ("aten.conv2d", "aten.linear")
_OPENVINO_LAYERS = ("Convolution", "GroupConvolution", "MatMul")
_ONNX_LAYERS = ("Conv", "Gemm", "MatMul")
# In place of a layer's name: the sums of two activations, of residual blocks above all. Their errors add up.
ADDITIONS = "additions"
# Operations that ONNX Runtime quantizes. A product of two activations stays in float, and so do all others.
_ONNX_OPERATIONS = ["Conv", "Gemm", "MatMul", "Add", "Concat", "MaxPool", "AveragePool", "Resize", "Relu", "Clip"]


class Quantization(NamedTuple):
    """How a network is quantized.

    Attributes:
        model: whose network is exported, with folded norms (`fused_copy`).
        images: calibration images as the file takes them, each (B, 3, h, w).
        skipped: names of single layers that stay in float32, besides the model's `float_layers` and what follows them;
            ADDITIONS among them.
    """

    model: InstanceSegmenter
    images: Sequence[torch.Tensor]
    skipped: Collection[str] = ()


def float_layers(model: InstanceSegmenter) -> list[str]:
    """Return the full names of the layers that `InstanceSegmenter.float_layers` names."""
    return [
        name
        for name, module in model.named_modules()
        if hasattr(module, "weight") and set(name.split(".")) & set(model.float_layers)
    ]


def quantizable_layers(program: ExportedProgram, model: InstanceSegmenter) -> list[str]:
    """Return the names of convolutions and linear layers of a program that follow none of the float layers.

    Layers without a weight of their own are left out.
    """
    first = float_layers(model)

    def layer_of(node: torch.fx.Node) -> str:
        stack = node.meta.get("nn_module_stack") or {"": ("", None)}
        return list(stack.values())[-1][0].removeprefix("model.")

    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    tail = _followers((node for node in nodes if layer_of(node) in first), lambda node: node.users)
    layers = [node for node in nodes if node not in tail and any(name in str(node.target) for name in _TORCH_LAYERS)]
    # A module may pass a child's weight to F.linear, as timm's SwinV2: it has no weight to round or to find.
    modules = dict(model.named_modules())
    names = dict.fromkeys(map(layer_of, layers))
    return [name for name in names if isinstance(getattr(modules[name], "weight", None), torch.Tensor)]


def by_error(network: nn.Module, layers: Sequence[str], images: Sequence[torch.Tensor]) -> list[str]:
    """Order layers by the error of the network's outputs where this layer alone is quantized, the largest first.

    Args:
        network: ExportableNetwork of a model with folded norms.
        layers: names of the model's convolutions and linear layers.
        images: (B, 3, h, w) each, as the network takes them.
    """
    modules = dict(network.model.named_modules())
    errors = dict.fromkeys(layers, 0.0)
    with torch.inference_mode():
        expected = [network(batch) for batch in images]
        for name, (batch, outputs) in WithProgress(list(itertools.product(layers, zip(images, expected))), _ERRORS):
            with _quantized(modules[name]):
                found = network(batch)
            errors[name] += sum(_relative_error(found[key], value) for key, value in outputs.items())
    return sorted(layers, key=errors.get, reverse=True)


@contextlib.contextmanager
def _quantized(layer: nn.Module) -> Iterator[None]:
    """Round the input of a layer to 256 values, and each filter of its weight to 127, in a with statement."""
    weight = layer.weight.data

    def round_input(_, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        low, high = (float(value) for value in (inputs[0].min().clamp(max=0), inputs[0].max().clamp(min=0)))
        scale = (high - low) / 255 or 1.0
        return (torch.fake_quantize_per_tensor_affine(inputs[0], scale, round(-low / scale), 0, 255),)

    scales = weight.flatten(1).abs().amax(1).clamp(min=1e-12) / 63
    zeros = torch.zeros(len(scales), dtype=torch.int32)
    handle = layer.register_forward_pre_hook(round_input)
    layer.weight.data = torch.fake_quantize_per_channel_affine(weight, scales, zeros, 0, -63, 63)
    try:
        yield
    finally:
        layer.weight.data = weight
        handle.remove()


def _relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).square().sum() / expected.square().sum().clamp(min=1e-12))


def import_nncf() -> "nncf":
    """Return the module. Raise ImportError, which names the extra, where it cannot be imported."""
    try:
        import nncf
    except ImportError as error:
        raise ImportError(
            f"--format openvino --precision int8 needs the package nncf, which cannot be imported ({error}). Install "
            "it: pip install 'sparseinst[int8]', or pip install nncf"
        ) from error
    return nncf


def quantize_openvino(program: "openvino.Model", quantization: Quantization) -> "openvino.Model":
    """Return a quantized program.

    Args:
        program: with one input, converted from ``quantization.model``.
        quantization: layers, and images to measure the ranges of activations with.

    Raises:
        ImportError: NNCF is not installed.
        ValueError: a layer of `float_layers` is not in the program, or NNCF fails.
    """
    nncf = import_nncf()
    layers = _LayerFinder(quantization)
    operations = {}
    for operation in program.get_ordered_ops():
        operations[operation.get_friendly_name()] = operation
        for value in operation.input_values() if operation.get_type_name() in _OPENVINO_LAYERS else ():
            if value.get_node().get_type_name() == "Constant":
                layers.note(operation.get_friendly_name(), value.get_node().data)

    def readers(name: str) -> Iterable[str]:
        return (
            target.get_node().get_friendly_name()
            for output in operations[name].outputs()
            for target in output.get_target_inputs()
        )

    ignored = _followers(layers.float_nodes(), readers) | layers.skipped_nodes()
    types = ["Add"] if ADDITIONS in quantization.skipped else []
    nncf.set_log_level(logging.ERROR)
    with _errors_of("NNCF"):
        return nncf.quantize(
            program,
            nncf.Dataset(WithProgress([images.numpy() for images in quantization.images], _CALIBRATION)),
            subset_size=len(quantization.images),
            ignored_scope=nncf.IgnoredScope(names=sorted(ignored), types=types, validate=False),
            advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE),
        )


def quantize_onnx(content: bytes, input_name: str, quantization: Quantization) -> bytes:
    """Return a quantized ONNX model in QDQ format.

    Args:
        content: ONNX model, converted from ``quantization.model``.
        input_name: of the images.
        quantization: layers, and images to measure the ranges of activations with.

    Raises:
        ValueError: a layer of `float_layers` is not in the model, or ONNX Runtime fails.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    proto = onnx.load_model_from_string(content)
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    layers, users = _LayerFinder(quantization), {}
    for index, node in enumerate(proto.graph.node):
        node.name = node.name or f"node_{index}"
        for name in node.input:
            users.setdefault(name, []).append(node.name)
            if node.op_type in _ONNX_LAYERS and name in values:
                layers.note(node.name, values[name])
    nodes = {node.name: node for node in proto.graph.node}

    def readers(name: str) -> Iterable[str]:
        # A shape carries no values: what is computed from it, such as coordinates, does not follow the layer.
        if nodes[name].op_type in ("Shape", "Size"):
            return ()
        return (reader for output in nodes[name].output for reader in users.get(output, ()))

    convolutions = (name for name, node in nodes.items() if node.op_type == "Conv")
    others = nodes.keys() - _followers(convolutions, readers)
    ignored = _followers(layers.float_nodes(), readers) | layers.skipped_nodes() | others

    class Reader(CalibrationDataReader):
        images = iter(WithProgress(quantization.images, _CALIBRATION))

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.images, None)
            return None if image is None else {input_name: image.numpy()}

    operations = [name for name in _ONNX_OPERATIONS if name != "Add" or ADDITIONS not in quantization.skipped]
    with tempfile.TemporaryDirectory() as folder, _errors_of("ONNX Runtime"):
        path = Path(folder) / "model.onnx"
        quantize_static(
            proto,
            path,
            Reader(),
            op_types_to_quantize=operations,
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            nodes_to_exclude=sorted(ignored),
            extra_options={"MatMulConstBOnly": True},
        )
        return path.read_bytes()


@contextlib.contextmanager
def _errors_of(engine: str) -> Iterator[None]:
    """Raise ValueError in one line for the errors of an engine's quantization, which have no common class."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(
            f"{engine} cannot quantize the network: {reason}. Export with --precision float32 or float16"
        ) from error


class _LayerFinder:
    """Find the nodes of a model's layers in another engine's graph by their weights, because names change."""

    def __init__(self, quantization: Quantization) -> None:
        self._quantization = quantization
        self._layers: dict[bytes, str] = {}
        self._nodes: dict[str, list[str]] = {}
        for name, module in quantization.model.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, torch.Tensor):
                values = weight.detach().numpy()
                self._layers |= {_digest(values): name, _digest(values.T): name}

    def note(self, node: str, weight: np.ndarray) -> None:
        """Note a node and its weight."""
        layer = self._layers.get(_digest(weight))
        if layer is not None:
            self._nodes.setdefault(layer, []).append(node)

    def float_nodes(self) -> list[str]:
        """Return the nodes of `float_layers`. Raise ValueError where one was not noted."""
        names = float_layers(self._quantization.model)
        missing = [name for name in names if name not in self._nodes]
        if missing:
            raise ValueError(f"The layers {', '.join(missing)}, which stay in float32, are not in the exported network")
        return [node for name in names for node in self._nodes[name]]

    def skipped_nodes(self) -> set[str]:
        """Return the nodes of the skipped layers, and warn of a layer that was not noted."""
        names = set(self._quantization.skipped) - {ADDITIONS}
        if missing := sorted(names - self._nodes.keys()):
            logger.warning("Quantized, because the exported network has no such weight: %s", ", ".join(missing))
        return {node for name in names for node in self._nodes.get(name, ())}


def _digest(values: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(values, np.float32).tobytes()).digest()


def _followers(starts: Iterable[_Node], readers: Callable[[_Node], Iterable[_Node]]) -> set[_Node]:
    """Return the nodes, and all that read their results, directly or not."""
    found: set[_Node] = set()
    waiting = list(starts)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(readers(node))
    return found

"""Export the network of a model: torch.export, then the format of another engine."""

import contextlib
import hashlib
import importlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from sparseinst.modeling.meta_arch import InstanceSegmenter
from sparseinst.runtime.exported_file import METADATA_KEY, ExportMetadata
from sparseinst.runtime.openvino import import_openvino, name_outputs
from sparseinst.runtime.quantize import Quantization, quantize_onnx, quantize_openvino

if TYPE_CHECKING:
    import onnx
    import openvino

FileWriter = Callable[[Path, ExportMetadata], None]
INPUT_NAME = "images"
# ONNX Runtime's CPU kernels have DeformConv from opset 19 on; CUDA's lack Resize of 19.
OPSET, DEFORMABLE_OPSET = 18, 19
# The first PyTorch whose exporter takes translations of operators.
ONNX_TORCH = "2.6"
DEFORMABLE_NOTE = (
    "deformable convolutions need ONNX of opset 19, whose Resize ONNX Runtime has no CUDA kernel for: use "
    "CPUExecutionProvider, or OpenVINO (for a file, export with --format openvino)"
)
# Smallest side of dynamic images, in multiples of the divisibility; smaller maps have no bilinear neighbors.
MIN_CELLS = 2
# Sides of the example of dynamic images, in the same multiples: maps with one row, as of SOLO, would be frozen.
EXAMPLE_CELLS = (4, 5)
# Smaller tensors stay in float32 in an ONNX file of float16: they take no space.
_MIN_HALF_VALUES = 1024


class Format(NamedTuple):
    """A format of exported files.

    Attributes:
        file_name: of the file below the output folder.
        precisions: that can be exported.
        end_to_end: whether the post-processing can be exported too.
    """

    file_name: str
    precisions: tuple[str, ...]
    end_to_end: bool


FORMATS = {
    "onnx": Format("model.onnx", ("float32", "float16", "int8"), True),
    "openvino": Format("model_openvino/model.xml", ("float32", "float16", "int8"), True),
    "torch": Format("model.pt2", ("float32",), False),
    "tensorrt": Format("model.engine", ("float32",), False),
}


def check_packages(format: str) -> None:
    """Check that a format can be written and run here.

    Raises:
        ImportError: a package is missing, or PyTorch is too old.
        ValueError: TensorRT without a CUDA device.
    """
    if format == "tensorrt":
        from sparseinst.runtime.tensorrt import import_tensorrt

        import_tensorrt()
    if format == "openvino":
        import_openvino()
    if format in ("onnx", "tensorrt"):
        if torch.__version__ < ONNX_TORCH:
            raise ImportError(
                f"An export to ONNX needs PyTorch {ONNX_TORCH} or later, and {torch.__version__} is installed: update "
                "torch and torchvision"
            )
        # The exporter of PyTorch needs onnxscript, the self-check onnxruntime.
        names = ["onnx", "onnxscript", *(["onnxruntime"] if format == "onnx" else [])]
        try:
            for name in names:
                importlib.import_module(name)
        except ImportError as error:
            raise ImportError(
                f"An export to ONNX needs the packages {', '.join(names)} ({error}). Install them: pip install "
                "'sparseinst[onnx]'"
            ) from error


class ExportableNetwork(nn.Module):
    """The network of a model as a module whose only input is the images.

    Args:
        model: in eval mode.
        takes_pixels: normalize the images, uint8 in [0, 255], first.
        max_detections: post-process to as many detections by the model's `dense_detections`; 0: return its outputs.
    """

    def __init__(self, model: InstanceSegmenter, takes_pixels: bool = False, max_detections: int = 0) -> None:
        super().__init__()
        self.model = model
        self.takes_pixels = takes_pixels
        self.max_detections = max_detections

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the network's dict, or that of `dense_detections`."""
        images = self.normalized(images)
        outputs = self.model.network(images)
        if self.max_detections:
            outputs = self.model.dense_detections(outputs, tuple(images.shape[-2:]), self.max_detections)
        return outputs

    def normalized(self, images: torch.Tensor) -> torch.Tensor:
        """Return the images as the model's network takes them."""
        return (images.float() - self.model.pixel_mean) / self.model.pixel_std if self.takes_pixels else images


class InputRule(NamedTuple):
    """The sizes that a model's `preprocess` makes.

    Attributes:
        divisibility: sides are multiples of this; 0 where the size is fixed.
        fixed_size: (height, width) where every image gets this size.
    """

    divisibility: int
    fixed_size: tuple[int, int] | None = None


def input_rule(model: InstanceSegmenter) -> InputRule:
    """Find the sizes that a model's `preprocess` makes by two small images."""

    def padded(height: int, width: int) -> tuple[int, int]:
        image = torch.zeros((len(model.pixel_mean), height, width), dtype=torch.uint8)
        return tuple(model.preprocess([{"image": image}]).tensor.shape[-2:])

    height, width = padded(1, 1)
    # A square model would be named divisible by its side.
    if height == width and padded(1, height + 1) == (height, 2 * height):
        return InputRule(height)
    return InputRule(0, (height, width))


def export_program(
    network: ExportableNetwork, divisibility: int, size: Sequence[int] | None, batch: int | None
) -> ExportedProgram:
    """Export a network by torch.export, on the CPU.

    Args:
        network: in eval mode, on the CPU.
        divisibility: of dynamic sides.
        size: (height, width) of all images; None: dynamic.
        batch: number of images; None: dynamic.

    Raises:
        ValueError: torch.export fails; the message has its first line.
    """
    dims: dict[int, object] = {}
    if batch is None:
        dims[0] = Dim("batch")
    if size is None:
        rows, columns = Dim("rows", min=MIN_CELLS), Dim("columns", min=MIN_CELLS)
        dims |= {2: divisibility * rows, 3: divisibility * columns}
        size = tuple(cells * divisibility for cells in EXAMPLE_CELLS)
    # A batch of 1 would be frozen.
    example = example_images(network, batch or 2, size)
    try:
        with torch.no_grad(), _quiet():
            return torch.export.export(network, (example,), dynamic_shapes=(dims or None,))
    # torch.export has errors of many classes.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"torch.export cannot export the network: {type(error).__name__}: {reason[:300]}") from error


def example_images(network: ExportableNetwork, batch: int, size: Sequence[int], seed: int = 0) -> torch.Tensor:
    """Return random images (batch, channels, *size) of the type that the network takes."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, len(network.model.pixel_mean), *size)
    if network.takes_pixels:
        return torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    return torch.randn(shape, generator=generator)


def has_deform_conv(program: ExportedProgram) -> bool:
    """Return whether a program has deformable convolutions."""
    return any("deform_conv2d" in str(node.target) for node in program.graph.nodes)


def weights_sha256(model: nn.Module) -> str:
    """Return the SHA-256 of a model's tensors and their names."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def converter(
    format: str, program: ExportedProgram, names: list[str], precision: str, shapes: tuple[tuple[int, ...], ...]
) -> Callable[[Quantization | None], FileWriter]:
    """Convert a program, and return a function that quantizes it, which may be called again with other layers.

    Args:
        format: key of FORMATS.
        program: of `export_program`.
        names: of the outputs.
        precision: one of the format's.
        shapes: smallest, usual and largest shape of the images, which TensorRT asks for.

    Returns:
        A function of the quantization (precision "int8", the model of ``program``; otherwise None). The function
        returns another, which writes the file with metadata to a path and may be called again.

    Raises:
        ImportError: the format needs a package that is not installed.
        ValueError: the conversion fails.
    """
    if format == "onnx":
        content = onnx_bytes(program, names, precision)
        return lambda quantization: _onnx_writer(
            content if quantization is None else quantize_onnx(content, INPUT_NAME, quantization)
        )
    if format == "openvino":
        model = _openvino_model(program, names)
        return lambda quantization: _openvino_writer(
            model if quantization is None else quantize_openvino(model.clone(), quantization), precision
        )
    if format == "tensorrt":
        from sparseinst.runtime.tensorrt import build_engine

        engine = build_engine(onnx_bytes(program, names), shapes)
        return lambda _: lambda path, metadata: _write_tensorrt(path, engine, metadata)

    def write(path: Path, metadata: ExportMetadata) -> None:
        # On a full disk PyTorch's own writer ends the process.
        content = io.BytesIO()
        with _quiet():
            torch.export.save(program, content, extra_files={METADATA_KEY: metadata.to_json()})
        path.write_bytes(content.getbuffer())

    return lambda _: write


def onnx_bytes(program: ExportedProgram, names: list[str], precision: str = "float32") -> bytes:
    """Convert a program to ONNX; see `check_packages`."""
    import onnx

    is_deformable = has_deform_conv(program)
    try:
        with torch.no_grad(), _quiet():
            converted = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=DEFORMABLE_OPSET if is_deformable else OPSET,
                input_names=[INPUT_NAME],
                output_names=names,
                verbose=False,
                custom_translation_table=_translations(),
            )
    except torch.onnx.OnnxExporterError as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise ValueError(f"PyTorch cannot convert the network to ONNX: {reason}") from error
    proto = converted.model_proto
    if precision == "float16":
        _store_as_half(proto.graph)
    # Positions in the sources of the person who exports.
    for node in proto.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    onnx.checker.check_model(proto)
    return proto.SerializeToString()


def _translations() -> dict:
    """Return the translations of operators that PyTorch's exporter lacks, or translates to inaccurate kernels."""
    from onnxscript import opset18, opset19

    def sigmoid(logits):
        # ONNX Runtime's Sigmoid has an error of 1e-7, which is large for the small values of activation maps: scores of
        # R50 G-IAM with random weights changed by 4e-4 at 320x448 pixels, and by 2e-6 with this.
        return opset18.Reciprocal(opset18.Add(opset18.Exp(opset18.Neg(logits)), opset18.Constant(value_float=1.0)))

    def deform_conv2d(
        images, weight, offset, mask, bias, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
        num_weight_groups, num_offset_groups, use_mask,
    ):  # fmt: skip
        return opset19.DeformConv(
            images,
            weight,
            offset,
            bias,
            mask if use_mask else None,
            dilations=[dilation_h, dilation_w],
            group=num_weight_groups,
            kernel_shape=list(weight.shape[2:]),
            offset_group=num_offset_groups,
            pads=[pad_h, pad_w, pad_h, pad_w],
            strides=[stride_h, stride_w],
        )

    aten, torchvision = torch.ops.aten, torch.ops.torchvision
    return {aten.sigmoid.default: sigmoid, torchvision.deform_conv2d.default: deform_conv2d}


def _store_as_half(graph: "onnx.GraphProto") -> None:
    """Store the large float32 tensors of an ONNX graph in float16, in place; the graph converts them back."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for tensor in graph.initializer:
        values = numpy_helper.to_array(tensor)
        if tensor.data_type != TensorProto.FLOAT or values.size < _MIN_HALF_VALUES:
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}_float16"))
        casts.append(helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _onnx_writer(content: bytes) -> FileWriter:
    import onnx

    def write(path: Path, metadata: ExportMetadata) -> None:
        proto = onnx.load_model(io.BytesIO(content))
        proto.producer_name, proto.producer_version = "sparseinst", metadata.version
        onnx.helper.set_model_props(proto, {METADATA_KEY: metadata.to_json()})
        path.write_bytes(proto.SerializeToString())

    return write


def _openvino_model(program: ExportedProgram, names: list[str]) -> "openvino.Model":
    openvino = import_openvino()
    try:
        with _quiet():
            # From the program of torch.export: deformable convolutions of ONNX end the process.
            model = openvino.convert_model(program)
    # Its errors have no common class.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"OpenVINO cannot convert the network: {reason}") from error
    name_outputs(model, names)
    model.inputs[0].get_tensor().set_names({INPUT_NAME})
    return model


def _openvino_writer(model: "openvino.Model", precision: str) -> FileWriter:
    openvino = import_openvino()

    def write(path: Path, metadata: ExportMetadata) -> None:
        model.set_rt_info(metadata.to_json(), METADATA_KEY)
        try:
            openvino.save_model(model, path, compress_to_fp16=precision == "float16")
        except RuntimeError as error:
            # For example "basic_ios::clear: iostream error" on a full disk.
            raise OSError(f"OpenVINO fails, {' '.join(str(error).split())}") from error

    return write


def _write_tensorrt(path: Path, engine: bytes, metadata: ExportMetadata) -> None:
    path.write_bytes(engine)
    path.with_name(f"{path.name}.json").write_text(metadata.to_json(), encoding="utf-8")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the warnings of the exporters, which are for their developers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, level in zip(loggers, levels):
            each.setLevel(level)

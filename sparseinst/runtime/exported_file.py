"""Read and write the description of an exported file: JSON in the metadata of each format."""

import dataclasses
import functools
import json
import os
import types
import typing
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from sparseinst.runtime.openvino import read_program

# Engines by the ending of the file.
ENGINES = {".onnx": "onnxruntime", ".xml": "openvino", ".pt2": "torch", ".engine": "tensorrt"}
# Key of the JSON in the file's metadata.
METADATA_KEY = "sparseinst"
# Field numbers of ONNX's ModelProto and StringStringEntryProto (onnx.proto).
_METADATA_PROPS, _KEY, _VALUE = 14, 1, 2
# Wire types of protobuf: 64-bit, length-delimited, 32-bit.
_FIXED_BYTES, _DELIMITED = {1: 8, 5: 4}, 2
_MAX_METADATA_BYTES = 2**24
_CUT_OFF = "it is not an ONNX file, or it is cut off"


@dataclasses.dataclass(frozen=True)
class ExportMetadata:
    """Everything besides the network that predictions need, and where the file comes from.

    Attributes:
        meta_architecture: MODEL.META_ARCHITECTURE.
        config: the whole config as YAML, without MODEL.WEIGHTS.
        class_names: of the classes, in the order of the class logits.
        category_ids: of the data set, one for each class.
        input: "normalized": float32 images, normalized and padded by zeros; "image": uint8 images in [0, 255], padded
            by the rounded mean.
        channel_order: "RGB" or "BGR".
        pixel_mean, pixel_std: per channel, in [0, 255].
        size_divisibility: the sides of the padded images are multiples of this.
        size: (height, width) of the padded images; None: dynamic.
        batch: images in a batch; None: dynamic.
        short_side, long_side: images are resized to this short side, or to a smaller one where the long side would be
            larger than this; pixels. With ``fit_size`` or ``size`` they are resized to the largest size that fits.
        outputs: names of the network's outputs.
        postprocessing: thresholds and limits of the model's post-processing by name.
        max_detections: with ``--end-to-end``, detections in the outputs; 0: the outputs are the network's.
        precision: "float32"; "float16": the file holds weights in float16; "int8": the network is quantized.
        has_deform_conv: whether the network has deformable convolutions.
        weights_sha256: of the model's tensors.
        version: of this package.
        postprocessing_weights: float32 tensors that the post-processing needs, by name in the model, as base64.
        self_check: largest difference from the model in eager float32 over the largest value, by output; "bound", the
            largest difference that is allowed; with ``--end-to-end`` also "mask_bound", that of "worst_mask";
            "compared_share", the least share of the instances that were compared, where it is not 1.
        compared_detections: with ``--end-to-end``, detections whose classes, masks and boxes the self-check compared;
            0: the model found nothing certain in its images.
        ap: with ``--test-json``, mask AP in percent of the "model" in eager float32 and of the "file".
        skipped_layers: with "int8", layers, and "additions", that stay in float32 because they lose AP.
        min_side: of padded images of dynamic size, pixels; shorter sides are padded to it. 0: of a static file.
        max_batch: most images in a dynamic batch; None: any number.
        fit_size: (height, width), INPUT.FIT_SIZE_TEST: images are resized to the largest size that fits into this;
            None: by ``short_side`` and ``long_side``. Files of earlier versions lack it.
    """

    meta_architecture: str
    config: str
    class_names: Sequence[str]
    category_ids: Sequence[int]
    input: str
    channel_order: str
    pixel_mean: Sequence[float]
    pixel_std: Sequence[float]
    size_divisibility: int
    size: Sequence[int] | None
    batch: int | None
    short_side: int
    long_side: int
    outputs: Sequence[str]
    postprocessing: dict[str, Any]
    max_detections: int
    precision: str
    has_deform_conv: bool
    weights_sha256: str
    version: str
    postprocessing_weights: dict[str, str] = dataclasses.field(default_factory=dict)
    self_check: dict[str, float] = dataclasses.field(default_factory=dict)
    compared_detections: int | None = None
    ap: dict[str, float] = dataclasses.field(default_factory=dict)
    skipped_layers: Sequence[str] = dataclasses.field(default_factory=list)
    min_side: int = 0
    max_batch: int | None = None
    fit_size: Sequence[int] | None = None

    def to_json(self) -> str:
        """Return the JSON that `read_metadata` reads."""
        return json.dumps(dataclasses.asdict(self))


def is_exported(weights: str | os.PathLike) -> bool:
    """Return whether MODEL.WEIGHTS names an exported file, by its ending."""
    return Path(weights).suffix in ENGINES


def read_metadata(path: str | os.PathLike) -> ExportMetadata:
    """Read the metadata of an exported file.

    Raises:
        ValueError: the file does not exist or cannot be read, or `sparseinst export` did not write it.
        ImportError: OpenVINO's format, and OpenVINO is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"MODEL.WEIGHTS names {str(path)!r}, which does not exist")
    try:
        text = _READERS[path.suffix](path)
    except (OSError, EOFError, KeyError, UnicodeDecodeError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error or type(error).__name__}") from error
    foreign = f"{path} has no metadata of `sparseinst export`: export the model again by that command"
    if text is None:
        raise ValueError(foreign)
    try:
        metadata = ExportMetadata(**json.loads(text))
        for name, hint in typing.get_type_hints(ExportMetadata).items():
            if not _is_of_type(getattr(metadata, name), hint):
                raise ValueError(f"{name} is {repr(getattr(metadata, name))[:100]}")
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{foreign} of this version ({error})") from error
    return metadata


def _is_of_type(value: object, hint: Any) -> bool:
    """Return whether a value from JSON fits the type of a field of ExportMetadata."""
    inner = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return any(_is_of_type(value, each) for each in inner)
    if typing.get_origin(hint) is dict:
        return isinstance(value, dict) and all(_is_of_type(each, inner[1]) for each in value.values())
    if inner:
        return isinstance(value, list) and all(_is_of_type(each, inner[0]) for each in value)
    return hint is Any or type(value) is hint or (hint is float and type(value) is int)


def _read_onnx(path: Path) -> str | None:
    """Return the entry of ONNX's metadata_props, without the package onnx, and without reading the weights."""
    with path.open("rb") as file:
        size = path.stat().st_size
        while file.tell() < size:
            number, length = _read_field(file)
            if file.tell() + length > size:
                raise EOFError(_CUT_OFF)
            if number != _METADATA_PROPS or length > _MAX_METADATA_BYTES:
                file.seek(length, os.SEEK_CUR)
                continue
            end, entry = file.tell() + length, {}
            while file.tell() < end:
                inner, inner_length = _read_field(file)
                if inner_length > length:
                    raise EOFError(_CUT_OFF)
                entry[inner] = file.read(inner_length)
            if entry.get(_KEY) == METADATA_KEY.encode():
                return entry.get(_VALUE, b"").decode()
    return None


def _read_field(file: BinaryIO) -> tuple[int, int]:
    """Read a protobuf field's key; return its number and the bytes that follow, 0 for a number, which is read."""
    key = _read_varint(file)
    number, wire_type = key >> 3, key & 7
    if wire_type == _DELIMITED:
        return number, _read_varint(file)
    if wire_type == 0:
        _read_varint(file)
        return number, 0
    if wire_type not in _FIXED_BYTES:
        raise KeyError("it is not an ONNX file")
    return number, _FIXED_BYTES[wire_type]


def _read_varint(file: BinaryIO) -> int:
    value = shift = 0
    while True:
        byte = file.read(1)
        if not byte or shift > 63:
            raise EOFError(_CUT_OFF)
        value |= (byte[0] & 0x7F) << shift
        shift += 7
        if byte[0] < 0x80:
            return value


def _read_openvino(path: Path) -> str | None:
    stat = path.stat()
    return _openvino_text(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=4)
def _openvino_text(path: Path, *stamp: int) -> str | None:
    """Read the metadata of a file with this time and size; a Predictor asks for them three times."""
    program = read_program(path)
    return program.get_rt_info(METADATA_KEY).astype(str) if program.has_rt_info(METADATA_KEY) else None


def _read_torch(path: Path) -> str | None:
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(f"extra/{METADATA_KEY}")]
        return archive.read(names[0]).decode() if names else None


def _read_tensorrt(path: Path) -> str | None:
    beside = path.with_name(f"{path.name}.json")
    return beside.read_text(encoding="utf-8") if beside.is_file() else None


_READERS = {".onnx": _read_onnx, ".xml": _read_openvino, ".pt2": _read_torch, ".engine": _read_tensorrt}

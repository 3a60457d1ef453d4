"""What a safetensors file claims, held against the file before its library maps it."""

import json
import math
from pathlib import Path

_ELEMENT_SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
    "U8": 1, "BOOL": 1, "C64": 8, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


def check_safetensors_claims(path: Path) -> None:
    """Check that the header, and every tensor that it lists, is as long as it says and within the file.

    Raises:
        ValueError: it is not.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise ValueError(f"its header claims {length} bytes, and {size - 8} follow")
        try:
            header = json.loads(file.read(length))
        except RecursionError as error:
            raise ValueError("its header is nested too deeply") from error
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    for name, entry in header.items():
        if name != "__metadata__":
            _check_tensor(name[:100], entry, size - 8 - length)


def _check_tensor(name: str, entry: object, num_bytes: int) -> None:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"the tensor {name!r} has no dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ELEMENT_SIZES:
        raise ValueError(f"the tensor {name!r} has dtype {str(dtype)[:50]!r}; known are {', '.join(_ELEMENT_SIZES)}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(number) is int and 0 <= number < 2**62 for number in numbers):
            raise ValueError(f"the shape or the data_offsets of the tensor {name!r} are no list of whole numbers")
    if len(offsets) != 2 or not offsets[0] <= offsets[1] <= num_bytes:
        raise ValueError(f"the tensor {name!r} is not within the file's {num_bytes} bytes of data")
    if (claimed := math.prod(shape) * _ELEMENT_SIZES[dtype]) != offsets[1] - offsets[0]:
        raise ValueError(f"the tensor {name!r} claims {claimed} bytes, and has {offsets[1] - offsets[0]}")

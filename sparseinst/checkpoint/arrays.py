"""Pickles of numpy arrays, as Caffe2's and Detectron2's weights are."""

import math
import pickle
import re
from collections import OrderedDict
from typing import BinaryIO

import numpy as np

from sparseinst.checkpoint.pickles import CodeNeededError, DataUnpickler, Name, checked_dict, checked_set

_PLAIN_TYPE = re.compile(r"[fiubc]\d{1,2}")


class _Type:
    """A numpy dtype of plain numbers, while it is read."""

    def __init__(self, code: str, *_: object) -> None:
        if not isinstance(code, str) or not _PLAIN_TYPE.fullmatch(code):
            # The text of a dtype can be as long as a file.
            raise CodeNeededError(f"it has an array of type {str(code)[:50]}")
        self.code = code
        self.byte_order = "="

    def numpy(self) -> np.dtype:
        return np.dtype(self.byte_order + self.code)


class ArrayUnpickler(DataUnpickler):
    """Knows numpy's arrays and numbers, of plain types, besides what every pickle may have."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        super().__init__(file, size)
        makers = {
            ("collections", "OrderedDict"): lambda items=(): checked_dict(items),
            ("_codecs", "encode"): self._encode,
            ("numpy", "ndarray"): None,
            ("numpy", "dtype"): _Type,
        }
        # Python 2 had another name; protocols 0 to 2 call bytes where there are none.
        for builtins in ("builtins", "__builtin__"):
            makers[builtins, "set"] = checked_set
            makers[builtins, "bytes"] = lambda: b""
        # numpy 2 moved numpy.core to numpy._core; files have either.
        for core in ("numpy.core", "numpy._core"):
            makers[f"{core}.multiarray", "_reconstruct"] = lambda *_: np.zeros(0, np.uint8)
            makers[f"{core}.multiarray", "scalar"] = self._number_of
            makers[f"{core}.numeric", "_frombuffer"] = self._array_of
        self._names = {names: Name(".".join(names), maker) for names, maker in makers.items()}

    def find(self, module: str, name: str) -> Name:
        if (module, name) not in self._names:
            raise CodeNeededError(f"it names {module}.{name}")
        return self._names[module, name]

    def build(self, made: object, state: object) -> None:
        if isinstance(made, _Type):
            # (version, byte order, ...); the rest is for types that are not plain.
            if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
                raise pickle.UnpicklingError("a dtype without a byte order")
            made.byte_order = state[1]
        elif isinstance(made, np.ndarray):
            if not isinstance(state, tuple) or len(state) != 5:
                raise pickle.UnpicklingError("an array without a shape and values")
            _, shape, dtype, is_fortran, values = state
            values = self._checked_values(values, dtype, shape)
            made.__setstate__((1, shape, dtype.numpy(), bool(is_fortran), bytes(values)))
        elif not isinstance(made, OrderedDict):  # whose attributes are not needed
            super().build(made, state)

    def _encode(self, text: str, encoding: str) -> bytes:
        # How protocols 0 to 2 write bytes.
        if encoding != "latin1":
            raise CodeNeededError(f"it asks for the codec {encoding!r}")
        self.claim(len(text))
        return text.encode("latin1")

    def _number_of(self, dtype: _Type, value: bytes | str) -> np.generic:
        return np.frombuffer(self._checked_values(value, dtype, ()), dtype.numpy())[0]

    def _array_of(self, values: bytes, dtype: _Type, shape: tuple[int, ...], order: str) -> np.ndarray:
        if order not in ("C", "F"):
            raise pickle.UnpicklingError("an array of another order than C and F")
        values = self._checked_values(values, dtype, shape)
        return np.frombuffer(values, dtype.numpy()).reshape(shape, order=order)

    def _checked_values(self, values: bytes | str, dtype: _Type, shape: tuple[int, ...]) -> bytes | bytearray:
        """The bytes of an array, as many as its shape and type say. Raises UnpicklingError."""
        if isinstance(values, str):  # of Python 2
            values = values.encode("latin1")
        if not isinstance(dtype, _Type) or not isinstance(values, bytes | bytearray):
            raise pickle.UnpicklingError("an array of other values than numbers")
        if not isinstance(shape, tuple) or not all(type(size) is int and 0 <= size < 2**62 for size in shape):
            raise pickle.UnpicklingError("an array whose shape is none")
        claimed = math.prod(shape) * dtype.numpy().itemsize
        if claimed != len(values):
            raise pickle.UnpicklingError(f"an array that takes {claimed} bytes, of which there are {len(values)}")
        self.claim(claimed)
        return values

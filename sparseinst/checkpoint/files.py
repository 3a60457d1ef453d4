"""Read weights files of every format without running code. The format is detected from the content."""

import argparse
import contextlib
import logging
import mmap
import os
import pickle
import pickletools
import re
import string
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

logger = logging.getLogger(__name__)

ZIP = "PyTorch file"
LEGACY = "PyTorch file of the format before 1.6"
PICKLE = "pickle of numpy arrays"
SAFETENSORS = "safetensors file"

# Bytes that are read at once.
_CHUNK = 2**20
# The magic number of torch.save, pickled with protocol 2.
_LEGACY_START = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
# Protocols 0 and 1 have no header: a dict, a list, or Python 2's OrderedDict.
_OLD_PICKLE_STARTS = (b"(dp", b"(lp", b"}q", b"ccollections\n")
_FOREIGN_STARTS = {
    b"version https://git-lfs": "a git-lfs pointer, not the file itself; run git lfs pull, or download the file",
    b"<": "a web page (or XML), the result of a failed download; download the file again",
    b"\x1f\x8b": "compressed with gzip; unpack it",
    b"\x89HDF": "an HDF5 file of Keras or TensorFlow, which cannot be read here; convert it to PyTorch's format",
}
# Raised by pickle, zipfile and torch for damaged files; torch's C++ parts raise RuntimeError.
_READER_ERRORS = (
    pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, ValueError, TypeError, LookupError, AttributeError,
    EOFError, OverflowError, AssertionError, OSError, struct.error,
)  # fmt: skip
_READABLE = "PyTorch files (.pth), safetensors and pickles of numpy arrays (.pkl) can be read"


class WeightsFileError(ValueError):
    """Raised where a weights file is missing, damaged, of an unknown format, or needs code that is not trusted."""


class CodeNotTrustedError(WeightsFileError):
    """Raised where a weights file can only be read by running code, and MODEL.TRUSTED_WEIGHTS is not set."""


class WeightsFile(NamedTuple):
    """The content of a weights file.

    Attributes:
        kind: the format in words.
        content: the saved object, on the CPU; mostly a dict.
    """

    kind: str
    content: object


class CodeNeededError(pickle.UnpicklingError):
    """Raised where a pickle can only be read by running code that it names."""


class ArrayUnpickler(pickle.Unpickler):
    """Read containers, text, numbers and numpy arrays of numbers; refuse every other name.

    Array and dtype states go through checked numpy functions: ``numpy.dtype.__setstate__`` accepts any flags and sizes,
    so a pickle could make arrays that write outside their memory.

    Args:
        file: the pickle; it must be seekable.

    Raises:
        CodeNeededError: by ``load``, where the pickle names something else.
        pickle.UnpicklingError, and other errors that Python raises for damaged pickles.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="latin1")
        self._file = file
        # Methods, because a pickle can set attributes of functions and classes.
        self._known = {
            ("builtins", "set"): set,
            ("builtins", "bytes"): self._empty_bytes,
            ("collections", "OrderedDict"): self._ordered_dict,
            ("_codecs", "encode"): self._encode,
            ("numpy", "ndarray"): None,
            ("numpy", "dtype"): self._dtype,
            ("numpy.core.multiarray", "_reconstruct"): self._empty_array,
            ("numpy.core.multiarray", "scalar"): self._scalar,
            ("numpy.core.numeric", "_frombuffer"): self._from_buffer,
        }

    def load(self) -> object:
        """Check all declared lengths and memo indices, by which Python allocates memory; return the content."""
        try:
            for index, (opcode, argument, _) in enumerate(pickletools.genops(self._file)):
                if opcode.name.endswith("PUT") and int(argument) > index:
                    raise pickle.UnpicklingError(f"memo index {argument} after {index} instructions")
        except UnicodeDecodeError as error:
            raise CodeNeededError("it is a pickle of Python 2 with protocol 0, which cannot be checked") from error
        self._file.seek(0)
        return super().load()

    def find_class(self, module: str, name: str) -> object:
        """Return the safe replacement of a name. Raises CodeNeededError for names that arrays do not need."""
        # numpy 2 and Python 3 renamed modules.
        key = (module.replace("numpy._core", "numpy.core").replace("__builtin__", "builtins"), name)
        if key not in self._known:
            raise CodeNeededError(f"it names {module}.{name}")
        return self._known[key]

    def _empty_bytes(self) -> bytes:
        return b""

    def _ordered_dict(self, items: Iterable = ()) -> OrderedDict:
        return _OrderedDict(items)

    def _encode(self, text: str, encoding: str) -> bytes:
        if encoding != "latin1":
            raise CodeNeededError(f"it asks for the codec {encoding!r}")
        return text.encode("latin1")

    def _dtype(self, code: str, *_: object) -> "_Dtype":
        return _Dtype(code)

    def _empty_array(self, *_: object) -> np.ndarray:
        return _Array(0)

    def _scalar(self, dtype: "_Dtype", value: bytes | str) -> np.generic:
        return np.frombuffer(_as_bytes(value), dtype.dtype)[0]

    def _from_buffer(self, values: bytes, dtype: "_Dtype", shape: tuple, order: str, axes: Any = None) -> np.ndarray:
        # Order K: numpy 2.3 and newer with permuted axes.
        array = np.frombuffer(values, dtype.dtype)
        return array.reshape(shape).transpose(axes) if order == "K" else array.reshape(shape, order=order)


class _OrderedDict(OrderedDict):
    def __setstate__(self, _: object) -> None:
        """Drop attributes, which could replace methods."""


class _Dtype:
    """A dtype of numbers while a pickle is read."""

    def __init__(self, code: str) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[fiubc]\d{1,2}", code):
            raise CodeNeededError(f"it has an array of type {str(code)[:50]}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    def __setstate__(self, state: tuple) -> None:
        """Take the values; their number must fit the shape."""
        _, shape, dtype, is_fortran, values = state
        values = _as_bytes(values)
        shape = np.frombuffer(values, dtype.dtype).reshape(shape).shape
        super().__setstate__((1, shape, dtype.dtype, bool(is_fortran), values))


def _as_bytes(values: bytes | str) -> bytes:
    # Python 2's strings are bytes.
    return values.encode("latin1") if isinstance(values, str) else bytes(memoryview(values))


def read_weights_file(path: str | os.PathLike, trusted: bool = False) -> WeightsFile:
    """Read a weights file of any format; the format is detected from the first bytes.

    Args:
        path: a local file.
        trusted: run the code that a file names where it cannot be read otherwise.

    Raises:
        WeightsFileError: the file is missing, damaged, of no known format, or needs code and is not trusted.
        ImportError: it is a safetensors file, and the package safetensors is not installed.
    """
    path = Path(path)
    kind = _kind_of(path)
    read = {ZIP: _read_torch, LEGACY: _read_torch, PICKLE: _read_arrays, SAFETENSORS: _read_safetensors}[kind]
    with _explained_damage(path, kind, _READER_ERRORS):
        if kind == ZIP:
            _check_checksums(path)
        try:
            return WeightsFile(kind, read(path))
        except pickle.UnpicklingError as error:
            # torch.load raises UnpicklingError for damage too, then without weights_only in the message.
            if not isinstance(error, CodeNeededError) and "weights_only" not in str(error):
                raise
            if not trusted:
                raise CodeNotTrustedError(
                    f"{path} cannot be read without running code that it names ({_unknown_name(error)}). If it comes "
                    "from someone you trust, set MODEL.TRUSTED_WEIGHTS True; else ask for the bare state dict"
                ) from error
    logger.warning("%s runs code while it is read, as MODEL.TRUSTED_WEIGHTS allows", path)
    # The pickled code may be missing or may have changed.
    with _explained_damage(path, kind, (*_READER_ERRORS, ImportError)):
        return WeightsFile(kind, _read_any_pickle(path) if kind == PICKLE else _read_torch(path, weights_only=False))


@contextlib.contextmanager
def _explained_damage(path: Path, kind: str, errors: tuple[type[Exception], ...]) -> Iterator[None]:
    try:
        yield
    except WeightsFileError:
        raise
    except MemoryError as error:
        raise WeightsFileError(f"{path}, {path.stat().st_size} bytes, does not fit into the memory") from error
    except errors as error:
        raise _damaged(path, kind, error) from error


def _kind_of(path: Path) -> str:
    if not path.exists():
        raise WeightsFileError(f"The file {path} does not exist")
    if not path.is_file():
        raise WeightsFileError(f"{path} is a folder; name the weights file in it")
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise WeightsFileError(f"{path} cannot be read: {error}") from error
    if not head:
        raise WeightsFileError(f"{path} is empty; download or copy it again")
    if head.startswith(b"PK"):
        _check_zip(path)
        return ZIP
    if head.startswith(_LEGACY_START[:-1]):
        return LEGACY
    if (head[0] == 0x80 and head[1:2] in b"\2\3\4\5") or head.startswith(_OLD_PICKLE_STARTS):
        return PICKLE
    # Eight bytes hold the length of the JSON header that follows.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        return SAFETENSORS
    for start, what in _FOREIGN_STARTS.items():
        if head.lstrip().startswith(start):
            raise WeightsFileError(f"{path} is {what}")
    if all(byte in string.printable.encode() for byte in head):
        raise WeightsFileError(f"{path} is a text file: {_first_line(head.decode())!r}. {_READABLE}")
    raise WeightsFileError(f"{path} starts with {head[:8]!r}, as no known weights file does. {_READABLE}")


def _check_zip(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise _damaged(path, ZIP, error) from error
    names = {entry.filename.partition("/")[2] for entry in entries}
    if "constants.pkl" in names:
        raise WeightsFileError(f"{path} is a TorchScript program; save the state dict of the model: model.state_dict()")
    if "data.pkl" not in names:
        raise WeightsFileError(f"{path} is a zip file, but none of PyTorch's. {_READABLE}")
    # A small compressed file could unpack to more than fits into memory.
    is_stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    if not is_stored or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise WeightsFileError(f"{path} has compressed entries, which PyTorch does not write; unpack it, save it again")


def _check_checksums(path: Path) -> None:
    """Raise BadZipFile, which names the entry, where a checksum differs. torch.load does not compare them."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            # torch.serialization.set_crc32_options(False) writes 0.
            if entry.CRC:
                with archive.open(entry) as file:
                    while file.read(_CHUNK):
                        pass


def _read_torch(path: Path, weights_only: bool = True) -> object:
    # Saved by the training scripts of timm and DeiT; holds only values.
    safe_globals = getattr(torch.serialization, "safe_globals", None)  # PyTorch 2.5
    with_namespaces = safe_globals([argparse.Namespace]) if safe_globals else contextlib.nullcontext()
    # Not a path: newer versions choose the reader by the suffix .safetensors.
    with with_namespaces, path.open("rb") as file:
        return torch.load(file, map_location="cpu", weights_only=weights_only)


def _read_arrays(path: Path) -> object:
    # A memory map allocates nothing for a declared length.
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return ArrayUnpickler(mapped).load()


def _read_any_pickle(path: Path) -> object:
    with path.open("rb") as file:
        return pickle.load(file, encoding="latin1")


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(
            f"{path} is read with the package safetensors, which cannot be imported ({error}). "
            "Install it: pip install 'sparseinst[timm]', or pip install safetensors"
        ) from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise _damaged(path, SAFETENSORS, error) from error


def _unknown_name(error: Exception) -> str:
    # PyTorch's message is a page long.
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f"it names {found[1]}" if found else _first_line(error)


def _damaged(path: Path, kind: str, error: Exception) -> WeightsFileError:
    return WeightsFileError(
        f"{path}, {path.stat().st_size} bytes, starts as a {kind} and is damaged or cut off "
        f"({type(error).__name__}: {_first_line(error)}); download or copy it again"
    )


def _first_line(text: object) -> str:
    return (str(text).strip().splitlines() or [""])[0][:200]

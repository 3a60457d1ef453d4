"""What a PyTorch file claims, held against the file before ``torch.load`` believes it.

``torch.load(weights_only=True)`` runs no code, but it allocates what a file asks for, and reads as far beyond a
tensor's data as the file says that it is long. So a file is read here first, as claims, without making any of it.
"""

import math
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch

from sparseinst.checkpoint.pickles import CodeNeededError, DataUnpickler, Name, checked_dict, checked_set

_STORAGE_TYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128,
}  # fmt: skip
_BUILTINS = ("builtins", "__builtin__")
# A file of the older format: these pickles, the last of which lists what storages follow.
_MAGIC, _VERSION, _SYSTEM, _OBJECT, _STORAGES = range(5)

# At a zip file's end: where its list of entries is, in the older form and, before that, in the one for large files.
_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")


def check_zip_claims(path: Path) -> None:
    """Check a PyTorch file in a zip file.

    Raises:
        CodeNeededError: its pickle names something that is not data.
        zipfile.BadZipFile, pickle.UnpicklingError, and what else damaged files make their readers raise.
    """
    size = path.stat().st_size
    _check_zip_end(path, size)
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        # The entry's name decides for PyTorch, whose look-up does not tell upper from lower case.
        if len({entry.filename.lower() for entry in entries}) != len(entries):
            raise zipfile.BadZipFile("two entries have one name")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise zipfile.BadZipFile(
                "its entries are compressed, which PyTorch does not do; unpack it and save it again"
            )
        if sum(entry.file_size for entry in entries) > size:
            raise zipfile.BadZipFile("its entries are together larger than the file")
        folder = entries[0].filename.partition("/")[0]
        pickled = archive.read(f"{folder}/data.pkl")
    prefix = f"{folder}/data/"
    stored = {e.filename.removeprefix(prefix): e.file_size for e in entries if e.filename.startswith(prefix)}
    _Claims(BytesIO(pickled), len(pickled), size, stored).load()


def _check_zip_end(path: Path, size: int) -> None:
    """Check that the list of entries ends where the end of the file begins.

    Python takes the list from there, and PyTorch from where it says that it is: two lists would be two files.
    """
    with path.open("rb") as file:
        file.seek(max(0, size - _END.size - _END64_LOCATOR.size - _END64.size))
        tail = file.read()
    if len(tail) < _END.size:
        raise zipfile.BadZipFile("it is too short")
    signature, *_, length, start, comment = _END.unpack(tail[-_END.size :])
    if signature != b"PK\5\6" or comment:
        raise zipfile.BadZipFile("it does not end as PyTorch's files do")
    end = size - _END.size
    if tail[: -_END.size].startswith(b"PK\6\6"):
        end -= _END64_LOCATOR.size + _END64.size
        locator, _, found_at, _ = _END64_LOCATOR.unpack(tail[_END64.size : -_END.size])
        *_, length, start = _END64.unpack(tail[: _END64.size])
        if locator != b"PK\6\7" or found_at != end:
            raise zipfile.BadZipFile("it does not end as PyTorch's files do")
    if start + length != end:
        raise zipfile.BadZipFile("its list of entries is not where it says")


def check_legacy_claims(path: Path, file: BinaryIO) -> None:
    """Check a PyTorch file of the format before 1.6.

    Args:
        path: of the file.
        file: it, mapped to memory, at its start.

    Raises:
        CodeNeededError: its pickle names something that is not data.
        pickle.UnpicklingError, and what else damaged files make their readers raise.
    """
    if tarfile.is_tarfile(path):
        raise pickle.UnpicklingError("it is a tar file too")
    size = path.stat().st_size
    claims = _Claims(file, size, size, None)
    content = [claims.load() for _ in (_MAGIC, _VERSION, _SYSTEM, _OBJECT, _STORAGES)]
    listed = content[_STORAGES]
    if not isinstance(listed, list) or sorted(map(str, listed)) != sorted(claims.claimed):
        raise pickle.UnpicklingError("its list of what follows is another than what its tensors need")
    # Before the data of each is its length, again.
    if sum(claims.claimed.values()) + 8 * len(listed) > size - file.tell():
        raise pickle.UnpicklingError("its tensors claim more data than follow")


class _Storage(NamedTuple):
    """A claim on stored data: of how many elements, and of how many bytes each."""

    num_elements: int
    element_size: int


class _Tensor:
    """A tensor whose claims were checked; it holds nothing."""


class _Settings:
    """A Namespace; what it holds is not looked at."""


class _Claims(DataUnpickler):
    """Checks what the pickle of a PyTorch file asks for.

    Args:
        file, size: the pickle's.
        file_size: of the whole file, in bytes.
        stored: how many bytes are stored under each key; None where that is known only after the pickle.

    Attributes:
        claimed: how many bytes each key should have.
    """

    def __init__(self, file: BinaryIO, size: int, file_size: int, stored: Mapping[str, int] | None) -> None:
        super().__init__(file, size)
        self._file_size = file_size
        self._stored = stored
        self.claimed: dict[str, int] = {}
        self._names = {
            "collections.OrderedDict": lambda items=(): checked_dict(items),
            "collections.Counter": lambda counts: checked_dict(counts.items()),
            # By the name that Python 2 had, which torch.save writes.
            **{f"{builtins}.set": checked_set for builtins in _BUILTINS},
            **{f"{builtins}.complex": complex for builtins in _BUILTINS},
            **{f"{builtins}.bytearray": self._bytes for builtins in _BUILTINS},
            "_codecs.encode": self._bytes,
            "argparse.Namespace": lambda: _Settings(),
            "torch.device": lambda *_: None,
            "torch.Size": lambda sizes: tuple(sizes),
            "torch.storage.UntypedStorage": None,
            **{f"torch.{name}": None for name in _STORAGE_TYPES},
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor_v3": self._tensor_of_dtype,
            "torch._utils._rebuild_parameter": self._parameter,
        }

    def find(self, module: str, name: str) -> Name:
        text = f"{module}.{name}"
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return Name(text, None)
        if text not in self._names:
            raise CodeNeededError(f"it names {text}")
        return Name(text, self._names[text])

    def build(self, made: object, state: object) -> None:
        # The versions of a state dict's layers are an attribute of it. Others could be in the place of its methods.
        is_dict = isinstance(made, dict) and isinstance(state, dict) and set(state) <= {"_metadata"}
        if not is_dict and not (isinstance(made, _Settings) and isinstance(state, dict)):
            raise CodeNeededError(f"it gives attributes to a {type(made).__name__}")

    def persistent(self, identity: object) -> _Storage:
        if not isinstance(identity, tuple) or len(identity) not in (5, 6) or identity[0] != "storage":
            raise pickle.UnpicklingError("it refers to something else than a storage")
        _, kind, key, _, num_elements, *view = identity
        if not isinstance(kind, Name) or not _is_count(num_elements) or not isinstance(key, str) or not key.isascii():
            raise pickle.UnpicklingError("a storage without a type, a length or a key")
        dtype = _STORAGE_TYPES.get(kind.text.removeprefix("torch."))
        if dtype is None and kind.text != "torch.storage.UntypedStorage":
            raise pickle.UnpicklingError(f"a storage of type {kind.text}")
        storage = _Storage(num_elements, dtype.itemsize if dtype else 1)
        num_bytes = num_elements * storage.element_size
        available = self._file_size if self._stored is None else self._stored.get(key, -1)
        if num_bytes > available:
            raise pickle.UnpicklingError(f"the storage {key!r} claims {num_bytes} bytes, and has {max(available, 0)}")
        if self.claimed.setdefault(key, num_bytes) != num_bytes:
            raise pickle.UnpicklingError(f"the storage {key!r} claims two lengths")
        if self._stored is None and view != [None]:
            return self._view(storage, *view)
        return storage

    def _view(self, storage: _Storage, view: object) -> _Storage:
        """A part of a storage, as only the older format has it."""
        _, offset, length = view
        if not _is_count(offset) or not _is_count(length) or offset + length > storage.num_elements:
            raise pickle.UnpicklingError("a part of a storage that is not in it")
        return storage._replace(num_elements=length)

    def _tensor(
        self,
        storage: _Storage,
        offset: int,
        size: tuple,
        stride: tuple,
        is_trained: bool = False,
        hooks: object = (),
        *_,
    ) -> _Tensor:
        if not isinstance(storage, _Storage) or hooks:
            raise pickle.UnpicklingError("a tensor without a storage, or one that should call something")
        numbers = [offset, *size, *stride]
        if len(size) != len(stride) or not all(map(_is_count, numbers)):
            raise pickle.UnpicklingError("a tensor whose size and strides are none")
        # Also of one that is a single number, repeated.
        num_bytes = math.prod(size) * storage.element_size
        if num_bytes > self._file_size:
            raise pickle.UnpicklingError(f"a tensor of size {list(size)[:8]} claims {num_bytes} bytes")
        last = offset + sum((length - 1) * step for length, step in zip(size, stride))
        if num_bytes and last >= storage.num_elements:
            raise pickle.UnpicklingError(
                f"a tensor of size {list(size)[:8]} needs {last + 1} elements, and {storage.num_elements} are stored"
            )
        return _Tensor()

    def _tensor_of_dtype(
        self, storage: _Storage, offset: int, size: tuple, stride: tuple, is_trained: bool, hooks: dict, dtype: Name, *_
    ) -> _Tensor:
        element_size = getattr(torch, dtype.text.removeprefix("torch.")).itemsize
        num_bytes = storage.num_elements * storage.element_size
        storage = _Storage(num_bytes // element_size, element_size)
        return self._tensor(storage, offset, size, stride, is_trained, hooks)

    def _parameter(self, tensor: _Tensor, is_trained: bool, hooks: dict) -> _Tensor:
        if not isinstance(tensor, _Tensor) or hooks:
            raise pickle.UnpicklingError("a parameter without a tensor, or one that should call something")
        return tensor

    def _bytes(self, value: str | bytes = b"", encoding: str = "latin1") -> bytes:
        # An integer would ask for that many bytes.
        if not isinstance(value, str | bytes) or encoding not in ("latin1", "latin-1"):
            raise pickle.UnpicklingError("bytes that are not given as such")
        self.claim(len(value))
        return value.encode("latin1") if isinstance(value, str) else value


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**62

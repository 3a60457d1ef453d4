"""Find the image files of a COCO json, also by the names that Windows and web tools write; look at their headers."""

import os
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote

from sparseinst.data.findings import Finding
from sparseinst.data.images import MAX_IMAGE_PIXELS, DataError, read_16_bit_range, read_header

# At the start of a training, most images whose headers are read, and most 16-bit images that are decoded.
_NUM_HEADERS, _NUM_DECODED = 200, 10
# A 16-bit image with at most so many of 256 levels is nearly uniform: a camera's 10, 12 or 14 bits are stored so.
_FEW_LEVELS = 64


class FileNames(NamedTuple):
    """The files of a json's images.

    Attributes:
        found: by the json's `file_name`, the name below the image folder where that is another one.
        absent: the names without a file, each once.
    """

    found: dict[str, str]
    absent: list[str]


class ImageTraits(NamedTuple):
    """Hold properties of an image file that are valid, but often wrong.

    Attributes:
        file_name: of the json.
        is_turned: EXIF rotates or mirrors the image, and its size is that of the json in either case.
        num_levels: levels from the darkest to the brightest pixel, of 256; None: not an image of 16 bits, or not read.
    """

    file_name: str
    is_turned: bool
    num_levels: int | None


def spellings(file_name: str) -> Iterator[str]:
    """Yield a file name, then with / in place of backslashes, URL-decoded, and without its leading folders."""
    yield file_name
    name = file_name.replace("\\", "/")
    decoded = unquote(name.partition("?d=")[2] or name)
    yield from (name, unquote(file_name), decoded)
    parts = [part for part in PurePosixPath(decoded).parts if part not in ("/", "..")]
    yield from ("/".join(parts[start:]) for start in range(len(parts)))


def find_files(file_names: Iterable[str], image_root: Path) -> FileNames:
    """Look for the files of a json. Listing each folder once is fast on network drives.

    Args:
        file_names: relative to ``image_root``.
        image_root: the folder of the images.
    """
    present: dict[str, set[str]] = {}

    def exists(file_name: str) -> bool:
        folder, base = os.path.split(file_name)
        path = image_root / folder
        try:
            if folder not in present:
                present[folder] = set(os.listdir(path)) if path.is_dir() else set()
            # is_file also works on file systems that ignore the case of letters.
            return bool(base) and (base in present[folder] or (image_root / file_name).is_file())
        except (OSError, ValueError):
            return False

    other_names = {name: "" for name in file_names if not exists(name)}
    for name in other_names:
        other_names[name] = next(filter(exists, spellings(name)), "")
    # Two names of one file without its folders are two files, at least one of them absent.
    counts = Counter(other_names.values())
    found = {name: other for name, other in other_names.items() if other and counts[other] == 1}
    return FileNames(found, [name for name in other_names if name not in found])


def with_found_names(content: dict, found: dict[str, str]) -> dict:
    """Return a COCO json whose images have the names of their files."""
    if not found:
        return content
    images = [
        {**image, "file_name": found[image["file_name"]]} if image["file_name"] in found else image
        for image in content["images"]
    ]
    return {**content, "images": images}


def name_findings(file_names: Sequence[str], files: FileNames, image_root: Path) -> Iterator[Finding]:
    """Yield warnings about the images' names: another spelling, and files that are listed twice."""
    if files.found:
        name, other = next(iter(files.found.items()))
        message = f"{len(files.found)} of {len(file_names)} images have a file_name of another form, as Windows and "
        message += f"web tools write it, and are found by another name (the first: {name!r} is read as {other!r})"
        yield Finding("another form of file_name", message, stops=False)
    names: dict[str, list[str]] = {}
    absent = set(files.absent)
    for name in file_names:
        if name not in absent:
            path = posixpath.normpath(os.path.join(image_root, files.found.get(name, name)))
            names.setdefault(path, []).append(name)
    repeated = [entries for entries in names.values() if len(entries) > 1]
    if repeated:
        first = repeated[0]
        also = f", also as {other!r}" if (other := next((n for n in first if n != first[0]), None)) else ""
        message = (
            f"{len(repeated)} files are listed twice or more in 'images' (the first: {first[0]!r} is named by "
            f"{len(first)} images{also}); in each entry the objects of the others are missing: merge the entries"
        )
        yield Finding("file named twice", message, stops=False)


def absent_findings(absent: Sequence[str], num_images: int, image_root: Path, limit: int) -> Iterator[Finding]:
    """Yield one finding about missing files, which stops above ``limit`` or where no file is left."""
    if not absent:
        return
    shown = ", ".join(map(repr, absent[:3])) + ", ..." * (len(absent) > 3)
    stops = len(absent) > limit or len(absent) >= num_images
    effect = (
        f"and DATALOADER.MAX_BROKEN_IMAGES is {limit}: correct the folder, or remove them from the json"
        if stops
        else f"and are skipped; more than {limit} (DATALOADER.MAX_BROKEN_IMAGES) would stop"
    )
    message = f"{len(absent)} of {num_images} images are missing: {image_root} has no file {shown}, {effect}"
    yield Finding("missing file", message, stops)


def image_traits(image: dict[str, Any], image_root: Path, max_pixels: int, decode: bool = True) -> ImageTraits:
    """Look at one image file.

    Args:
        image: of a COCO json, with `file_name`, `height` and `width`.
        image_root: the folder of the file.
        max_pixels: see `read_image`.
        decode: also read the levels of a 16-bit image.

    Raises:
        ImageReadError: the file cannot be read.
    """
    path = image_root / image["file_name"]
    header = read_header(path, max_pixels)
    is_square = header.size[0] == header.size[1]
    keeps_size = header.orientation in (2, 3, 4) or (header.orientation >= 5 and is_square)
    num_levels = None
    if decode and header.is_16_bit:
        least, greatest = read_16_bit_range(path, max_pixels)
        num_levels = greatest // 257 - least // 257 + 1
    return ImageTraits(image["file_name"], keeps_size and header.size == (image["height"], image["width"]), num_levels)


def trait_findings(traits: Sequence[ImageTraits]) -> Iterator[Finding]:
    """Yield warnings about image files."""
    turned = [trait.file_name for trait in traits if trait.is_turned]
    if turned:
        yield Finding(
            "turned by EXIF",
            f"{len(turned)} of {len(traits)} images that were looked at are turned or mirrored by their EXIF "
            f"orientation without a change of height and width (the first: {turned[0]!r}). The reader applies EXIF; "
            "if the annotation tool does not, the masks lie elsewhere: look at them with demo --ground-truth, or "
            "remove the EXIF entry",
            stops=False,
        )
    levels = [trait for trait in traits if trait.num_levels is not None]
    few = [trait for trait in levels if trait.num_levels <= _FEW_LEVELS]
    if few:
        yield Finding(
            "16-bit images with few levels",
            f"{len(few)} of {len(levels)} images of 16 bits that were looked at use few levels (the first: "
            f"{few[0].file_name!r}, {few[0].num_levels} of 256 as it is read, 65535 as white): scale them to the whole "
            "range, for example by 16 where the camera has 12 bits",
            stops=False,
        )


def sample_findings(images: Sequence[dict[str, Any]], image_root: Path) -> Iterator[Finding]:
    """Yield :func:`trait_findings` of at most 200 images, evenly spread; unreadable ones are passed over."""
    traits: list[ImageTraits] = []
    for image in images[:: -(-len(images) // _NUM_HEADERS) or 1]:
        num_decoded = sum(trait.num_levels is not None for trait in traits)
        try:
            traits.append(image_traits(image, image_root, MAX_IMAGE_PIXELS, decode=num_decoded < _NUM_DECODED))
        except DataError:
            continue
    yield from trait_findings(traits)

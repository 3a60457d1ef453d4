"""Read image files for training, evaluation, predictor and demo."""

import contextlib
import os
import re
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np
from detectron2.utils.file_io import PathManager
from PIL import Image

from sparseinst.data.image_formats import FORMATS

CHANNEL_ORDERS = ("RGB", "BGR")

# Default of INPUT.MAX_IMAGE_PIXELS: the largest phone cameras have 200 megapixels, 600 MB as RGB.
MAX_IMAGE_PIXELS = 200_000_000

# Larger images are converted in blocks of so many pixels: conversions copy them several times, and Pillow's RGB has 4
# bytes per pixel. Blocks take half as long again as a whole image.
_WHOLE_PIXELS, _BLOCK_PIXELS = 2**25, 2**22

# Most scans of a progressive JPEG, libtiff's limit. Encoders write about 10; each takes as long as the whole image.
MAX_JPEG_SCANS = 100
_JPEG_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")  # not part of the compressed data

# Pillow's decoders that are loops in Python: about 1 s per megapixel, while no other thread runs.
_PYTHON_DECODERS = {"qoi", "ppm", "ppm_plain", "bmp_rle"}

_TIFF_TILE_SIDES = (322, 323)
_TIFF_INTEGERS = {1: 1, 3: 2, 4: 4, 16: 8}  # bytes of each type

# Pillow documents OSError; its plugins raise these on damaged files.
_DECODING_ERRORS = (
    OSError, ValueError, SyntaxError, EOFError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError,
    MemoryError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip

_EXIF_ORIENTATION = 274
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_16_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
# In these formats mode "I" holds 16 bits, 0 to 65535; in others its range is unknown.
_16_BIT_FORMATS = ("PNG", "PPM")


class ImageHeader(NamedTuple):
    """Hold the values that an image's header declares.

    Attributes:
        size: (height, width) of :func:`read_image`.
        orientation: of EXIF, 1 to 8; 1: the image is read as it is stored.
        is_16_bit: its pixels have 16 bits.
    """

    size: tuple[int, int]
    orientation: int
    is_16_bit: bool


class DataError(ValueError):
    """An image or its annotations are broken; the message names the file and the annotation."""


class ImageReadError(DataError):
    """An image cannot be read, or an array is not an image."""


class ImageTooLargeError(ImageReadError):
    """The header of an image declares more pixels than allowed, for the image or for a tile."""


def check_channel_order(channel_order: str, key: str = "channel_order") -> None:
    """Raise ValueError, which names the key, where a channel order is not one of CHANNEL_ORDERS."""
    if channel_order not in CHANNEL_ORDERS:
        raise ValueError(f"{key} is {channel_order!r}; it must be one of {', '.join(CHANNEL_ORDERS)}")


def read_image(
    path: str | os.PathLike | BinaryIO,
    channel_order: str = "RGB",
    max_pixels: int = MAX_IMAGE_PIXELS,
    python_decoders: bool = True,
) -> np.ndarray:
    """Read an image file, oriented by its EXIF entry.

    Replaces `detectron2.data.detection_utils.read_image`, which maps 99.6 % of the levels of 16-bit gray images to
    white (all above 255 of 65535; this function divides them by 257) and rotates a TIFF twice. Other images give equal
    pixels. Transparency is ignored; an animation gives its first image.

    Args:
        path: of one of FORMATS; the format is detected from the file's content. An open binary file that can seek, such
            as an io.BytesIO, is read too.
        channel_order: "RGB" or "BGR".
        max_pixels: files whose header declares more are refused before decoding (INPUT.MAX_IMAGE_PIXELS).
        python_decoders: False: refuse images that Pillow decodes in Python, which stops all other threads.

    Returns:
        (height, width, 3) uint8.

    Raises:
        ImageReadError: the file is missing, not an image, damaged, too large, a JPEG of more than MAX_JPEG_SCANS scans,
            or has 32 bits per channel, whose value range is unknown; the message names the file.
            ImageTooLargeError where the reason is ``max_pixels``.
        ValueError: another channel order.
    """
    check_channel_order(channel_order)
    with open_image(path, max_pixels) as image:
        _check_range(image)
        if not python_decoders and not _PYTHON_DECODERS.isdisjoint(part[0] for part in image.tile):
            raise ValueError(f"{image.format} files of this kind are decoded too slowly; convert it to PNG or JPEG")
        # Decoded before the EXIF entry is read, because decoding rotates a TIFF and removes the entry.
        image.load()
        orientation = _orientation(image)
        # Pillow warns about a transparent color that does not fit RGB.
        image.info.pop("transparency", None)
        if orientation in _TRANSPOSES:
            stored, image = image, image.transpose(_TRANSPOSES[orientation])
            # Frees its pixels.
            stored.close()
        pixels = _to_rgb(image)
    return pixels if channel_order == "RGB" else pixels[:, :, ::-1]


def read_image_size(path: str | os.PathLike, max_pixels: int = MAX_IMAGE_PIXELS) -> tuple[int, int]:
    """Return the (height, width) of :func:`read_image` from the file's header alone; errors as :func:`read_header`."""
    return read_header(path, max_pixels).size


def read_header(path: str | os.PathLike, max_pixels: int = MAX_IMAGE_PIXELS) -> ImageHeader:
    """Read the header of an image.

    Raises:
        ImageReadError: the header cannot be read, or declares an image that :func:`read_image` refuses.
    """
    with open_image(path, max_pixels) as image:
        _check_range(image)
        width, height = image.size
        orientation = _orientation(image)
        # The size of a TIFF is already that of the rotated image.
        is_turned = image.format != "TIFF" and orientation >= 5
        return ImageHeader((width, height) if is_turned else (height, width), orientation, _is_16_bit(image))


def read_16_bit_range(path: str | os.PathLike, max_pixels: int = MAX_IMAGE_PIXELS) -> tuple[int, int]:
    """Return the least and the greatest value, 0 to 65535, of a 16-bit image; errors as :func:`read_image`."""
    with open_image(path, max_pixels) as image:
        values = np.asarray(image)
        return int(values.min()), int(values.max())


@contextlib.contextmanager
def open_image(path: str | os.PathLike | BinaryIO, max_pixels: int) -> Iterator[Image.Image]:
    """Open an image of FORMATS without decoding it; convert Pillow's errors inside to ImageReadError."""
    in_memory = not isinstance(path, str | os.PathLike)
    name = "" if in_memory else os.fspath(path)
    shown = getattr(path, "name", "") if in_memory else name
    what = f"Cannot read the image {shown}" if shown else "Cannot read the image"
    try:
        opened = contextlib.nullcontext(path) if in_memory else PathManager.open(name, "rb")
        # Pillow maps the file of this name into memory. An image in memory has no name.
        with opened as file, _identified(file, name) as image:
            sizes = [("", image.size)]
            if image.format == "TIFF":
                # libtiff decodes whole tiles, which may be larger than the image.
                sizes.append(("tiles of ", _tile_size(file, image.tag_v2.offset)))
            for kind, (width, height) in sizes:
                if width * height > max_pixels:
                    raise ImageTooLargeError(
                        f"{what}: its header declares {kind}{height} x {width} = {width * height} pixels, "
                        f"and INPUT.MAX_IMAGE_PIXELS is {max_pixels}; set it higher if the file is genuine"
                    )
            if "progressive" in image.info:
                _check_scans(file)
            yield image
    except ImageReadError:
        raise
    except Image.UnidentifiedImageError as error:
        size = path.seek(0, os.SEEK_END) if in_memory else os.path.getsize(name) if os.path.isfile(name) else None
        reason = f"it is not an image, or of another format than {', '.join(FORMATS)}"
        raise ImageReadError(f"{what}: {'the file is empty' if size == 0 else reason}") from error
    except _DECODING_ERRORS as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ImageReadError(f"{what}: {reason or type(error).__name__}") from error


def _identified(file: BinaryIO, name: str) -> Image.Image:
    """Return the image of a file in one of FORMATS.

    Replaces `Image.open`, whose pixel limit is a global of the process, and lower than MAX_IMAGE_PIXELS.
    """
    prefix = file.read(16)
    for kind in FORMATS:
        if kind not in Image.OPEN:
            Image.init()
        # Pillow may have been built without a format; its text names the missing format.
        build, accepts = Image.OPEN.get(kind, (None, lambda prefix: False))
        with contextlib.suppress(SyntaxError, IndexError, TypeError, struct.error):
            is_accepted = accepts is None or accepts(prefix)
            if isinstance(is_accepted, str):
                raise ValueError(is_accepted)
            if is_accepted:
                file.seek(0)
                return build(file, name)
    raise Image.UnidentifiedImageError


def _check_scans(file: BinaryIO) -> None:
    """Raise ValueError where a JPEG has more than MAX_JPEG_SCANS scans; the file's position does not change."""
    position = file.tell()
    file.seek(0)
    content = file.read()
    file.seek(position)
    num_scans, marker = 0, _JPEG_MARKER.search(content, 2)
    while marker is not None and marker[1] != b"\xd9":
        num_scans += marker[1] == b"\xda"
        if num_scans > MAX_JPEG_SCANS:
            raise ValueError(f"it is a JPEG of more than {MAX_JPEG_SCANS} scans, which take minutes; save it again")
        # Segments, which may hold a preview with markers of its own, are skipped.
        length = 0 if marker[1] in b"\x01\xd8" else int.from_bytes(content[marker.end() : marker.end() + 2], "big")
        marker = _JPEG_MARKER.search(content, marker.end() + length)


def _tile_size(file: BinaryIO, offset: int) -> tuple[int, int]:
    """Return (width, height) of the tiles of a TIFF, (0, 0) for strips; the file's position does not change.

    Reads the directory as libtiff does, because Pillow's `tag_v2` has the last of repeated entries, and libtiff takes
    the first.
    """
    position = file.tell()
    file.seek(0)
    head = file.read(4)
    order = "little" if head[:2] == b"II" else "big"
    count_bytes, entry_bytes, value_at = (8, 20, 12) if 43 in head[2:] else (2, 12, 8)
    file.seek(offset)
    # libtiff refuses directories of more entries.
    num_entries = min(int.from_bytes(file.read(count_bytes), order), 2**16)
    entries = file.read(num_entries * entry_bytes)
    file.seek(position)
    sides = dict.fromkeys(_TIFF_TILE_SIDES, 0)
    for start in range(0, len(entries), entry_bytes):
        tag, kind = (int.from_bytes(entries[at : at + 2], order) for at in (start, start + 2))
        if tag in sides:
            if kind not in _TIFF_INTEGERS or _TIFF_INTEGERS[kind] > entry_bytes - value_at:
                raise ValueError(f"the side of its tiles has TIFF's type {kind}; expected an unsigned integer")
            value = entries[start + value_at : start + value_at + _TIFF_INTEGERS[kind]]
            sides[tag] = max(sides[tag], int.from_bytes(value, order))
    return tuple(sides.values())


def _to_rgb(image: Image.Image) -> np.ndarray:
    """Return the pixels of an image, (height, width, 3) uint8; convert a large one in blocks of rows to save memory."""
    if image.width * image.height > _WHOLE_PIXELS and image.height > 1:
        num_rows = max(1, _BLOCK_PIXELS // image.width)
        pixels = np.empty((image.height, image.width, 3), np.uint8)
        for top in range(0, image.height, num_rows):
            bottom = min(top + num_rows, image.height)
            pixels[top:bottom] = _to_rgb(image.crop((0, top, image.width, bottom)))
        return pixels
    if _is_16_bit(image):
        gray = np.asarray(image).astype(np.int32)
        image = Image.fromarray(((gray + 128) // 257).astype(np.uint8))
    # convert would copy RGB images.
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _is_16_bit(image: Image.Image) -> bool:
    return image.mode in (*_16_BIT_MODES, "I")


def _check_range(image: Image.Image) -> None:
    if image.mode == "F" or (image.mode == "I" and image.format not in _16_BIT_FORMATS):
        kind = "floating-point numbers" if image.mode == "F" else "32-bit integers"
        raise ValueError(f"its pixels are {kind}, whose value range is unknown; convert the image to 8 or 16 bits")


def _orientation(image: Image.Image) -> int:
    """Return EXIF's orientation, 1 to 8; 1 where the entry is missing or unreadable."""
    try:
        value = image.getexif().get(_EXIF_ORIENTATION)
    except _DECODING_ERRORS:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1

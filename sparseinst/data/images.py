"""The one reader of pictures: training, evaluation, predictor and demo all see what it returns."""

import contextlib
import os
import struct
import threading
import zlib
from collections.abc import Iterator

import numpy as np
from detectron2.utils.file_io import PathManager
from PIL import Image

CHANNEL_ORDERS = ("RGB", "BGR")

# Default of INPUT.MAX_IMAGE_PIXELS. The largest cameras of phones have 200 megapixels; as RGB that is 600 MB.
MAX_IMAGE_PIXELS = 200_000_000

# What Pillow's plugins raise on damaged files, besides the OSError that they promise.
_DECODING_ERRORS = (
    OSError, ValueError, SyntaxError, EOFError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError,
    MemoryError, struct.error, zlib.error,
)  # fmt: skip

_EXIF_ORIENTATION = 274
_16_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
# Formats whose mode "I" is what they make of 16 bits, from 0 to 65535; elsewhere its range is not known.
_16_BIT_FORMATS = ("PNG", "PPM")


class DataError(ValueError):
    """What is wrong with one image or with its annotations; the message names the file, and the annotation."""


class ImageReadError(DataError):
    """A picture that cannot be read, or an array that is not a picture."""


def check_channel_order(channel_order: str, key: str = "channel_order") -> None:
    """Raises ValueError, which names the key, where a channel order is not one of CHANNEL_ORDERS."""
    if channel_order not in CHANNEL_ORDERS:
        raise ValueError(f"{key} is {channel_order!r}; it must be one of {', '.join(CHANNEL_ORDERS)}")


def read_image(path: str | os.PathLike, channel_order: str = "RGB", max_pixels: int = MAX_IMAGE_PIXELS) -> np.ndarray:
    """Read a picture file, turned as its EXIF entry says.

    Pixels equal those of Detectron2's reader, with two exceptions: 16 bits of gray, from 0 to 65535, become 8 by
    dividing by 257, where that reader sets all above 255 to 255; and a TIFF is turned once, not twice. Transparency is
    ignored. Of an animation the first picture is read.

    Args:
        path: picture file, of any format that Pillow reads.
        channel_order: "RGB" or "BGR".
        max_pixels: a file that says that it has more is refused before it is decoded (INPUT.MAX_IMAGE_PIXELS).

    Returns:
        (height, width, 3) uint8.

    Raises:
        ImageReadError: the file is missing, no picture, damaged, too large, or has 32 bits a pixel and channel, whose
            range nobody knows; the message names it.
        ValueError: another channel order.
    """
    check_channel_order(channel_order)
    with _opened(path, max_pixels) as image:
        _check_range(image)
        # First, since Pillow itself turns a TIFF when it decodes it, and then has no entry any more.
        image.load()
        orientation = _orientation(image)
        if image.mode in (*_16_BIT_MODES, "I"):
            gray = np.asarray(image).astype(np.int64)
            image = Image.fromarray(((gray + 128) // 257).astype(np.uint8))
        else:
            # Its colour would not do for RGB, and Pillow would warn of it.
            image.info.pop("transparency", None)
        # To convert RGB to RGB would copy it.
        image = image if image.mode == "RGB" else image.convert("RGB")
        pixels = np.asarray(_turned(image, orientation))
    return pixels if channel_order == "RGB" else pixels[:, :, ::-1]


def read_image_size(path: str | os.PathLike, max_pixels: int = MAX_IMAGE_PIXELS) -> tuple[int, int]:
    """(height, width) that :func:`read_image` would return, from the file's header alone.

    Raises:
        ImageReadError: the header cannot be read, or :func:`read_image` would refuse what it says.
    """
    with _opened(path, max_pixels) as image:
        _check_range(image)
        width, height = image.size
        is_turned = image.format != "TIFF" and _orientation(image) >= 5
        return (width, height) if is_turned else (height, width)


@contextlib.contextmanager
def _opened(path: str | os.PathLike, max_pixels: int) -> Iterator[Image.Image]:
    """The file's picture, not decoded yet; what Pillow raises inside becomes an ImageReadError."""
    name = os.fspath(path)
    try:
        with _without_pillows_limit(), PathManager.open(name, "rb") as file, Image.open(file) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageReadError(
                    f"Cannot read the picture {name}: it says that it has {height} x {width} = {width * height} "
                    f"pixels, and INPUT.MAX_IMAGE_PIXELS is {max_pixels}; set it higher if the file is genuine"
                )
            yield image
    except ImageReadError:
        raise
    except Image.UnidentifiedImageError as error:
        size = os.path.getsize(name) if os.path.isfile(name) else None
        reason = "the file is empty" if size == 0 else "it is no picture, or of a format that Pillow does not read"
        raise ImageReadError(f"Cannot read the picture {name}: {reason}") from error
    except _DECODING_ERRORS as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ImageReadError(f"Cannot read the picture {name}: {reason or type(error).__name__}") from error


def _check_range(image: Image.Image) -> None:
    if image.mode == "F" or (image.mode == "I" and image.format not in _16_BIT_FORMATS):
        kind = "floating-point numbers" if image.mode == "F" else "32-bit integers"
        raise ValueError(f"its pixels are {kind}, of which nobody knows what is white; save it with 8 or 16 bits")


def _orientation(image: Image.Image) -> int:
    """EXIF's 1 to 8; 1 where there is none, or none that can be read."""
    try:
        value = image.getexif().get(_EXIF_ORIENTATION)
    except _DECODING_ERRORS:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    method = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(orientation)
    return image if method is None else image.transpose(method)


class _PillowsLimit:
    """Pillow's own limit of pixels, one for the whole process, is off while anyone reads; ours stands in its place."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.num_readers = 0
        self.value: int | None = None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self.lock:
            if self.num_readers == 0:
                self.value, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self.num_readers += 1
        try:
            yield
        finally:
            with self.lock:
                self.num_readers -= 1
                if self.num_readers == 0:
                    Image.MAX_IMAGE_PIXELS = self.value


_without_pillows_limit = _PillowsLimit()

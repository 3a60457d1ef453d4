"""Pictures that were damaged at random, of many formats, read as training and prediction read them."""

import io
import random
from pathlib import Path

import numpy as np
from PIL import Image

from sparseinst.inference import read_image
from tests.faults.hostile import damaged, run_cases

SIZE = (37, 53)
# Name, Pillow's mode, format, and how it is saved.
FORMATS = (
    ("JPEG", "RGB", "JPEG", {"exif": True}), ("JPEG, progressive", "RGB", "JPEG", {"progressive": True}),
    ("JPEG, CMYK", "CMYK", "JPEG", {}), ("JPEG, gray", "L", "JPEG", {}), ("PNG", "RGB", "PNG", {"exif": True}),
    ("PNG, palette", "P", "PNG", {"transparency": 0}), ("PNG, 16 bits", "I;16", "PNG", {}),
    ("PNG, alpha", "LA", "PNG", {}), ("WebP", "RGB", "WEBP", {"lossless": True}),
    ("WebP, lossy", "RGBA", "WEBP", {"exif": True}), ("TIFF", "RGB", "TIFF", {}),
    ("TIFF, LZW", "RGB", "TIFF", {"compression": "tiff_lzw"}), ("TIFF, JPEG", "RGB", "TIFF", {"compression": "jpeg"}),
    ("TIFF, float", "F", "TIFF", {}), ("BMP", "RGB", "BMP", {}), ("BMP, palette", "P", "BMP", {}),
    ("GIF", "P", "GIF", {}), ("PPM", "RGB", "PPM", {}),
)  # fmt: skip


def whole(mode: str, file_format: str, options: dict) -> bytes:
    """A picture that is as it should be: a slope with some noise."""
    pixels = np.add.outer(np.arange(SIZE[0]) * 3, np.arange(SIZE[1]) * 2)[:, :, None] + np.arange(3) * 10
    pixels = (pixels + np.random.default_rng(0).integers(0, 20, pixels.shape)).clip(0, 255).astype(np.uint8)
    if mode in ("I;16", "F"):
        image = Image.fromarray(pixels[:, :, 0].astype(np.uint16 if mode == "I;16" else np.float32) * 200)
    else:
        image = Image.fromarray(pixels).convert(mode)
    options = dict(options)
    if options.pop("exif", False):
        exif = Image.Exif()
        exif[274] = 6
        options["exif"] = exif
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def image_case(generator: random.Random, number: int, folder: Path):
    kind, *how = FORMATS[number % len(FORMATS)]
    path = folder / generator.choice(("picture.jpg", "picture.png"))
    path.write_bytes(damaged(whole(*how), generator))

    def read():
        pixels = read_image(str(path))
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3

    return kind, read


def test_damaged_pictures_are_read_or_refused(tmp_path):
    run_cases(image_case, tmp_path, short=18, full=900)

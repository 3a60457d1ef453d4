"""Test the image reader: modes, EXIF, damaged files, limits; compared with Detectron2's own reader."""

import io
import random
import struct
import threading
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import detection_utils
from PIL import Image, ImageFile

from sparseinst.config import add_sparse_inst_config
from sparseinst.data import images
from sparseinst.data.image_formats import FORMATS, IMAGE_SUFFIXES, UNREAD_SUFFIXES
from sparseinst.data.images import (
    MAX_IMAGE_PIXELS,
    MAX_JPEG_SCANS,
    DataError,
    ImageReadError,
    ImageTooLargeError,
    read_16_bit_range,
    read_header,
    read_image,
    read_image_size,
)

HEIGHT, WIDTH = 6, 9


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def example(mode: str) -> Image.Image:
    image = Image.fromarray(pixels(HEIGHT, WIDTH, 4), "RGBA")
    if mode in ("P", "1"):
        return image.convert("RGB").convert(mode)
    if mode == "PA":
        return image.convert("RGB").convert("P").convert("PA")
    return image.convert(mode) if mode == "RGBA" else image.convert("RGB").convert(mode)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("RGB", "png"), ("RGB", "jpg"), ("RGB", "bmp"), ("RGB", "webp"), ("RGB", "tif"), ("RGBA", "png"),
        ("RGBA", "tif"), ("L", "png"), ("L", "jpg"), ("LA", "png"), ("P", "png"), ("P", "gif"), ("PA", "tif"),
        ("1", "png"), ("CMYK", "jpg"), ("CMYK", "tif"), ("YCbCr", "jpg"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("channel_order", ["RGB", "BGR"])
def test_8_bit_images_are_those_of_detectron2(mode, suffix, channel_order, tmp_path):
    path = tmp_path / f"a.{suffix}"
    example(mode).save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = read_image(path, channel_order)
    assert ours.dtype == np.uint8 and ours.shape == (HEIGHT, WIDTH, 3)
    assert np.array_equal(ours, detection_utils.read_image(str(path), channel_order))
    assert read_image_size(path) == (HEIGHT, WIDTH)


@pytest.mark.parametrize("transparency", [3, bytes(range(256))])
def test_transparent_palettes_warn_of_nothing(transparency, tmp_path):
    path = tmp_path / "a.png"
    example("P").save(path, transparency=transparency)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = read_image(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.array_equal(ours, detection_utils.read_image(str(path), "RGB"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_exif_orientation(orientation, suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(pixels(16, 40, 3)).save(path, exif=exif)
    ours = read_image(path)
    assert ours.shape[:2] == ((40, 16) if orientation >= 5 else (16, 40))
    assert read_image_size(path) == ours.shape[:2]
    if suffix == "tif":
        # Pillow turns it, and Detectron2 then once more.
        assert np.array_equal(ours, np.asarray(Image.open(path).convert("RGB")))
        return
    assert np.array_equal(ours, detection_utils.read_image(str(path), "RGB"))
    stored = np.asarray(Image.open(path).convert("RGB"))
    turned = {
        1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1], 5: stored.transpose(1, 0, 2),
        6: stored.transpose(1, 0, 2)[:, ::-1], 7: stored[::-1, ::-1].transpose(1, 0, 2),
        8: stored.transpose(1, 0, 2)[::-1],
    }[orientation]  # fmt: skip
    assert np.array_equal(ours, turned)


@pytest.mark.parametrize(
    ("orientation", "shape"), [(0, (16, 40, 3)), (9, (16, 40, 3)), (65535, (16, 40, 3)), (6, (40, 16, 3))]
)
def test_orientation_of_16_bits_and_meaningless_orientations(orientation, shape, tmp_path):
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(np.full((16, 40), 65535, np.uint16)).save(tmp_path / "a.png", exif=exif)
    assert read_image(tmp_path / "a.png").shape == shape and (read_image(tmp_path / "a.png") == 255).all()


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bits_are_rescaled_not_clipped(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    values = np.array([[0, 128, 129, 255, 256, 257], [1000, 32768, 65278, 65406, 65407, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(path)
    expected = np.rint(values / 257).astype(np.uint8)
    assert expected.tolist() == [[0, 0, 1, 1, 1, 1], [4, 128, 254, 254, 255, 255]]  # by hand
    assert np.array_equal(read_image(path), np.repeat(expected[..., None], 3, axis=2))
    # The stock reader: everything above 255 is white.
    assert (detection_utils.read_image(str(path), "RGB")[values > 255] == 255).all()


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_blocks_of_rows_equal_the_whole(dtype, orientation, tmp_path, monkeypatch):
    values = np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, (13, 7), dtype=dtype)
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(values).save(tmp_path / "a.png", exif=exif)
    expected = read_image(tmp_path / "a.png")
    turned = {1: values, 3: values[::-1, ::-1], 6: values.T[:, ::-1]}[orientation]
    gray = turned if dtype == np.uint8 else np.rint(turned / 257)
    assert (expected == gray[..., None]).all()
    # Two rows, and less than a row.
    for num_pixels in (27, 1):
        monkeypatch.setattr(images, "_BLOCK_PIXELS", num_pixels)
        monkeypatch.setattr(images, "_WHOLE_PIXELS", num_pixels)
        assert np.array_equal(read_image(tmp_path / "a.png"), expected)


@pytest.mark.parametrize(("shape", "dtype"), [((1500, 1000), np.uint16), ((1500, 1000, 3), np.uint8)])
def test_the_memory_of_a_large_image(shape, dtype, tmp_path, monkeypatch):
    """Besides Pillow's own image there is one of 3 bytes per pixel, and blocks."""
    Image.fromarray(np.ones(shape, dtype)).save(tmp_path / "a.png")
    read_image(tmp_path / "a.png")
    monkeypatch.setattr(images, "_BLOCK_PIXELS", 2**15, raising=False)
    monkeypatch.setattr(images, "_WHOLE_PIXELS", 2**15, raising=False)
    tracemalloc.start()
    try:
        read_image(tmp_path / "a.png")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 3 <= peak / (1500 * 1000) < 4


@pytest.mark.parametrize(("dtype", "kind"), [(np.int32, "32-bit integers"), (np.float32, "floating-point numbers")])
def test_an_unknown_value_range_is_refused(dtype, kind, tmp_path):
    Image.fromarray(np.zeros((3, 5), dtype)).save(tmp_path / "a.tif")
    for read in (read_image, read_image_size):
        with pytest.raises(ImageReadError, match=rf"a.tif: its pixels are {kind}.* convert the image to 8 or 16 bits"):
            read(tmp_path / "a.tif")


def test_files_that_are_not_images_are_refused_with_the_reason(tmp_path):
    Image.fromarray(pixels(64, 64, 3)).save(tmp_path / "good.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "good.jpg").read_bytes()[:-500])
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 50)
    for name, reason in {
        "cut.jpg": "truncated",
        "empty.jpg": "the file is empty",
        "text.jpg": "it is not an image",
        "folder.jpg": "Is a directory",
        "missing.jpg": "No such file",
        "broken.png": "Truncated",
    }.items():
        with pytest.raises(ImageReadError, match=f"Cannot read the image {tmp_path / name}: .*{reason}") as error:
            read_image(tmp_path / name)
        assert isinstance(error.value, DataError)
        if name != "cut.jpg":  # Its header is whole.
            with pytest.raises(ImageReadError, match=reason):
                read_image_size(tmp_path / name)


def test_paths_with_spaces_and_other_letters(tmp_path):
    folder = tmp_path / "Bilder über Äpfel, 写真"
    folder.mkdir()
    Image.fromarray(pixels(5, 4, 3)).save(folder / "mein Bild (1) ñ.png")
    assert np.array_equal(read_image(folder / "mein Bild (1) ñ.png"), pixels(5, 4, 3))
    assert read_image(str(folder / "mein Bild (1) ñ.png")).shape == (5, 4, 3)
    with pytest.raises(ImageReadError, match="Äpfel, 写真"):
        read_image(folder / "\0.png")


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def test_sizes_are_limited_before_decoding(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_that_claims(60000, 60000))
    for read in (read_image, read_image_size):
        with pytest.raises(ImageReadError, match="60000 x 60000 = 3600000000 pixels, and INPUT.MAX_IMAGE_PIXELS is 2"):
            read(path)
    Image.fromarray(pixels(10, 20, 3)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", max_pixels=200).shape == (10, 20, 3)
    with pytest.raises(ImageReadError, match="10 x 20 = 200 pixels, and INPUT.MAX_IMAGE_PIXELS is 199; set it higher"):
        read_image(tmp_path / "a.png", max_pixels=199)


def test_the_default_limit_is_the_config_s():
    cfg = get_cfg()
    add_sparse_inst_config(cfg)
    assert cfg.INPUT.MAX_IMAGE_PIXELS == MAX_IMAGE_PIXELS > 8000 * 8000


def test_pillows_own_limit_neither_warns_nor_interferes_and_is_restored(tmp_path, monkeypatch):
    Image.fromarray(pixels(10, 20, 3)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # 200 pixels are more than twice as many: an error of Pillow's
    with pytest.raises(Image.DecompressionBombError):
        Image.open(tmp_path / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        threads = [threading.Thread(target=read_image, args=(tmp_path / "a.png",)) for _ in range(8)]
        for thread in threads:
            thread.start()
        assert read_image(tmp_path / "a.png").shape == (10, 20, 3)
        for thread in threads:
            thread.join()
    with pytest.raises(ImageReadError):
        read_image(tmp_path / "missing.png")
    assert Image.MAX_IMAGE_PIXELS == 50


def test_another_channel_order(tmp_path):
    with pytest.raises(ValueError, match="channel_order is 'L'; it must be one of RGB, BGR"):
        read_image(tmp_path / "a.png", "L")


@pytest.mark.parametrize(
    "error", [OSError, SyntaxError, EOFError, KeyError, IndexError, TypeError, AttributeError, struct.error, zlib.error,
              ZeroDivisionError, OverflowError, RuntimeError, NotImplementedError, MemoryError, ValueError],
)  # fmt: skip
def test_whatever_a_plugin_raises_is_our_error(error, tmp_path, monkeypatch):
    Image.fromarray(pixels(5, 4, 3)).convert("L").save(tmp_path / "a.png")

    def fail(image, mode):
        raise error("inside of a plugin")

    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(ImageReadError, match="a.png: .*inside of a plugin"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "tif", "bmp", "webp", "pgm"])
def test_damaged_files_end_in_our_error_or_in_an_image(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(pixels(24, 24, 3)).convert("L" if suffix == "pgm" else "RGB").save(
        path, **({"exif": exif} if suffix in ("png", "jpg", "webp", "tif") else {})
    )
    whole = path.read_bytes()
    rng = random.Random(0)
    num_refused = 0
    for case in range(150):
        data = bytearray(whole)
        if case % 3 == 0:
            data = data[: rng.randrange(len(data))]
        else:
            for _ in range(rng.choice((1, 3, 30))):
                # Half of the damage in the headers.
                data[rng.randrange(len(data) if case % 2 else min(len(data), 100))] = rng.randrange(256)
        path.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                image = read_image(path, max_pixels=1_000_000)
                assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
            except ImageReadError as error:
                assert str(path) in str(error)
                num_refused += 1
    assert num_refused > 20


def test_formats_that_are_not_meant_are_not_opened(tmp_path, monkeypatch):
    Image.init()
    opened = []
    for kind in set(Image.OPEN) - set(FORMATS):
        monkeypatch.setitem(Image.OPEN, kind, (lambda file, name, kind=kind: opened.append(kind), None))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "ICO")
    for content in (eps, buffer.getvalue(), b"icns" + bytes(40), b"BLP1" + bytes(200)):
        (tmp_path / "a.jpg").write_bytes(content)
        for read in (read_image, read_image_size):
            with pytest.raises(ImageReadError, match="it is not an image, or of another format than JPEG, PNG"):
                read(tmp_path / "a.jpg")
    assert opened == []


def test_every_suffix_is_one_that_pillow_knows_for_its_format():
    known = Image.registered_extensions()
    for kind, suffixes in FORMATS.items():
        assert all(known.get(suffix, kind) == kind for suffix in suffixes), kind
    assert not set(IMAGE_SUFFIXES) & set(UNREAD_SUFFIXES)
    # All others of Pillow's are refused by name, or hold no photographs.
    assert {".jfif", ".avif", ".gif", ".mpo", ".jp2", ".webp"} <= set(IMAGE_SUFFIXES)


def test_a_thread_that_reads_leaves_pillows_limit_alone(tmp_path, monkeypatch):
    Image.fromarray(pixels(10, 20, 3)).save(tmp_path / "a.png")
    limits = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda im: limits.append(Image.MAX_IMAGE_PIXELS) or load(im))
    read_image(tmp_path / "a.png")
    assert limits and None not in limits


def jpeg_of_scans(num_scans: int) -> bytes:
    """Return a progressive JPEG whose last scan is repeated."""
    buffer = io.BytesIO()
    Image.fromarray(pixels(24, 24, 3)).save(buffer, "JPEG", progressive=True, exif=b"Exif\0\0" + b"\xff\xda" * 300)
    content = buffer.getvalue()
    start = content.rindex(b"\xff\xda")
    usual = content.count(b"\xff\xda") - 300
    return content[:start] + content[start:-2] * (num_scans - usual + 1) + b"\xff\xd9"


def test_a_jpeg_of_many_scans_is_refused_before_decoding(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg_of_scans(MAX_JPEG_SCANS))
    assert read_image(path).shape == (24, 24, 3)
    path.write_bytes(jpeg_of_scans(MAX_JPEG_SCANS + 1))
    for read in (read_image, read_image_size):
        with pytest.raises(ImageReadError, match="a JPEG of more than 100 scans"):
            read(path)


def test_header_and_range(tmp_path):
    exif = Image.Exif()
    exif[274] = 3
    Image.fromarray(pixels(10, 20, 3)).save(tmp_path / "a.jpg", exif=exif)
    assert read_header(tmp_path / "a.jpg") == ((10, 20), 3, False)
    Image.fromarray(np.array([[7, 4095]], dtype=np.uint16)).save(tmp_path / "a.png")
    assert read_header(tmp_path / "a.png") == ((1, 2), 1, True)
    assert read_16_bit_range(tmp_path / "a.png") == (7, 4095)


@pytest.mark.parametrize("suffix", [suffixes[0] for kind, suffixes in FORMATS.items() if kind not in ("QOI", "SUN")])
def test_images_in_memory_equal_files(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    # Pillow maps uncompressed gray pixels from the file that has the image's name.
    Image.fromarray(pixels(HEIGHT, WIDTH)).save(path)
    expected, data = read_image(path), path.read_bytes()
    path.write_bytes(bytes(len(data)))
    stream = io.BytesIO(data)
    stream.name = str(path)
    assert np.array_equal(read_image(stream), expected)


def test_errors_of_images_in_memory():
    whole = io.BytesIO()
    Image.fromarray(pixels(64, 64, 3)).save(whole, format="JPEG")
    for data, reason in ((b"", "the file is empty"), (b"text", "not an image"), (whole.getvalue()[:-500], "truncated")):
        with pytest.raises(ImageReadError, match=f"Cannot read the image: .*{reason}"):
            read_image(io.BytesIO(data))
    with pytest.raises(ImageTooLargeError, match="its header declares 60000 x 60000"):
        read_image(io.BytesIO(png_that_claims(60000, 60000)))

"""Test the size limit of a TIFF's tiles."""

import io
import struct
import zlib

import numpy as np
import pytest

from sparseinst.data.images import ImageReadError, ImageTooLargeError, read_image


def tiff_that_claims(tile: int, order: str = "<", magic: int = 42, kind: int = 4, repeated: bool = False) -> bytes:
    """Return a deflate TIFF of 16 x 16 black pixels in one tile."""
    data = zlib.compress(bytes(tile * tile))
    tags = [(256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (277, 1), (322, tile), (323, tile)]
    tags += [(322, 16), (323, 16)] * repeated
    is_big = magic == 43
    ifd, entry = (16, order + "HHQ") if is_big else (8, order + "HHL")
    data_at = ifd + 8 + 20 * (len(tags) + 2) + 8
    entries = b"".join(
        struct.pack(entry, tag, kind if tag in (322, 323) else 4, 1)
        + struct.pack(order + ("H" if kind == 3 and tag in (322, 323) else "L"), value).ljust(8 if is_big else 4, b"\0")
        for tag, value in sorted([*tags, (324, data_at), (325, len(data))], key=lambda item: item[0])
    )
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "H", magic)
    head += struct.pack(order + "HHQ", 8, 0, ifd) if is_big else struct.pack(order + "L", ifd)
    head += struct.pack(order + ("Q" if is_big else "H"), len(tags) + 2)
    return (head + entries).ljust(data_at, b"\0") + data


@pytest.mark.parametrize(
    "options", [{}, {"order": ">"}, {"magic": 43}, {"kind": 3}, {"order": ">", "kind": 3}, {"repeated": True}], ids=str
)
def test_tiles_of_a_tiff_are_limited_before_decoding(options):
    # Tiles may be larger than the image.
    if "repeated" not in options:
        assert np.array_equal(read_image(io.BytesIO(tiff_that_claims(256, **options))), np.zeros((16, 16, 3)))
    data = tiff_that_claims(272, **options)
    with pytest.raises(ImageTooLargeError, match="declares tiles of 272 x 272 = 73984 pixels, and INPUT.MAX_IMAGE_PIX"):
        read_image(io.BytesIO(data), max_pixels=73983)


def test_the_tiles_of_a_tiff_have_a_readable_size():
    with pytest.raises(ImageReadError, match="the side of its tiles has TIFF's type 9; expected an unsigned integer"):
        read_image(io.BytesIO(tiff_that_claims(256, kind=9)))

"""Tell masks from photographs and from masks with smoothed edges."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from sparseinst.data.images import MAX_IMAGE_PIXELS
from sparseinst.data.mask_files import count_edge_values, read_mask_values


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        # A block of 9 with an edge of 5 and 3: both touch other values and form no 2 x 2 block.
        (["9953", "9953", "9953"], (2, 3)),
        # The same with background between: each column is an object.
        (["99050", "99050", "99050"], (0, 2)),
        # 5 has two edge pixels, and four in a block.
        (["9955", "9955", "9005", "9005"], (0, 2)),
        # 5 has two pixels that touch 9, and three that touch nothing.
        (["99500", "99500", "00005", "00050", "00500"], (0, 2)),
        # Four dense cells.
        (["1122", "1122", "3344", "3344"], (0, 4)),
        (["7"], (0, 1)),
        (["00", "00"], (0, 0)),
    ],
)
def test_edge_values_by_hand(rows, expected):
    assert count_edge_values(np.array([list(map(int, row)) for row in rows])) == expected


def read(image, path):
    image.save(path)
    return read_mask_values(path, MAX_IMAGE_PIXELS)


def disk(size=(90, 60)):
    image = Image.new("L", size)
    ImageDraw.Draw(image).ellipse([size[0] // 3, size[1] // 4, size[0] * 2 // 3, size[1] * 3 // 4], fill=255)
    return image


@pytest.mark.parametrize(
    "image",
    [
        disk().filter(ImageFilter.GaussianBlur(1)),
        disk().filter(ImageFilter.GaussianBlur(10)),
        disk((360, 240)).resize((90, 60), Image.Resampling.BILINEAR),
        Image.merge(
            "RGB", [disk((360, 240)).resize((90, 60), Image.Resampling.BICUBIC), *[Image.new("L", (90, 60))] * 2]
        ),
        Image.effect_noise((90, 60), 50).filter(ImageFilter.GaussianBlur(1)),  # as a photograph
    ],
)
def test_smoothed_masks_are_refused(image, tmp_path):
    with pytest.raises(ValueError, match=r"\d+ of \d+ values above 0 form edges only"):
        read(image, tmp_path / "a.png")


def test_masks_of_many_objects(tmp_path):
    # 300 cells that touch each other: the nearest of 300 points.
    points = np.random.default_rng(0).uniform(0, 200, (300, 2))
    grid = np.stack(np.mgrid[:200, :200], axis=-1)
    cells = 1 + np.argmin(((grid[:, :, None] - points) ** 2).sum(axis=-1), axis=-1)
    assert (read(Image.fromarray(cells.astype(np.uint16)), tmp_path / "a.png") == cells).all()
    # 400 objects of one pixel, with 255 values.
    specks = np.zeros((80, 80), np.uint8)
    specks[::4, ::4] = (np.arange(400) % 255 + 1).reshape(20, 20)
    assert (read(Image.fromarray(specks), tmp_path / "b.png") == specks).all()


def test_jpeg_is_black_and_white_or_a_photograph(tmp_path):
    assert (read(disk(), tmp_path / "a.jpg") == np.array(disk()) // 255).mean() > 0.99
    for mode in ("L", "RGB"):
        with pytest.raises(ValueError, match="% of the pixels are gray; expected a black and white mask"):
            read(Image.effect_noise((90, 60), 50).convert(mode), tmp_path / "b.jpg")

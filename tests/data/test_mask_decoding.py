"""Test masks of single annotations: RLE against pycocotools, broken input, polygons at the limits."""

import random

import numpy as np
import pytest
from detectron2.data import transforms as T
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from sparseinst.data import mask_decoding
from sparseinst.data.images import DataError
from sparseinst.data.mask_decoding import (
    NO_PIXEL,
    NO_SEGMENTATION,
    OUTSIDE,
    TOO_FEW_POINTS,
    check_segmentation,
    decode_rle,
    is_whole,
    read_mask,
    run_lengths,
)
from sparseinst.structures.mask_window import MaskWindow

SIZE = (24, 32)
SQUARE = [3, 4, 9, 4, 9, 8, 3, 8]


def compress(mask: np.ndarray) -> dict:
    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1), st.sampled_from([0.02, 0.3, 0.5, 0.98]))
@settings(max_examples=150, deadline=None)
def test_compressed_rle_is_decoded_as_pycocotools_does(height, width, seed, share):
    mask = np.random.default_rng(seed).random((height, width)) < share
    rle = compress(mask)
    assert np.array_equal(decode_rle(rle, (height, width)), mask)
    text = {"size": [height, width], "counts": rle["counts"].decode()}
    assert np.array_equal(decode_rle(text, (height, width)), mask)
    # And back: pycocotools encodes the run lengths as the same text.
    runs = run_lengths(rle, (height, width)).tolist()
    again = coco_mask.frPyObjects({"size": [height, width], "counts": runs}, height, width)
    assert again["counts"] == rle["counts"]
    assert np.array_equal(decode_rle({"size": (height, width), "counts": runs}, (height, width)), mask)


def test_compressed_rle_of_a_large_mask():
    # Runs of millions of pixels: several characters, positive and negative differences.
    mask = np.zeros((3000, 2000), bool)
    mask[:, 700:1500] = True
    mask[5:2000, 3] = mask[1000:1003, 1800] = True
    assert np.array_equal(decode_rle(compress(mask), mask.shape), mask)


@pytest.mark.parametrize("whole", [True, False])
def test_random_bytes_end_in_our_error_or_in_a_mask_of_the_right_size(whole):
    rng = random.Random(0)
    good = compress(np.random.default_rng(0).random(SIZE) < 0.3)["counts"]
    num_decoded = 0
    for _ in range(2000):
        counts = bytearray(good) if whole else bytearray(rng.randbytes(rng.randrange(30)))
        for _ in range(rng.choice((0, 1, 2)) if whole else 0):
            counts[rng.randrange(len(counts))] = rng.randrange(256) if rng.random() < 0.5 else rng.randrange(48, 112)
        try:
            mask = decode_rle({"size": list(SIZE), "counts": bytes(counts)}, SIZE)
        except DataError:
            continue
        num_decoded += 1
        # pycocotools accepts it, too, with the same mask.
        assert np.array_equal(mask, coco_mask.decode({"size": list(SIZE), "counts": bytes(counts)}))
    assert 200 < num_decoded < 1500 if whole else num_decoded == 0


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        ({"counts": [768]}, r"keys \['counts'\]; expected 'size' and 'counts'"),
        ({"size": 768, "counts": [768]}, "RLE of size 768; expected"),
        ({"size": [24], "counts": [768]}, r"size \[24\]; expected"),
        ({"size": [24, 32, 1], "counts": [768]}, "expected the image's"),
        ({"size": [-24, -32], "counts": [768]}, "expected the image's"),
        ({"size": [24.0, 32], "counts": [768]}, "two whole numbers"),
        ({"size": [True, 32], "counts": [768]}, "two whole numbers"),
        ({"size": ["24", "32"], "counts": [768]}, "two whole numbers"),
        ({"size": [32, 24], "counts": [768]}, r"size \[32, 24\] on an image of \[24, 32\].*in the other order"),
        ({"size": [24, 33], "counts": [792]}, r"size \[24, 33\] on an image of \[24, 32\] .*must be equal$"),
        ({"size": [24, 32], "counts": [5, 7]}, "sum to 12, expected height . width = 768"),
        ({"size": [24, 32], "counts": []}, "counts must be whole numbers|sum to 0"),
        ({"size": [24, 32], "counts": [800, -32]}, "a run length of 800|a run length of -32"),
        ({"size": [24, 32], "counts": [-5, 773]}, "a run length of -5"),
        ({"size": [24, 32], "counts": [2**64, 768]}, "must be whole numbers"),
        ({"size": [24, 32], "counts": [2**63, 2**63]}, "a run length of"),
        ({"size": [24, 32], "counts": [10**400]}, "must be whole numbers"),
        ({"size": [24, 32], "counts": [768.0]}, "must be whole numbers"),
        ({"size": [24, 32], "counts": [float("nan")]}, "must be whole numbers"),
        ({"size": [24, 32], "counts": ["768"]}, "must be whole numbers"),
        ({"size": [24, 32], "counts": [[768]]}, "must be whole numbers"),
        ({"size": [24, 32], "counts": [[768], 3]}, "not a list of numbers"),
        ({"size": [24, 32], "counts": None}, "must be whole numbers"),
        ({"size": [24, 32], "counts": 768}, "must be whole numbers"),
        ({"size": [24, 32], "counts": {}}, "must be whole numbers"),
        ({"size": [24, 32], "counts": ""}, "sum to 0"),
        ({"size": [24, 32], "counts": "é"}, "a character that is not COCO's"),
        ({"size": [24, 32], "counts": "oo"}, "cut off"),
        ({"size": [24, 32], "counts": "oooooooooooo0"}, "more than 32 bits"),
        ({"size": [24, 32], "counts": b"\xff\x00"}, "a character that is not COCO's"),
        ({"size": [70_000, 70_000], "counts": [4_900_000_000]}, "counts no more than 4294967295"),
    ],
)
def test_broken_rle(rle, message):
    size = (70_000, 70_000) if rle.get("size") == [70_000, 70_000] else SIZE
    for read in (run_lengths, decode_rle, check_segmentation):
        with pytest.raises(DataError, match=message):
            read(rle, size)


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        (None, NO_SEGMENTATION),
        ([], NO_SEGMENTATION),
        ([[]], TOO_FEW_POINTS),
        ([[1, 1], [2, 2, 5, 5]], TOO_FEW_POINTS),
        ([[40, 4, 50, 4, 50, 8]], OUTSIDE),
        ([[3, -9, 9, -9, 9, 0]], OUTSIDE),
        ([[-3, 4, 0, 4, 0, 8], [1, 1]], OUTSIDE),
        ({"size": [24, 32], "counts": [768]}, NO_PIXEL),
        ({"size": [24, 32], "counts": [768, 0]}, NO_PIXEL),
        ([SQUARE], None),
        ([[1, 1], SQUARE], None),
        ([tuple(SQUARE)], None),
        ([np.array(SQUARE)], None),
        ([[3, 4, 9, 8, 9, 4, 3, 8]], None),  # self-crossing
        ([[-300, -200, 300, -200, 300, 200, -300, 200]], None),
        ({"size": [24, 32], "counts": [0, 768]}, None),
    ],
)
def test_why_there_is_no_instance(segmentation, reason):
    assert check_segmentation(segmentation, SIZE) == reason
    window = read_mask(segmentation, T.TransformList([]), SIZE, SIZE)
    assert (window is None) == (reason is not None)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[1, 1, float("nan"), 5, 5, 5]], "coordinate nan"),
        ([[float("nan")] * 6], "coordinate nan"),
        ([[1, 1, 5, float("inf"), 5, 5]], "coordinate inf"),
        ([[float("-inf"), float("inf"), 5, 1, 5, 5]], "coordinate -inf"),
        ([[1, 1, 1321, 5, 5, 5]], r"coordinate 1321; expected .*within \+-1320"),
        ([[1, 1, 5, -2e30, 5, 5]], "coordinate -2e[+]30"),
        ([[1, 1, 10**400, 5, 5, 5]], "coordinate 1000"),
        ([[1, 1, 10**400, 5.5, 5, 5]], "not a list of numbers: int too large"),
        ([[1, 1, 5, 5, 5]], "a polygon of 5 numbers"),
        ([[1, 1, 5, "5", 5, 5]], "not a list of numbers"),
        ([["1", "1", "5", "5", "5", "5"]], "not a list of numbers"),
        ([[[1, 1], [5, 1], [5, 5], [1, 5]]], "not a list of numbers"),
        ([[1, 1, None, 5, 5, 5]], "not a list of numbers"),
        ([SQUARE, None], "not a list of polygons"),
        (SQUARE, "not a list of polygons"),
        ("abc", "of type str"),
        (3, "of type int"),
        (np.ones(SIZE), "of type ndarray"),
        # Each of 20,000 edges across the image and back: gigabytes of pycocotools' points.
        ([[-1000, -1000, 1000, 1000] * 10_000], "an outline that is 8e[+]07 pixels long"),
    ],
)
def test_broken_polygons(segmentation, message):
    with pytest.raises(DataError, match=message):
        check_segmentation(segmentation, SIZE)
    with pytest.raises(DataError, match=message):
        read_mask(segmentation, T.TransformList([]), SIZE, SIZE)


def test_self_crossing_outlines_are_drawn_as_pycocotools_draws_them():
    bow = [2.0, 2.0, 22.0, 18.0, 22.0, 2.0, 2.0, 18.0]
    window = read_mask([bow], T.TransformList([]), SIZE, SIZE)
    expected = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([bow], *SIZE))).astype(bool)
    left, top, right, bottom = window.box()
    assert np.array_equal(window.mask, expected[top:bottom, left:right]) and window.mask.sum() == expected.sum() > 50


def test_whole_numbers():
    assert all(map(is_whole, (0, -3, 2**70, np.int64(5), np.uint8(1))))
    assert not any(map(is_whole, (True, 1.0, "1", None, [1], float("nan"), np.float32(1))))


@given(st.data(), st.tuples(*[st.integers(1, 90)] * 2), st.integers(0, 2**32 - 1))
@settings(max_examples=80, deadline=None)
def test_the_transformed_window_of_rle_equals_the_transformed_mask(data, size, seed):
    rng = np.random.default_rng(seed)
    mask = np.zeros(size, np.uint8)
    # Objects in a part of the image, some of many runs; some masks are empty.
    top, left = (int(rng.integers(side)) for side in size)
    part = mask[top : top + rng.integers(1, 40), left : left + rng.integers(1, 40)]
    part[:] = rng.random(part.shape) < rng.choice([0.0, 0.1, 0.6, 1.0])
    transforms, (height, width) = [], size
    for _ in range(data.draw(st.integers(0, 4))):
        kind = data.draw(st.sampled_from(["resize", "crop", "horizontal", "vertical", "color", "none", "pad"]))
        if kind == "resize":
            new_size = (data.draw(st.integers(1, 200)), data.draw(st.integers(1, 200)))
            transforms.append(T.ResizeTransform(height, width, *new_size))
            height, width = new_size
        elif kind == "crop":
            y0, x0 = (data.draw(st.integers(0, side - 1)) for side in (height, width))
            height, width = data.draw(st.integers(1, height - y0)), data.draw(st.integers(1, width - x0))
            transforms.append(T.CropTransform(x0, y0, width, height))
        elif kind == "pad":
            transforms.append(T.PadTransform(3, 2, 1, 4))
            height, width = height + 6, width + 4
        else:
            others = {"horizontal": T.HFlipTransform(width), "vertical": T.VFlipTransform(height)}
            transforms.append(others.get(kind, T.ColorTransform(np.copy) if kind == "color" else T.NoOpTransform()))
    transforms = T.TransformList(transforms)
    expected = MaskWindow(transforms.apply_segmentation(mask).astype(bool), 0, 0).shrink()
    found = read_mask(compress(mask), transforms, size, (height, width))
    assert (found is None) == (expected is None)
    assert expected is None or found.box() == expected.box() and np.array_equal(found.mask, expected.mask)


def test_the_window_of_an_enlarged_photograph_equals_the_transformed_mask():
    # Sizes at which Pillow's sums of steps round.
    mask = np.zeros((2160, 3840), np.uint8)
    mask[301:1207, 77:2999] = np.random.default_rng(0).random((906, 2922)) < 0.5
    for new_size in ((640, 1138), (801, 1333), (2161, 3841), (4000, 7001)):
        transforms = T.TransformList([T.ResizeTransform(*mask.shape, *new_size)])
        expected = MaskWindow(transforms.apply_segmentation(mask).astype(bool), 0, 0).shrink()
        found = read_mask(compress(mask), transforms, mask.shape, new_size)
        assert found.box() == expected.box() and np.array_equal(found.mask, expected.mask)


def test_a_small_object_in_a_large_mask_is_not_decoded_as_a_whole(monkeypatch):
    monkeypatch.setattr(mask_decoding, "decode_rle", None)
    mask = np.zeros((2160, 3840), np.uint8)
    mask[1000:1030, 2000:2040] = 1
    transforms = T.TransformList([T.HFlipTransform(3840), T.ResizeTransform(2160, 3840, 1080, 1920)])
    window = read_mask(compress(mask), transforms, mask.shape, (1080, 1920))
    assert window.box() == (900, 500, 920, 515) and window.mask.all()

"""Masks at the output size: the windows against the plain computation, bit for bit."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from sparseinst.ops import mask_resize
from sparseinst.ops.mask_output import output_masks
from sparseinst.ops.mask_resize import composed_axis, map_windows, resize_masks
from sparseinst.ops.masks import masks_to_boxes
from sparseinst.structures.mask_window import MaskWindow

SIZES = {"padded_size": (32, 64), "image_size": (30, 41), "output_size": (47, 90)}


def mask_windows(*args, **kwargs):
    return map_windows(lambda _, window: window, *args, **kwargs)


def random_probs(num_masks, size, seed=0):
    """Blobs, so that masks have an inside: noise on a coarse grid."""
    coarse = torch.randn(1, num_masks, 3, 4, generator=torch.Generator().manual_seed(seed)) * 4
    return F.interpolate(coarse, size=size, mode="bicubic")[0].sigmoid()


def whole(window, output_size):
    mask = torch.zeros(output_size, dtype=torch.bool)
    if window is not None:
        x0, y0, x1, y1 = window.box()
        mask[y0:y1, x0:x1] = torch.from_numpy(window.mask)
    return mask


def assert_windows_equal_plain(probs, padded_size, image_size, output_size, threshold, windows=mask_windows):
    # Mask by mask: of a grid of a single cell, PyTorch takes another kernel when there are more than three.
    plain = [resize_masks(p[None], padded_size, image_size, output_size, threshold)[0] for p in probs]
    found = list(windows(probs, padded_size, image_size, output_size, threshold))
    assert len(found) == len(plain)
    for window, mask in zip(found, plain):
        assert torch.equal(whole(window, output_size), mask)
        if mask.any():
            assert masks_to_boxes(mask[None])[0].tolist() == list(window.box())
        else:
            assert window is None


def test_plain_computation_by_hand():
    # A grid of two cells, 0.2 and 0.8, over 8 pixels: 0.2, 0.2, 0.275, 0.425, 0.575, 0.725, 0.8, 0.8. The image is
    # the first six; at half their size, each is the mean of two: 0.2, 0.35, 0.65.
    probs = torch.tensor([[[0.2, 0.8]]])
    whole_pixels = resize_masks(probs, (1, 8), (1, 6), (1, 6), 0.4)
    assert whole_pixels.tolist() == [[[False, False, False, True, True, True]]]
    assert resize_masks(probs, (1, 8), (1, 6), (1, 3), 0.36).tolist() == [[[False, False, True]]]
    assert resize_masks(probs, (1, 8), (1, 6), (1, 3), 0.34).tolist() == [[[False, True, True]]]
    (window,) = mask_windows(probs, (1, 8), (1, 6), (1, 3), 0.34)
    assert window.box() == (1, 0, 3, 1) and window.mask.tolist() == [[True, True]]


def test_chunks_do_not_change_the_masks(monkeypatch):
    probs = random_probs(12, (8, 16))
    at_once = resize_masks(probs, **SIZES, mask_threshold=0.45)
    monkeypatch.setattr(mask_resize, "MAX_PIXELS_AT_ONCE", 1)
    assert torch.equal(resize_masks(probs, **SIZES, mask_threshold=0.45), at_once)


@pytest.mark.parametrize(
    ("grid", "padded", "image", "output"),
    [
        ((160, 216), (640, 864), (640, 853), (480, 640)),
        ((160, 288), (640, 1152), (640, 1138), (1080, 1920)),
        ((200, 152), (800, 608), (799, 600), (799, 600)),
        ((8, 336), (32, 1344), (1, 1333), (1, 4000)),
    ],
)
def test_windows_at_the_sizes_of_photographs(grid, padded, image, output):
    probs = random_probs(12, grid)
    probs[0] = probs[0].round()
    probs[1] = 0.9
    probs[2] = 0.1
    assert_windows_equal_plain(probs, padded, image, output, 0.45)


grids = st.one_of(st.integers(1, 6), st.integers(1, 60))
sides = st.one_of(st.integers(1, 8), st.integers(1, 200))


@settings(max_examples=250, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**16),
    grid=st.tuples(grids, grids),
    image=st.tuples(sides, sides),
    padding=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    # None: the image's own size, where the second resize is left out.
    output=st.one_of(st.none(), st.tuples(sides, sides)),
    threshold=st.one_of(st.just(0.45), st.floats(0.05, 0.95)),
    kind=st.sampled_from(["noise", "blobs", "at the threshold", "steps", "saturated"]),
)
@example(0, (5, 7), (130, 131), (30, 29), None, 0.45, "at the threshold")
def test_windows_equal_the_plain_computation(seed, grid, image, padding, output, threshold, kind):
    generator = torch.Generator().manual_seed(seed)
    if kind == "noise":
        probs = (torch.randn(4, *grid, generator=generator) * 3 - 1).sigmoid()
    elif kind == "blobs":
        probs = random_probs(4, grid, seed)
    elif kind == "at the threshold":
        # Values that rounding alone puts on one side or the other.
        near = torch.tensor(threshold)
        steps = torch.stack([torch.nextafter(near, torch.tensor(0.0)), near, torch.nextafter(near, torch.tensor(1.0))])
        probs = steps[torch.randint(3, (4, *grid), generator=generator)]
        probs[0] = near
    elif kind == "steps":
        probs = torch.randint(5, (4, *grid), generator=generator) / 4
        threshold = round(threshold * 2 + 1) / 4
    else:
        probs = (torch.randint(2, (4, *grid), generator=generator) * 2e4 - 1e4).sigmoid()
    padded = (image[0] + padding[0], image[1] + padding[1])
    assert_windows_equal_plain(probs, padded, image, output or image, threshold)


def test_undecided_masks_are_computed_plainly(monkeypatch):
    calls = []
    monkeypatch.setattr(mask_resize, "resize_masks", lambda *args: calls.append(1) or resize_masks(*args))
    probs = random_probs(3, (8, 16))
    # A mask of the threshold itself, and one where a pixel has it.
    probs[0] = 0.45
    threshold = float(probs[0, 0, 0])
    assert_windows_equal_plain(probs, (32, 64), (30, 41), (147, 190), threshold)
    assert len(calls) == 1


def test_windows_of_chunks_are_the_same(monkeypatch):
    # What runs on a GPU.
    probs = random_probs(7, (8, 16))
    probs[3] = 0.1
    monkeypatch.setattr(mask_resize, "MAX_PIXELS_AT_ONCE", 2 * (32 * 64 + 47 * 90))
    assert mask_resize.reference_chunk((32, 64), (47, 90)) == 2
    assert_windows_equal_plain(probs, (32, 64), (30, 41), (47, 90), 0.45, mask_resize._windows_in_chunks)


def test_only_the_window_is_computed(monkeypatch):
    # A mask of one cell in 40 x 40, each 25 pixels wide: at most three cells' pixels each way, of blocks of any size.
    probs = torch.full((1, 40, 40), 0.01)
    probs[0, 20, 30] = 0.99
    sizes = []
    original = MaskWindow.shrink
    monkeypatch.setattr(MaskWindow, "shrink", lambda window: sizes.append(window.mask.shape) or original(window))
    assert_windows_equal_plain(probs, (160, 160), (160, 160), (1000, 1000), 0.45)
    assert 20 <= sizes[0][0] <= 75 and 20 <= sizes[0][1] <= 75


def test_masks_in_the_padding_alone_are_empty():
    probs = torch.full((2, 8, 16), 0.01)
    probs[0, :, 13:] = 0.99
    probs[1] = 0.01
    assert mask_windows(probs, **SIZES, mask_threshold=0.45) == [None, None]
    assert list(mask_windows(probs[:0], **SIZES, mask_threshold=0.45)) == []


def test_not_a_number_stays_where_it_is():
    probs = random_probs(1, (8, 16))
    probs[0, 2, 3] = float("nan")
    assert_windows_equal_plain(probs, (32, 64), (30, 41), (147, 190), 0.45)


def test_not_a_number_hides_no_edge():
    # The mask's first row and column have it; they are above the threshold elsewhere.
    probs = torch.full((1, 8, 16), 0.01)
    probs[0, 2:5, 3:9] = 0.9
    probs[0, 2, 6] = probs[0, 4, 3] = float("nan")
    assert_windows_equal_plain(probs, (32, 64), (30, 41), (147, 190), 0.45)


def test_gradients_and_autocast_do_not_matter():
    probs = random_probs(5, (8, 16))
    composed_axis.cache_clear()
    with torch.inference_mode():
        assert_windows_equal_plain(probs, *SIZES.values(), 0.45)
    assert_windows_equal_plain(probs.clone().requires_grad_(), *SIZES.values(), 0.45)
    with torch.autocast("cpu", torch.bfloat16):
        assert_windows_equal_plain(probs, *SIZES.values(), 0.45)


@pytest.mark.parametrize(
    "sizes",
    [(160, 640, 640, 1080), (216, 864, 853, 640), (3, 7, 5, 5), (1, 1, 1, 9), (9, 4, 2, 1)]
    # Here float32 puts a pixel that lies on a cell's centre a little before it.
    + [(715, 1375, 1375, 1375), (368, 176, 176, 176)],
)
def test_weights_of_an_axis(sizes):
    axis = composed_axis(*sizes)
    weights = torch.from_numpy(axis.weights)
    assert weights.shape == (sizes[-1], sizes[0])
    torch.testing.assert_close(weights.sum(1), torch.ones(sizes[-1], dtype=torch.float64), atol=1e-6, rtol=0)
    # Resizing a ramp in float32 gives the same as the matrix.
    ramp = torch.linspace(0, 1, sizes[0])[None, None]
    resized = F.interpolate(ramp, size=sizes[1], mode="linear")[:, :, : sizes[2]]
    if sizes[2] != sizes[3]:
        resized = F.interpolate(resized, size=sizes[3], mode="linear")
    torch.testing.assert_close((weights @ ramp[0, 0].double()).float(), resized[0, 0], atol=1e-6, rtol=0)
    assert (axis.first[1:] >= axis.first[:-1]).all() and (axis.last[1:] >= axis.last[:-1]).all()


@pytest.mark.parametrize(
    ("grid", "image", "output", "kept", "thin"),
    [
        ((40, 60), (160, 240), (300, 400), 2, 0),
        ((160, 216), (640, 853), (6000, 8000), 0, 0),
        ((2, 300), (8, 1200), (1, 9000), 0, 1),
        ((300, 2), (1200, 8), (9000, 1), 0, 1),
        ((2, 4), (8, 16), (1, 9000), 2, 0),
    ],
)
def test_which_weights_are_cached(grid, image, output, kept, thin, monkeypatch):
    calls = []
    original = mask_resize._windows_in_chunks
    monkeypatch.setattr(mask_resize, "_windows_in_chunks", lambda *args: calls.append(1) or original(*args))
    composed_axis.cache_clear()
    probs = torch.full((1, *grid), 0.01)
    probs[0, 0, 0] = 0.99
    assert_windows_equal_plain(probs, image, image, output, 0.45)
    assert (composed_axis.cache_info().currsize, len(calls)) == (kept, thin)


def test_thin_images_take_little_memory():
    command = [sys.executable, "-c", "from tests.ops.test_mask_resize import check_thin; check_thin(4_000_000)"]
    result = subprocess.run(command, cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


def check_thin(side):
    """Raise where masks of 1 x ``side`` and ``side`` x 1 pixels take more than 40 bytes per pixel."""
    # A defect ends in MemoryError.
    resource.setrlimit(resource.RLIMIT_DATA, (4 * 2**30, 4 * 2**30))
    torch.set_num_threads(1)
    output_masks(torch.rand(2, 8, 216), (32, 864), (1, 864), (1, 3000), 0.45, "rle")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for num_masks in (0, 2):
        probs = torch.full((num_masks, 8, 216), 0.9)
        boxes, rles, _ = output_masks(probs, (32, 864), (1, 864), (1, side), 0.45, "rle")
        assert boxes.tolist() == [[0, 0, side, 1]] * num_masks == [[0, 0, *rle["size"][::-1]] for rle in rles]
        boxes, rles, _ = output_masks(probs.mT, (864, 32), (864, 1), (side, 1), 0.45, "rle")
        assert boxes.tolist() == [[0, 0, 1, side]] * num_masks == [[0, 0, *rle["size"][::-1]] for rle in rles]
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        # Kilobytes on Linux, bytes on macOS.
        assert grown * (1 if sys.platform == "darwin" else 1024) < 40 * side, f"{num_masks} masks: {grown}"


def test_boxes_are_tight():
    masks = torch.zeros(3, 5, 7, dtype=torch.bool)
    masks[0, 1:3, 2:6] = True
    masks[1, 4, 6] = True
    masks[2] = True
    assert masks_to_boxes(masks).tolist() == [[2, 1, 6, 3], [6, 4, 7, 5], [0, 0, 7, 5]]
    assert masks_to_boxes(masks, torch.int64).dtype == torch.int64

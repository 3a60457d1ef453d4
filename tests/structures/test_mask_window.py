"""Test windows of masks, by hand and against the whole mask."""

import numpy as np

from sparseinst.structures.mask_window import MaskWindow


def test_by_hand():
    # Rows 1 to 3 and columns 2 to 3 have pixels; row 2 has none and stays.
    mask = np.zeros((5, 6), bool)
    mask[1, 2] = mask[3, 3] = True
    window = MaskWindow(mask, 0, 0).shrink()
    assert window.mask.tolist() == [[True, False], [False, False], [False, True]]
    assert (window.top, window.left, window.box()) == (1, 2, (2, 1, 4, 4))
    # A window in a larger image keeps its place in it.
    assert MaskWindow(mask, 10, 20).shrink().box() == (22, 11, 24, 14)
    assert np.shares_memory(window.mask, mask) and window.shrink().box() == window.box()


def test_empty_masks_have_no_window():
    assert MaskWindow(np.zeros((5, 6), bool), 0, 0).shrink() is None
    assert MaskWindow(np.zeros((0, 0), bool), 3, 4).shrink() is None


def test_pasting_gives_the_mask_back():
    rng = np.random.default_rng(0)
    for _ in range(50):
        mask = rng.random(rng.integers(1, 9, 2)) < 0.2
        window = MaskWindow(mask, 0, 0).shrink()
        pasted = np.zeros_like(mask)
        if window is not None:
            x0, y0, x1, y1 = window.box()
            pasted[y0:y1, x0:x1] = window.mask
            assert window.mask[0].any() and window.mask[-1].any() and window.mask.any(0)[[0, -1]].all()
        assert np.array_equal(pasted, mask)

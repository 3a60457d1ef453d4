"""The encoding of a window against pycocotools' encoding of the whole mask."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_api

from sparseinst.ops import mask_rle
from sparseinst.ops.mask_rle import encode_window
from sparseinst.structures.mask_window import MaskWindow


def encode(mask):
    """The window's and pycocotools' encoding of a mask."""
    window = MaskWindow(mask.numpy(), 0, 0).shrink()
    return encode_window(window, tuple(mask.shape)), mask_api.encode(np.asfortranarray(mask.numpy(), dtype=np.uint8))


def test_by_hand():
    # Columns of 3: 0 1 1 | 1 0 0 | 0 0 1 | 1 1 1. Runs, beginning with zeros: 1, 3, 4, 4.
    mask = torch.tensor([[0, 1, 0, 1], [1, 0, 0, 1], [1, 0, 1, 1]]).bool()
    ours, theirs = encode(mask)
    assert ours == theirs == mask_api.frPyObjects({"size": [3, 4], "counts": [1, 3, 4, 4]}, 3, 4)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**16), size=st.tuples(st.integers(1, 9), st.integers(1, 9)), share=st.floats(0.02, 1))
def test_equals_pycocotools(seed, size, share):
    mask = torch.rand(size, generator=torch.Generator().manual_seed(seed)) <= share
    if mask.any():
        ours, theirs = encode(mask)
        assert ours == theirs


def test_blocks_of_columns_do_not_change_the_encoding(monkeypatch):
    monkeypatch.setattr(mask_rle, "COLUMN_BLOCK", 2)
    for seed, share in enumerate((0.1, 0.5, 0.9, 1)):
        for size in ((1, 7), (3, 6), (5, 5)):
            mask = torch.rand(size, generator=torch.Generator().manual_seed(seed)) <= share
            ours, theirs = encode(mask)
            assert ours == theirs


def test_full_masks_and_corners():
    for size in ((1, 1), (1, 5), (5, 1), (300, 400)):
        masks = [torch.ones(size, dtype=torch.bool), torch.zeros(size, dtype=torch.bool)]
        for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
            mask = torch.zeros(size, dtype=torch.bool)
            mask[corner] = True
            masks.append(mask)
        for mask in masks:
            if mask.any():
                ours, theirs = encode(mask)
                assert ours == theirs

"""Post-processing on CUDA against the CPU: the same but for rounding at the threshold."""

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_api

from sparseinst.modeling.sparse_inst.postprocessing import detect
from sparseinst.ops import mask_resize
from tests.faults.test_large_images import crowded_outputs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

ARGUMENTS = {
    "padded_size": (640, 640), "image_size": (600, 640), "output_size": (750, 800), "cls_threshold": 0.005,
    "mask_threshold": 0.45, "max_detections": 100,
}  # fmt: skip


def on_cuda(outputs):
    return {name: tensor.cuda() for name, tensor in outputs.items()}


def test_masks_are_the_cpus_but_for_one_pixel_in_100000():
    outputs = crowded_outputs(40)
    expected, found = detect(**outputs, **ARGUMENTS), detect(**on_cuda(outputs), **ARGUMENTS)
    assert found.masks.is_cuda and torch.equal(found.prediction_idx.cpu(), expected.prediction_idx)
    assert (found.masks.cpu() != expected.masks).float().mean() <= 1e-5
    torch.testing.assert_close(found.scores.cpu(), expected.scores)
    assert torch.equal(found.boxes, mask_resize.masks_to_boxes(found.masks))


def test_encoded_masks_are_the_boolean_ones(monkeypatch):
    outputs = on_cuda(crowded_outputs(40))
    outputs["mask_logits"][5] = -5
    plain = detect(**outputs, **ARGUMENTS)
    # Chunks of 7 masks.
    monkeypatch.setattr(mask_resize, "MAX_PIXELS_AT_ONCE", 7 * (640 * 640 + 750 * 800))
    encoded = detect(**outputs, **ARGUMENTS, mask_format="rle")
    assert torch.equal(encoded.boxes, plain.boxes) and torch.equal(encoded.scores, plain.scores)
    for rle, mask in zip(encoded.masks, plain.masks.cpu().numpy(), strict=True):
        assert np.array_equal(mask_api.decode(rle), mask)

"""Pictures of many megapixels: memory with encoded masks, and that these are the boolean ones."""

import resource
import sys

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_api

from sparseinst.data.shapes import random_ellipses, rasterize
from sparseinst.inference import Predictor, to_coco_results
from sparseinst.modeling.sparse_inst.postprocessing import detect
from tests.faults.child import num_cases, run_in_child
from tests.tiny_model import tiny_cfg, tiny_model

NUM_DETECTIONS = 100
GRID = (160, 160)


def crowded_outputs(num_masks=NUM_DETECTIONS, seed=0):
    """Soft-edged ellipses with a median of 5 % of the picture, one that fills it and one that is noise."""
    generator = torch.Generator().manual_seed(seed)
    outlines = random_ellipses(np.random.default_rng(seed), GRID, num_masks)
    mask_logits = 24 * torch.from_numpy(np.stack([rasterize([outline], GRID) for outline in outlines])) - 12
    mask_logits[0] = 3
    mask_logits[1] = torch.randn(GRID, generator=generator) * 3
    return {
        "class_logits": torch.rand(num_masks, 80, generator=generator),
        "objectness_logits": torch.rand(num_masks, generator=generator),
        "mask_logits": mask_logits,
    }


def detect_in(side, num_masks=NUM_DETECTIONS, **arguments):
    return detect(
        **crowded_outputs(num_masks), padded_size=(640, 640), image_size=(640, 640), output_size=(side, side),
        cls_threshold=0.005, mask_threshold=0.45, max_detections=NUM_DETECTIONS, **arguments,
    )  # fmt: skip


def peak_gib():
    # Kilobytes on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def report_peak(side):
    before = peak_gib()
    detections = detect_in(side, mask_format="rle")
    assert len(detections.masks) == NUM_DETECTIONS
    assert all(rle["size"] == [side, side] for rle in detections.masks)
    print(f"PEAK {peak_gib() - before:.3f}")


def report_peak_of_predictor(side):
    opts = (
        "MODEL.SPARSE_INST.DECODER.NUM_MASKS", NUM_DETECTIONS, "MODEL.SPARSE_INST.CLS_THRESHOLD", 0.0,
        "MODEL.OUTPUT.MASK_FORMAT", "rle", "INPUT.MIN_SIZE_TEST", 640, "INPUT.MAX_SIZE_TEST", 1333,
    )  # fmt: skip
    predictor = Predictor(tiny_cfg(*opts), model=tiny_model(*opts))
    # What the model itself takes, at the size that it sees pictures in.
    predictor([np.zeros((640, 640, 3), np.uint8)])
    before = peak_gib()
    picture = np.random.default_rng(0).integers(256, size=(side, side, 3), dtype=np.uint8)
    (instances,) = predictor([picture])
    results = to_coco_results(instances, 1, [1, 2, 3])
    assert len(results) > NUM_DETECTIONS / 2 and results[0]["segmentation"]["size"] == [side, side]
    print(f"{len(results)} detections PEAK {peak_gib() - before:.3f}")


@pytest.mark.parametrize("function", [report_peak, report_peak_of_predictor])
def test_memory_of_encoded_masks(function):
    # Boolean ones would take 6.0 GiB at 8000 x 8000, and 0.37 at 2000 x 2000.
    side, limit = num_cases(2000, 8000), num_cases(250, 2048) / 1024
    outcome = run_in_child(function, side, timeout=1200)
    assert outcome.exit_code == 0, outcome.output
    peak = float(outcome.output.split("PEAK ")[1])
    print(f"{function.__name__}, {side}x{side}: {peak:.3f} GiB, {outcome.seconds:.1f} s")
    assert peak < limit


def test_encoded_masks_equal_boolean_ones_bit_for_bit():
    num_masks = num_cases(12, NUM_DETECTIONS)
    plain, encoded = (detect_in(2000, num_masks, mask_format=name) for name in ("bitmask", "rle"))
    assert len(encoded.masks) == len(plain.masks) == num_masks
    for rle, mask in zip(encoded.masks, plain.masks.numpy()):
        assert rle == mask_api.encode(np.asfortranarray(mask, dtype=np.uint8))
        assert np.array_equal(mask_api.decode(rle), mask)

"""The post-processing with fixed shapes against the one of all other engines."""

import pytest
import torch

from sparseinst.modeling.sparse_inst.postprocessing import dense_detections, detect
from tests.modeling.dense import assert_empty_rows_are_last
from tests.modeling.sparse_inst.test_postprocessing import random_outputs

SIZE = (32, 64)


@pytest.mark.parametrize("mask_nms_threshold", [0.0, 0.3])
@pytest.mark.parametrize(("max_detections", "score_threshold"), [(100, 0.0), (4, 0.0), (100, 0.4)])
@pytest.mark.parametrize("cls_threshold", [0.005, 0.5])
def test_it_finds_what_detect_finds(mask_nms_threshold, max_detections, score_threshold, cls_threshold):
    options = {
        "cls_threshold": cls_threshold, "mask_threshold": 0.45, "max_detections": max_detections,
        "mask_nms_threshold": mask_nms_threshold, "score_threshold": score_threshold,
    }  # fmt: skip
    images = [random_outputs(num_classes=2, seed=seed) for seed in range(3)]
    # An image without detections among them.
    images[1]["objectness_logits"] = images[1]["objectness_logits"] - 30
    batch = {name: torch.stack([image[name] for image in images]) for name in images[0]}
    dense = dense_detections(**batch, padded_size=SIZE, num_rows=100, **options)
    assert_empty_rows_are_last(dense)
    num_found = []
    for index, image in enumerate(images):
        expected = detect(**image, padded_size=SIZE, image_size=SIZE, output_size=SIZE, **options)
        found = dense["scores"][index] > 0
        num_found.append(int(found.sum()))
        assert torch.allclose(dense["scores"][index, found], expected.scores, atol=1e-6)
        assert torch.equal(dense["classes"][index, found], expected.classes)
        assert torch.equal(dense["boxes"][index, found], expected.boxes)
        assert torch.equal(dense["masks"][index, found].bool(), expected.masks)
    assert num_found[1] == 0 and num_found[0] > 0
    assert dense["scores"].shape == (3, min(12, max_detections)) and dense["masks"].shape[2:] == SIZE


def test_mask_nms_by_hand():
    # Three masks of one class over the same pixels, the second one suppressed by the first; a suppressed mask
    # suppresses none: the third overlaps the second alone.
    logits = torch.full((1, 3, 4, 8), -9.0)
    logits[0, 0, :, :4] = logits[0, 1, :, 1:6] = logits[0, 2, :, 4:8] = 9.0
    # IoU of the first and second: 12 / 24; of the second and third: 8 / 28.
    found = dense_detections(
        torch.tensor([[[4.0], [3.0], [2.0]]]), torch.full((1, 3), 9.0), logits, padded_size=(4, 8),
        cls_threshold=0.1, mask_threshold=0.5, max_detections=3, num_rows=3, mask_nms_threshold=0.25,
    )  # fmt: skip
    assert (found["scores"] > 0).tolist() == [[True, True, False]]
    assert found["boxes"][0, :2].tolist() == [[0, 0, 4, 4], [4, 0, 8, 4]]


@pytest.mark.parametrize(("max_detections", "num_rows", "num_found"), [(3, 3, 2), (3, 2, 2), (2, 2, 1)])
def test_empty_masks_take_no_row(max_detections, num_rows, num_found):
    """The best mask is a single cell of 0.6; the pixels around its center have 0.6 * 0.75 * 0.75."""
    logits = torch.full((3, 4, 8), -9.0)
    logits[0, 1, 1] = torch.tensor(0.6).logit()
    logits[1, :, :4] = logits[2, :, 4:] = 9.0
    image = {
        "class_logits": torch.tensor([[9.0], [0.0], [-1.0]]), "objectness_logits": torch.full((3,), 9.0),
        "mask_logits": logits,
    }  # fmt: skip
    options = {"cls_threshold": 0.1, "mask_threshold": 0.5, "max_detections": max_detections}
    expected = detect(**image, padded_size=(8, 16), image_size=(8, 16), output_size=(8, 16), **options)
    batch = {name: value[None] for name, value in image.items()}
    dense = dense_detections(**batch, padded_size=(8, 16), num_rows=num_rows, **options)
    assert_empty_rows_are_last(dense)
    assert dense["scores"].shape == (1, num_rows)
    found = dense["scores"][0] > 0
    assert int(found.sum()) == len(expected.scores) == num_found
    assert torch.allclose(dense["scores"][0, found], expected.scores)
    assert torch.equal(dense["boxes"][0, found], expected.boxes)
    assert torch.equal(dense["masks"][0, found].bool(), expected.masks)

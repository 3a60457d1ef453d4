"""Compare detections of fixed shapes with those of a model's own post-processing."""

import torch
from detectron2.structures import ImageList


def assert_dense_equals_postprocess(model, images, max_detections=100, network=None) -> list[int]:
    """Compare the detections of each image; return their numbers.

    Args:
        network: from the images to the detections; None: the model's network and `dense_detections`.
    """
    size = tuple(images.shape[-2:])
    with torch.no_grad():
        outputs = model.network(images)
        dense = network(images) if network else model.dense_detections(outputs, size, max_detections)
        inputs = [{"height": size[0], "width": size[1]}] * len(images)
        results = model.postprocess(outputs, inputs, ImageList(images, [size] * len(images)))
    assert_empty_rows_are_last(dense)
    counts = []
    for index, expected in enumerate(result["instances"][:max_detections] for result in results):
        found = dense["scores"][index] > 0
        counts.append(int(found.sum()))
        assert counts[-1] == len(expected)
        assert torch.allclose(dense["scores"][index, found], expected.scores, atol=1e-5)
        assert torch.equal(dense["classes"][index, found], expected.pred_classes)
        assert torch.allclose(dense["boxes"][index, found], expected.pred_boxes.tensor, atol=1e-3)
        # Other kernels resize: a pixel at the threshold may differ.
        differs = dense["masks"][index, found].bool() != expected.pred_masks
        assert differs.sum() <= 1e-3 * differs.numel()
    assert dense["masks"].shape[2:] == size and dense["masks"].dtype == torch.uint8
    return counts


def assert_empty_rows_are_last(dense) -> None:
    """Check that rows without a detection follow those with one, and have no box."""
    assert (dense["scores"].diff(dim=1) <= 0).all()
    assert not dense["boxes"][dense["scores"] == 0].any()

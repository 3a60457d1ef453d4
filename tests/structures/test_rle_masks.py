"""Test RLEMasks in Detectron2's Instances, evaluator results and visualizers."""

import json

import numpy as np
import pytest
import torch
from detectron2.data.catalog import Metadata
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Boxes, Instances
from detectron2.utils.visualizer import Visualizer
from pycocotools import mask as mask_api

from sparseinst.structures.mask_memory import MaskMemoryError
from sparseinst.structures.rle_masks import RLEMasks


def instances_of(masks, pred_masks):
    return Instances(
        tuple(masks.shape[1:]),
        pred_boxes=Boxes(torch.tensor([[0.0, 0.0, 3.0, 2.0]] * len(masks))),
        pred_masks=pred_masks,
        scores=torch.linspace(0.9, 0.1, len(masks)),
        pred_classes=torch.arange(len(masks)),
    )


@pytest.fixture
def masks():
    return torch.rand(4, 60, 80, generator=torch.Generator().manual_seed(0)) > 0.6


@pytest.fixture
def encoded(masks):
    return RLEMasks([mask_api.encode(np.asfortranarray(mask.numpy(), np.uint8)) for mask in masks], (60, 80))


def test_iterated_and_as_an_array(masks, encoded):
    assert len(encoded) == 4
    assert np.array_equal(np.stack(list(encoded)), masks.numpy())
    assert np.array_equal(np.asarray(encoded), masks.numpy()) and np.asarray(encoded).dtype == bool
    assert np.asarray(encoded, dtype=np.uint8).sum() == masks.sum()
    assert np.array_equal(encoded.areas(), masks.flatten(1).sum(1).numpy())
    assert np.asarray(encoded[:0]).shape == (0, 60, 80) and encoded[:0].areas().shape == (0,)


@pytest.mark.parametrize(
    "item",
    [2, -1, slice(1, 3), slice(0, 0), [3, 0], [True, False, True, False], torch.tensor([True, False, False, True]),
     torch.tensor([1, 1]), np.array([False] * 4), np.array([2, 0])],
    ids=str,
)  # fmt: skip
def test_indexed_as_tensors_are(masks, encoded, item):
    chosen = masks[[item]] if isinstance(item, int) else masks[item]
    assert isinstance(encoded[item], RLEMasks) and np.array_equal(np.asarray(encoded[item]), chosen.numpy())


def test_areas_of_more_masks_than_a_byte_counts(masks, encoded):
    many = RLEMasks(encoded.rles * 100, (60, 80))
    assert many.areas().tolist() == masks.sum((1, 2)).tolist() * 100


def test_in_instances(masks, encoded):
    instances = instances_of(masks, encoded)
    confident = instances[instances.scores >= 0.5]
    assert len(confident) == 2 and np.array_equal(np.asarray(confident.pred_masks), masks[:2].numpy())
    joined = Instances.cat([instances.to("cpu"), confident])
    assert np.array_equal(np.asarray(joined.pred_masks), torch.cat([masks, masks[:2]]).numpy())
    with pytest.raises(IndexError):
        encoded[4]


def test_detectron2s_results_are_the_same(masks, encoded):
    expected = instances_to_coco_json(instances_of(masks, masks), 7)
    assert instances_to_coco_json(instances_of(masks, encoded), 7) == expected
    assert json.loads(json.dumps(encoded.as_json())) == [result["segmentation"] for result in expected]


def test_detectron2s_visualizer_draws_them(masks, encoded):
    metadata = Metadata(name="rle_masks_test", thing_classes=list("abcd"))
    drawn = []
    for pred_masks in (masks, encoded):
        visualizer = Visualizer(np.zeros((60, 80, 3), np.uint8), metadata)
        # Colours of its own are random.
        metadata.thing_colors = [(255, 0, 0)] * 4
        drawn.append(visualizer.draw_instance_predictions(instances_of(masks, pred_masks)[:1]).get_image().shape)
    assert drawn[0] == drawn[1]


def test_decoding_all_masks_respects_the_limit(encoded):
    # Four masks of 60x80 take 19,200 bytes.
    limited = RLEMasks(encoded.rles, encoded.image_size, max_mask_gib=19_199 / 2**30)
    instances = instances_of(np.zeros((4, 60, 80)), limited)
    for masks in (limited, instances.to("cpu").pred_masks, Instances.cat([instances, instances]).pred_masks):
        with pytest.raises(MaskMemoryError, match="boolean masks of 60x80 pixels.*MAX_MASK_GIB.*one by one"):
            np.asarray(masks)
        with pytest.raises(MaskMemoryError):
            masks.cpu().numpy()
        assert len(list(masks)) == len(masks)
    assert np.asarray(limited[:3]).shape == (3, 60, 80)
    assert np.asarray(RLEMasks(encoded.rles, encoded.image_size, 19_200 / 2**30)).shape == (4, 60, 80)


def test_the_limit_counts_the_bytes_of_a_pixel(masks, encoded):
    limited = RLEMasks(encoded.rles, encoded.image_size, max_mask_gib=4 * 19_200 / 2**30)
    assert np.array_equal(np.asarray(limited, dtype=np.float32), masks.numpy())
    with pytest.raises(MaskMemoryError, match="4 masks with 8 bytes a pixel of 60x80 pixels.*MAX_MASK_GIB"):
        np.asarray(limited, dtype=np.float64)


def test_read_as_a_tensor(masks, encoded):
    assert np.array_equal(encoded.cpu().numpy(), masks.cpu().numpy()) and encoded.cpu().numpy().dtype == bool

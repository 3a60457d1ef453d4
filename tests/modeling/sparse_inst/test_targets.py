"""Targets from every kind of ground truth against a naive computation: whole masks in float32, padded, then reduced."""

import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.structures import BitMasks, BoxMode, ImageList, PolygonMasks
from PIL import Image
from pycocotools import mask as mask_api
from torch.nn import functional as F

from sparseinst.data import SparseInstDatasetMapper
from sparseinst.structures import gt_masks
from sparseinst.structures.gt_masks import gt_masks_tensor
from tests.tiny_model import random_input, tiny_model

# height, width, instances; an image of a pixel, one without instances, one with many.
IMAGES = [(37, 53, 3), (64, 96, 0), (50, 131, 40), (1, 1, 1), (33, 32, 2)]


def naive_targets(batch, padded_size, mask_size, antialiased):
    targets = []
    for x in batch:
        height, width = x["instances"].image_size
        masks = gt_masks_tensor(x["instances"]).float()
        masks = F.pad(masks, (0, padded_size[1] - width, 0, padded_size[0] - height))[:, None]
        mode = {"mode": "area"} if antialiased else {"mode": "bilinear", "align_corners": False}
        targets.append(F.interpolate(masks, size=mask_size, **mode)[:, 0])
    return targets


@pytest.fixture(scope="module")
def dataset_dicts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("targets")
    rng = np.random.default_rng(0)
    dicts = []
    for index, (height, width, count) in enumerate(IMAGES):
        path = folder / f"{index}.png"
        Image.new("RGB", (width, height), (90, 30, 200)).save(path)
        annotations = []
        for number in range(count):
            corners = rng.uniform(0, 1, (5, 2)) * (width, height)
            corners[:3] = np.minimum(corners[0] + ((0, 0), (3, 1), (1, 3)), (width, height))
            polygon = [0, 0, 1, 0, 1, 1, 0, 1] if height == 1 else corners.reshape(-1).tolist()
            rle = mask_api.merge(mask_api.frPyObjects([polygon], height, width))
            segmentation = [polygon] if number % 2 == 0 else rle
            annotations.append(
                {"segmentation": segmentation, "category_id": number % 3, "bbox": [0, 0, 1, 1],
                 "bbox_mode": BoxMode.XYWH_ABS}
            )  # fmt: skip
        dicts.append({"file_name": str(path), "height": height, "width": width, "annotations": annotations})
    return dicts


def map_images(dicts, mapper):
    """Without RLE where the mapper keeps polygons, which can have none."""
    if getattr(mapper, "instance_mask_format", "") == "polygon":
        dicts = [{**d, "annotations": d["annotations"][::2]} for d in dicts]
    return [mapper(d) for d in dicts]


MAPPERS = {
    "ours": SparseInstDatasetMapper(True, augmentations=[], image_format="RGB"),
    "stock bitmasks": DatasetMapper(
        True, augmentations=[], image_format="RGB", use_instance_mask=True, instance_mask_format="bitmask"
    ),
    "stock polygons": DatasetMapper(
        True, augmentations=[], image_format="RGB", use_instance_mask=True, instance_mask_format="polygon"
    ),
}
MODELS = {
    "stride 4": [],
    "stride 2": ["MODEL.SPARSE_INST.ENCODER.IN_FEATURES", ["res2", "res3"]],
    "stride 8": ["MODEL.SPARSE_INST.DECODER.SCALE_FACTOR", 1.0],
    "no whole stride": ["MODEL.SPARSE_INST.DECODER.SCALE_FACTOR", 3.0],
}


def check_targets(model, batch, images, mask_size):
    targets = model.prepare_targets(batch, images)
    expected = naive_targets(batch, images.tensor.shape[-2:], mask_size, model.antialiased_targets)
    for target, masks, x in zip(targets, expected, batch, strict=True):
        assert target.gt_masks.dtype == torch.float32 and torch.equal(target.gt_masks, masks)
        assert torch.equal(target.gt_classes, x["instances"].gt_classes)


@pytest.mark.parametrize("antialiased", [False, True])
@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("mapper_name", MAPPERS)
def test_equal_the_naive_targets_bit_for_bit(mapper_name, model_name, antialiased, dataset_dicts, monkeypatch):
    # Two or three masks at once.
    monkeypatch.setattr(gt_masks, "PIXELS_AT_ONCE", 25_000)
    model = tiny_model("MODEL.SPARSE_INST.ANTIALIASED_TARGETS", antialiased, *MODELS[model_name]).train()
    batch = map_images(dataset_dicts, MAPPERS[mapper_name])
    assert len(batch[2]["instances"]) >= 20
    for part in (batch, batch[:1], batch[3:]):
        images = model.preprocess(part)
        with torch.no_grad():
            mask_size = model.network(images.tensor)["pred_masks"].shape[-2:]
        check_targets(model, part, images, mask_size)


@pytest.mark.parametrize(
    ("divisibility", "mask_size", "antialiased"), [(96, (24, 48), True), (32, (32, 80), False), (32, (16, 43), False)]
)
def test_targets_of_other_mask_sizes(divisibility, mask_size, antialiased, dataset_dicts, monkeypatch):
    model = tiny_model("MODEL.SPARSE_INST.ANTIALIASED_TARGETS", antialiased).train()
    monkeypatch.setattr(model, "_mask_size", lambda padded_size: mask_size)
    batch = map_images(dataset_dicts, MAPPERS["ours"])
    images = ImageList.from_tensors([x["image"].float() for x in batch], divisibility)
    check_targets(model, batch, images, mask_size)


def test_losses_and_gradients_do_not_depend_on_the_mapper(dataset_dicts):
    model = tiny_model().train()
    results = []
    for name in ("ours", "stock bitmasks"):
        model.zero_grad()
        losses = model(map_images(dataset_dicts[:3], MAPPERS[name]))
        sum(losses.values()).backward()
        results.append((losses, [parameter.grad.clone() for parameter in model.parameters()]))
    for losses, gradients in results[1:]:
        assert all(torch.equal(losses[name], value) for name, value in results[0][0].items())
        assert all(torch.equal(a, b) for a, b in zip(gradients, results[0][1]))


def test_fractions_in_a_tensor_are_kept():
    model = tiny_model().train()
    x = random_input(50, 70, num_instances=2)
    x["instances"].gt_masks = torch.rand(2, 50, 70)
    check_targets(model, [x], model.preprocess([x]), (16, 24))
    x["instances"].gt_masks = BitMasks(x["instances"].gt_masks > 0.5)
    check_targets(model, [x], model.preprocess([x]), (16, 24))


@pytest.mark.parametrize("make", [random_input, lambda *args, **kwargs: as_polygons(random_input(*args, **kwargs))])
def test_whole_masks_are_made_a_few_at_a_time(make, monkeypatch):
    model = tiny_model().train()
    x = make(50, 70, num_instances=7)
    counts = []

    def counted(instances):
        counts.append(len(instances))
        return gt_masks_tensor(instances)

    monkeypatch.setattr(gt_masks, "gt_masks_tensor", counted)
    # The image is padded to 64 x 96.
    monkeypatch.setattr(gt_masks, "PIXELS_AT_ONCE", 3 * 64 * 96 + 10)
    check_targets(model, [x], model.preprocess([x]), (16, 24))
    assert counts == [3, 3, 1]


def as_polygons(x):
    boxes = x["instances"].gt_masks.get_bounding_boxes().tensor.tolist()
    x["instances"].gt_masks = PolygonMasks([[[x0, y0, x1, y0, x1, y1, x0, y1]] for x0, y0, x1, y1 in boxes])
    return x

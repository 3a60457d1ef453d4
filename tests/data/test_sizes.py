"""Test images of one pixel, strips and 8000 x 8000 pixels in mapper, tiny model and predictor."""

import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper
from PIL import Image

from sparseinst.data.dataset_mapper import SparseInstDatasetMapper
from sparseinst.data.images import ImageReadError
from sparseinst.inference import Predictor
from tests.tiny_model import tiny_cfg, tiny_model

CROP = ("INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "relative_range", "INPUT.CROP.SIZE", [0.3, 0.3])


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def one_object(path, height, width):
    outline = [0, 0, width, 0, width, height, 0, height]
    annotation = {"segmentation": [outline], "category_id": 1, "id": 5}
    return {"file_name": str(path), "height": height, "width": width, "annotations": [annotation]}


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 4000), (4000, 1), (2, 3), (8000, 8000)])
def test_every_size_is_trained_on_evaluated_and_predicted(height, width, model, tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (width, height), (200, 30, 40)).save(path, compress_level=1)
    cfg = tiny_cfg("INPUT.MAX_SIZE_TRAIN", 96, "INPUT.MAX_SIZE_TEST", 96, *CROP)
    dataset_dict = one_object(path, height, width)
    model.train()
    np.random.seed(0)
    num_mapped = 2 if height * width < 10**6 else 1
    batch = [SparseInstDatasetMapper(cfg, is_train=True)(dataset_dict) for _ in range(num_mapped)]
    for x in batch:
        # The object fills the image.
        assert len(x["instances"]) == 1 and x["instances"].gt_masks.tensor.all()
        assert x["instances"].image_size == tuple(x["image"].shape[1:])
    losses = model(batch)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())

    model.eval()
    mapped = SparseInstDatasetMapper(cfg, is_train=False)(dataset_dict)
    assert max(mapped["image"].shape) <= 96 and "instances" not in mapped
    with torch.no_grad():
        found = model([{**mapped, "height": 50, "width": 50}])[0]["instances"]
    if height * width < 10**6:  # Another test has masks of 64 million pixels.
        instances = Predictor(cfg, model=model)([path])[0]
        assert instances.image_size == (height, width)
        with torch.no_grad():
            assert len(model([mapped])[0]["instances"]) == len(instances)
    assert found.image_size == (50, 50)


@pytest.mark.parametrize(("height", "width"), [(48, 64), (100, 31), (7, 900)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_the_evaluation_s_pixels_are_those_of_detectron2(height, width, mode, image_format, tmp_path):
    path = tmp_path / "a.png"
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    cfg = tiny_cfg("INPUT.FORMAT", image_format, "INPUT.MAX_SIZE_TEST", 200)
    dataset_dict = {"file_name": str(path), "height": height, "width": width, "image_id": 3, "annotations": []}
    ours = SparseInstDatasetMapper(cfg, is_train=False)(dataset_dict)
    stock = DatasetMapper(cfg, is_train=False)(dataset_dict)
    assert torch.equal(ours.pop("image"), stock.pop("image")) and ours == stock


def test_the_limit_is_the_config_s(model, tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (20, 10)).save(path)
    cfg = tiny_cfg("INPUT.MAX_IMAGE_PIXELS", 199)
    for is_train in (True, False):
        with pytest.raises(ImageReadError, match="10 x 20 = 200 pixels, and INPUT.MAX_IMAGE_PIXELS is 199"):
            SparseInstDatasetMapper(cfg, is_train)({"file_name": str(path)})
    with pytest.raises(ImageReadError, match="INPUT.MAX_IMAGE_PIXELS is 199"):
        Predictor(cfg, model=model)([path])


def test_16_bits_reach_training_evaluation_and_predictor_rescaled(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.full((64, 64), 25700, np.uint16)).save(path)
    for is_train in (True, False):
        assert (SparseInstDatasetMapper(tiny_cfg(), is_train)({"file_name": str(path)})["image"] == 100).all()
    with pytest.raises(ValueError, match="INPUT.FORMAT is 'L'"):
        SparseInstDatasetMapper(tiny_cfg("INPUT.FORMAT", "L"), True)


@pytest.mark.parametrize("crop", [(), CROP])
def test_batches_without_any_instance_are_trained_on(crop, model, tmp_path):
    """No annotations, a crowd only, an object of no pixel, one outside, one that is cropped away."""
    path = tmp_path / "a.png"
    Image.new("RGB", (64, 48), (90, 90, 90)).save(path)
    outline = [1, 1, 9, 1, 9, 9, 1, 9]
    annotations = [
        [],
        [{"segmentation": [outline], "category_id": 0, "iscrowd": 1}],
        [{"segmentation": [[3.1, 3.1, 3.2, 3.1, 3.2, 3.2]], "category_id": 0}],
        [{"segmentation": [[100, 1, 120, 1, 120, 20]], "category_id": 0}],
        [{"segmentation": [[5, 5]], "category_id": 0}, {"segmentation": None, "category_id": 0}],
    ]
    cfg = tiny_cfg("INPUT.MAX_SIZE_TRAIN", 96, *crop)
    mapper = SparseInstDatasetMapper(cfg, is_train=True)
    np.random.seed(0)
    batch = [mapper({"file_name": str(path), "annotations": given}) for given in annotations]
    assert [len(x["instances"]) for x in batch] == [0] * len(batch)
    model.train()
    model.zero_grad()
    losses = model(batch)
    sum(losses.values()).backward()
    assert losses["loss_ce"] > 0 and losses["loss_mask"] == losses["loss_dice"] == losses["loss_objectness"] == 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_crop_that_cuts_everything_away_is_trained_on(model, tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (64, 48), (90, 90, 90)).save(path)
    corner = {"segmentation": [[0, 0, 4, 0, 4, 4, 0, 4]], "category_id": 0}
    crop = ("INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "relative", "INPUT.CROP.SIZE", [0.3, 0.3])
    cfg = tiny_cfg("INPUT.MAX_SIZE_TRAIN", 96, *crop)
    mapper = SparseInstDatasetMapper(cfg, is_train=True)
    np.random.seed(0)
    mapped = [mapper({"file_name": str(path), "annotations": [corner]}) for _ in range(40)]
    empty = [x for x in mapped if len(x["instances"]) == 0]
    assert 5 < len(empty) < 35
    losses = model.train()(empty[:2])
    assert all(torch.isfinite(loss) for loss in losses.values()) and losses["loss_mask"] == 0


def test_more_objects_than_masks_have_right_targets(model, tmp_path):
    """Nine objects, six masks: each mask is taught one object, and that one's own class."""
    path = tmp_path / "a.png"
    Image.new("RGB", (96, 96), (90, 90, 90)).save(path)
    annotations = [
        {"segmentation": [[x, y, x + 20, y, x + 20, y + 20, x, y + 20]], "category_id": index % 3}
        for index, (x, y) in enumerate((x, y) for x in (2, 34, 66) for y in (2, 34, 66))
    ]
    mapper = SparseInstDatasetMapper(True, augmentations=[], image_format="RGB")
    crowded = mapper({"file_name": str(path), "annotations": annotations})
    plain = mapper({"file_name": str(path), "annotations": annotations[:2]})
    model.train()
    images = model.preprocess([crowded, plain])
    outputs = model.network(images.tensor)
    targets = model.prepare_targets([crowded, plain], images)
    matches = model.criterion.matcher(outputs, targets)
    for (prediction_idx, gt_idx), num_objects in zip(matches, (9, 2)):
        assert len(prediction_idx) == len(gt_idx) == min(6, num_objects)
        assert len(set(prediction_idx.tolist())) == len(set(gt_idx.tolist())) == len(gt_idx)
        assert max(gt_idx.tolist()) < num_objects
    # Swapping the images changes nothing but the order: nothing of the crowded one leaks into the other.
    alone = model.criterion.matcher({key: value[1:] for key, value in outputs.items()}, targets[1:])
    assert [t.tolist() for t in alone[0]] == [t.tolist() for t in matches[1]]

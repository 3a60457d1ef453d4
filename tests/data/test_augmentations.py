"""Test resize and crop of images of one pixel and of strips, and of ordinary images as in Detectron2."""

import numpy as np
import pytest
from detectron2.data import transforms as T

from sparseinst.data.augmentations import (
    RandomCrop,
    ResizeShortestEdge,
    build_test_augmentations,
    build_train_augmentations,
)
from tests.tiny_model import tiny_cfg


def size_after(augmentation, height, width):
    image = np.zeros((height, width, 3), np.uint8)
    return augmentation.get_transform(image).apply_image(image).shape[:2]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1, 4000), (1, 853)),
        ((4000, 1), (853, 1)),
        ((2, 4000), (1, 853)),
        ((1, 1), (640, 640)),
        ((480, 640), (640, 853)),
    ],
)
def test_no_side_is_resized_to_nothing(size, expected):
    assert size_after(ResizeShortestEdge([640], 853, "choice"), *size) == expected


def test_ordinary_sizes_are_those_of_detectron2():
    rng = np.random.default_rng(0)
    for height, width in rng.integers(1, 3000, (200, 2)).tolist():
        image = np.broadcast_to(np.uint8(0), (height, width, 3))
        ours, stock = (
            kind([640], 853, "choice").get_transform(image) for kind in (ResizeShortestEdge, T.ResizeShortestEdge)
        )
        assert (ours.new_h, ours.new_w) == (max(1, stock.new_h), max(1, stock.new_w))


@pytest.mark.parametrize("size", [(64, 90), (1, 90), (64, 1)])
def test_an_image_that_has_its_size_is_not_copied(size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    augmentations = [kind([min(size)], max(size), "choice") for kind in (ResizeShortestEdge, T.ResizeShortestEdge)]
    ours, stock = (augmentation.get_transform(image) for augmentation in augmentations)
    assert ours.apply_image(image) is image
    assert np.array_equal(stock.apply_image(image), image)
    points = np.array([[0.3, 0.7], [55.5, 1.25]])
    assert np.array_equal(ours.apply_coords(points.copy()), stock.apply_coords(points.copy()))


def test_a_size_of_zero_leaves_the_image_alone():
    (resize,) = build_test_augmentations(tiny_cfg("INPUT.MIN_SIZE_TEST", 0))
    assert size_after(resize, 1, 4000) == (1, 4000)


@pytest.mark.parametrize("crop_type", ["relative", "relative_range"])
def test_a_crop_has_a_pixel(crop_type):
    np.random.seed(0)
    sizes = {RandomCrop(crop_type, (0.1, 0.1)).get_crop_size((1, 40)) for _ in range(50)}
    assert {height for height, _ in sizes} == {1} and min(width for _, width in sizes) >= 4


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (3, 5)])
@pytest.mark.parametrize(
    "crop", [("absolute_range", [384, 600]), ("relative", [0.1, 0.1]), ("relative_range", [0.1, 0.1])]
)
def test_the_training_recipe_on_images_of_any_size(size, crop):
    cfg = tiny_cfg("INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", crop[0], "INPUT.CROP.SIZE", crop[1])
    augmentations = T.AugmentationList(build_train_augmentations(cfg))
    np.random.seed(0)
    most = 0
    for _ in range(20):
        augmentation_input = T.AugInput(np.zeros((*size, 3), np.uint8))
        transforms = augmentations(augmentation_input)
        assert min(augmentation_input.image.shape[:2]) >= 1
        # A strip of 600 x 2400000 before the crop would take 4 GB.
        most = max([most, *(max(t.new_h, t.new_w) for t in transforms.transforms if isinstance(t, T.ResizeTransform))])
    assert most <= 10_000 and (most == 10_000) == (4000 in size)

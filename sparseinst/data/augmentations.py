"""Build the augmentations of training and test; they accept images of one pixel, too."""

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from PIL import Image

from sparseinst.config import check_keys
from sparseinst.data.ssd_augmentations import ssd_augmentations, to_float

# The published crop recipe: short sides in pixels before the crop, and its probability.
_SHORT_SIDES_BEFORE_CROP = (400, 500, 600)
_CROP_PROBABILITY = 0.5
# The published recipe has no limit; 1 x 4000 would become 600 x 2400000. Only images 17 times as long as wide reach it.
_LONG_SIDE_BEFORE_CROP = 10_000


class ResizeShortestEdge(T.ResizeShortestEdge):
    """Resize as Detectron2 does, but to at least one pixel a side: 1 x 4000 becomes 1 x 853, not 0 x 853.

    Images that already have the size are not copied.
    """

    def get_transform(self, image: np.ndarray) -> T.Transform:
        transform = super().get_transform(image)
        if isinstance(transform, T.NoOpTransform):
            return transform
        new_size = (max(1, transform.new_h), max(1, transform.new_w))
        if new_size == image.shape[:2]:
            return T.NoOpTransform()
        return T.ResizeTransform(*image.shape[:2], *new_size, self.interp)


class RandomCrop(T.RandomCrop):
    """Crop as Detectron2 does, but at least one pixel high and wide, however small the fraction."""

    def get_crop_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        height, width = super().get_crop_size(image_size)
        return max(1, height), max(1, width)


class ResizeToFit(T.Augmentation):
    """Resize to the largest size with the image's aspect ratio that fits, of at least one pixel a side.

    Args:
        size: (height, width) in pixels.
    """

    def __init__(self, size: Sequence[int]) -> None:
        super().__init__()
        self.size = tuple(size)

    def get_transform(self, image: np.ndarray) -> T.Transform:
        height, width = image.shape[:2]
        scale = min(self.size[0] / height, self.size[1] / width)
        new_size = [max(1, min(most, round(scale * side))) for side, most in zip((height, width), self.size)]
        return T.ResizeTransform(height, width, *new_size, Image.BILINEAR)


def build_test_augmentations(cfg: CfgNode) -> list[T.Augmentation]:
    """Return the resize of INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST as Detectron2 does, or that of FIT_SIZE_TEST."""
    if cfg.INPUT.FIT_SIZE_TEST:
        return [ResizeToFit(cfg.INPUT.FIT_SIZE_TEST)]
    return [ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, "choice")]


def model_input(image: np.ndarray, augmentations: T.AugmentationList) -> dict:
    """Return an image (h, w, 3) as a dataset mapper gives it to a model: resized, with the size that results have."""
    augmentation_input = T.AugInput(image)
    augmentations(augmentation_input)
    resized = torch.from_numpy(np.ascontiguousarray(augmentation_input.image.transpose(2, 0, 1)))
    return {"image": resized, "height": image.shape[0], "width": image.shape[1]}


def photograph_input(cfg: CfgNode) -> dict:
    """Return a black image of COCO's most frequent size, 480 x 640, as `model_input` gives it to a config's model."""
    return model_input(np.zeros((480, 640, 3), np.uint8), T.AugmentationList(build_test_augmentations(cfg)))


def build_train_augmentations(cfg: CfgNode) -> list[T.Augmentation]:
    """Return the published recipe: flip; with INPUT.CROP.ENABLED, zoom and crop half of the images; resize.

    With INPUT.SSD.ENABLED the augmentations of SSD come first. With INPUT.SQUARE_SIZE images become float32, and are
    resized to the square.

    Raises:
        ValueError: INPUT.RANDOM_FLIP, INPUT.CROP, INPUT.SSD, INPUT.MIN_SIZE_TRAIN or INPUT.MIN_SIZE_TRAIN_SAMPLING is
            invalid.
        ImportError: INPUT.SSD.ENABLED without OpenCV.
    """
    check_keys(cfg, "INPUT.RANDOM_FLIP", "INPUT.MIN_SIZE_TRAIN_SAMPLING", "INPUT.CROP.TYPE", "INPUT.CROP.SIZE")
    flip = cfg.INPUT.RANDOM_FLIP
    sampling, min_sizes = cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING, cfg.INPUT.MIN_SIZE_TRAIN
    if sampling == "range" and not isinstance(min_sizes, int) and len(min_sizes) != 2:
        raise ValueError(f"INPUT.MIN_SIZE_TRAIN is {min_sizes}; INPUT.MIN_SIZE_TRAIN_SAMPLING 'range' takes two values")

    augmentations = []
    side = cfg.INPUT.SQUARE_SIZE
    if side:
        # Of float32 images Detectron2 resizes the pixels without antialiasing.
        augmentations.append(T.ColorTransform(to_float))
    if cfg.INPUT.SSD.ENABLED:
        if not cfg.INPUT.ANNOTATION_BOXES:
            raise ValueError("INPUT.SSD.ENABLED is True: its crops need boxes; set INPUT.ANNOTATION_BOXES True")
        augmentations += ssd_augmentations(cfg.INPUT.FORMAT, cfg.INPUT.SSD.MIN_IOU)
    if flip != "none":
        augmentations.append(T.RandomFlip(horizontal=flip == "horizontal", vertical=flip == "vertical"))
    if cfg.INPUT.CROP.ENABLED:
        crop_type, crop_size = cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE
        in_pixels = crop_type.startswith("absolute")
        if len(crop_size) != 2 or not all(value == int(value) if in_pixels else value <= 1 for value in crop_size):
            expected = "two whole numbers of pixels" if in_pixels else "two fractions in (0, 1]"
            raise ValueError(f"INPUT.CROP.SIZE is {crop_size}; INPUT.CROP.TYPE {crop_type!r} takes {expected}")
        if crop_type == "absolute_range" and crop_size[0] > crop_size[1]:
            raise ValueError(f"INPUT.CROP.SIZE is {crop_size}; INPUT.CROP.TYPE 'absolute_range' takes (least, most)")
        zoom = ResizeShortestEdge(_SHORT_SIDES_BEFORE_CROP, _LONG_SIDE_BEFORE_CROP, "choice")
        zoom_and_crop = T.AugmentationList([zoom, RandomCrop(crop_type, crop_size)])
        augmentations.append(T.RandomApply(zoom_and_crop, prob=_CROP_PROBABILITY))
    resize = T.Resize((side, side)) if side else ResizeShortestEdge(min_sizes, cfg.INPUT.MAX_SIZE_TRAIN, sampling)
    augmentations.append(resize)
    return augmentations

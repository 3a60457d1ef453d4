"""Read, check, augment, load and draw data sets; this package does not know any model."""

from sparseinst.data.augmentations import build_test_augmentations, build_train_augmentations
from sparseinst.data.coco_json import (
    ClassInfo,
    check_num_classes,
    class_info,
    log_data_warnings,
    register_coco_json,
    register_user_datasets,
)
from sparseinst.data.dataset_mapper import SparseInstDatasetMapper
from sparseinst.data.images import DataError, ImageReadError, read_image, read_image_size
from sparseinst.data.loader import build_train_loader

__all__ = [
    "ClassInfo",
    "DataError",
    "ImageReadError",
    "SparseInstDatasetMapper",
    "build_test_augmentations",
    "build_train_augmentations",
    "build_train_loader",
    "check_num_classes",
    "class_info",
    "log_data_warnings",
    "read_image",
    "read_image_size",
    "register_coco_json",
    "register_user_datasets",
]

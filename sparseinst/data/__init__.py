"""Data sets: the mapper, a user's own COCO json, drawn shapes (:mod:`sparseinst.data.synthetic`)."""

from sparseinst.data.coco_json import (
    ClassInfo,
    check_num_classes,
    class_info,
    register_coco_json,
    register_user_datasets,
)
from sparseinst.data.dataset_mapper import SparseInstDatasetMapper, build_train_augmentations

__all__ = [
    "ClassInfo",
    "SparseInstDatasetMapper",
    "build_train_augmentations",
    "check_num_classes",
    "class_info",
    "register_coco_json",
    "register_user_datasets",
]

"""Read, check, augment, load and draw data sets; this package does not know any model."""

import importlib

_MODULES = {
    "ClassInfo": "coco_json",
    "DataError": "images",
    "ImageReadError": "images",
    "SparseInstDatasetMapper": "dataset_mapper",
    "build_test_augmentations": "augmentations",
    "build_train_augmentations": "augmentations",
    "build_train_loader": "loader",
    "check_num_classes": "coco_json",
    "class_info": "coco_json",
    "log_data_warnings": "coco_json",
    "read_image": "images",
    "read_image_size": "images",
    "register_coco_json": "coco_json",
    "register_user_datasets": "coco_json",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> object:
    """Import the public names at their first use (PEP 562): their modules import PyTorch, which takes seconds."""
    if name in _MODULES:
        return getattr(importlib.import_module(f"sparseinst.data.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""A handful of drawn shapes, registered with Detectron2, for tests that need a data set on disk."""

from pathlib import Path

from detectron2.data import DatasetCatalog

from sparseinst.data.coco_json import register_coco_json
from sparseinst.tools.make_shapes import write_shapes_dataset

CLASS_NAMES = ["disc", "triangle", "cross", "bar"]


def write_shapes(folder: Path, num_images: int = 8, seed: int = 0, split: str = "train") -> tuple[str, str]:
    """Write images of 64 pixels; returns json file and image folder."""
    write_shapes_dataset(folder, num_images, seed, 64, split=split)
    return str(folder / f"{split}.json"), str(folder / split)


def register_shapes(folder: Path, name: str, num_images: int = 8, seed: int = 0) -> str:
    """Write and register them; returns the name."""
    if name not in DatasetCatalog:
        register_coco_json(name, *write_shapes(folder, num_images, seed, name), for_evaluation=True)
    return name

"""Find the ground truth of an image by its file name, for drawings next to a model's predictions."""

import os
from collections.abc import Sequence
from pathlib import Path, PurePath

import torch
from detectron2.structures import Instances

from sparseinst.data.coco_json import ClassInfo, load_checked_json, to_dataset_dicts
from sparseinst.data.dataset_mapper import SparseInstDatasetMapper
from sparseinst.data.image_files import spellings
from sparseinst.data.images import MAX_IMAGE_PIXELS


class GroundTruth:
    """Hold the annotations of a COCO json.

    Args:
        json_file: in COCO's instances format.
        max_image_pixels: larger images are refused before they are decoded (``INPUT.MAX_IMAGE_PIXELS``).
        class_names: of a model, in the order of its class indices; None: those of the json, by category id.

    Raises:
        ValueError: the file does not exist, has a flaw that stops (see sparseinst.data.coco_checks), or has other
            classes than the model.
    """

    def __init__(
        self,
        json_file: str | os.PathLike,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        class_names: Sequence[str] | None = None,
    ) -> None:
        content, _ = load_checked_json(Path(json_file))
        categories = sorted(content["categories"], key=lambda category: category["id"])
        classes = ClassInfo(*([category[key] for category in categories] for key in ("name", "id")))
        ids = classes.category_ids if class_names is None else classes.category_ids_of(class_names, str(json_file))
        # From the json's class indices.
        self._class_indices = torch.tensor([ids.index(id) for id in classes.category_ids])
        self._images_of_name: dict[str, list[dict]] = {}
        for image in to_dataset_dicts(content, ""):
            for name in {PurePath(name).name for name in spellings(image["file_name"])}:
                self._images_of_name.setdefault(name, []).append(image)
        self._mapper = SparseInstDatasetMapper(
            is_train=True, augmentations=[], image_format="RGB", max_image_pixels=max_image_pixels
        )

    def find(self, path: str | os.PathLike) -> Instances | None:
        """Return the ``pred_boxes``, ``pred_masks`` and ``pred_classes`` of an image in its own size, without crowds.

        Args:
            path: of the image; it must end with the json's ``file_name``.

        Returns:
            The instances; None where the json does not have the image.

        Raises:
            DataError: an annotation is broken, or the image cannot be read or its size differs from the json's.
        """
        parts = PurePath(os.path.abspath(path)).parts
        for image in self._images_of_name.get(parts[-1], []):
            names = [PurePath(name).parts for name in list(spellings(image["file_name"]))[:5]]
            if any(parts[-len(name) :] == name for name in names):
                instances = self._mapper({**image, "file_name": os.fspath(path)})["instances"]
                return Instances(
                    instances.image_size,
                    pred_boxes=instances.gt_boxes,
                    pred_masks=instances.gt_masks.tensor,
                    pred_classes=self._class_indices[instances.gt_classes],
                )
        return None

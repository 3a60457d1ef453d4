"""Ground truth of pictures by their file names, to be drawn beside what a model finds."""

import os
from pathlib import Path, PurePath

from detectron2.structures import Instances

from sparseinst.data.coco_json import load_checked_json, to_dataset_dicts
from sparseinst.data.dataset_mapper import SparseInstDatasetMapper


class GroundTruth:
    """The annotations of a COCO json.

    Args:
        json_file: in COCO's instances format.

    Attributes:
        class_names: in the order of the class indices.

    Raises:
        ValueError: there is no such file, or something is wrong with it that stops.
    """

    def __init__(self, json_file: str | os.PathLike) -> None:
        content, _ = load_checked_json(Path(json_file))
        categories = sorted(content["categories"], key=lambda category: category["id"])
        self.class_names = [category["name"] for category in categories]
        self._images_of_name: dict[str, list[dict]] = {}
        for image in to_dataset_dicts(content, ""):
            self._images_of_name.setdefault(PurePath(image["file_name"]).name, []).append(image)
        self._mapper = SparseInstDatasetMapper(is_train=True, augmentations=[], image_format="RGB")

    def find(self, picture: str | os.PathLike) -> Instances | None:
        """The instances of a picture, in its own size: ``pred_boxes``, ``pred_masks``, ``pred_classes``; no crowds.

        Args:
            picture: path; the json's ``file_name`` must be its end.

        Returns:
            None where the json does not have the picture.

        Raises:
            DataError: an annotation is broken, or the picture cannot be read or has another size than the json says.
        """
        parts = PurePath(os.path.abspath(picture)).parts
        for image in self._images_of_name.get(parts[-1], []):
            name = PurePath(image["file_name"]).parts
            if parts[-len(name) :] == name:
                instances = self._mapper({**image, "file_name": os.fspath(picture)})["instances"]
                return Instances(
                    instances.image_size,
                    pred_boxes=instances.gt_boxes,
                    pred_masks=instances.gt_masks.tensor,
                    pred_classes=instances.gt_classes,
                )
        return None

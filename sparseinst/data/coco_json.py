"""A user's own COCO json and image folder as a Detectron2 data set, and the classes that it has."""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

_logger = logging.getLogger(__name__)

_IMAGE_KEYS = ("id", "file_name", "height", "width")
_CATEGORY_KEYS = ("id", "name")
# Reading and training need the first three; COCO's evaluation reads the others too.
_ANNOTATION_KEYS = ("id", "image_id", "category_id")
_EVALUATED_ANNOTATION_KEYS = ("bbox", "area", "iscrowd", "segmentation")


class ClassInfo(NamedTuple):
    """The classes of a data set, in the order of the model's class indices.

    Its dict form, {"names": [...], "category_ids": [...]}, is what `classes.json` and checkpoints hold.
    """

    names: list[str]
    category_ids: list[int]  # of the COCO json; may have gaps

    def save(self, path: str | Path) -> None:
        """Write the classes as JSON."""
        Path(path).write_text(json.dumps(self._asdict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "ClassInfo":
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: there is no such file, or it holds something else.
        """
        content = _read_json(Path(path))
        if not isinstance(content, dict) or set(content) != set(cls._fields):
            raise ValueError(f"{path} is no list of classes; expected a JSON object with the keys {cls._fields}")
        info = cls(**content)
        if not all(isinstance(values, list) for values in info) or len(info.names) != len(info.category_ids):
            raise ValueError(f"{path}: 'names' and 'category_ids' must be lists of one length")
        return info


def register_coco_json(
    name: str, json_file: str | Path, image_root: str | Path, *, for_evaluation: bool = False
) -> None:
    """Register a COCO json and its image folder under a name, as Detectron2's `register_coco_instances`, but checked.

    Unlike there the metadata has the class names and category ids at once, and a second call with the same json file
    reads it again. A json without `annotations` is registered as images to be segmented: COCOEvaluator writes its
    results and evaluates nothing.

    Args:
        name: of the data set, for DATASETS.TRAIN and DATASETS.TEST.
        json_file: in COCO's instances format; category ids may have gaps.
        image_root: the folder that the json's `file_name` are relative to.
        for_evaluation: also ask for the fields that only COCO's evaluation reads.

    Raises:
        ValueError: a path does not exist, the json is broken or lacks a field, or the name is another data set's.
    """
    json_file, image_root = (Path(path).expanduser().resolve() for path in (json_file, image_root))
    _register(name, json_file, image_root, for_evaluation, "json_file", "image_root")


def register_user_datasets(cfg: CfgNode, splits: Sequence[str] = ("TRAIN", "TEST")) -> None:
    """Register the data that DATASETS.TRAIN_JSON and the like name, and set DATASETS.TRAIN and DATASETS.TEST to it.

    The names follow from the paths, so that all processes of a run have the same ones. Without such keys nothing is
    changed.

    Args:
        cfg: not frozen; changed in place.
        splits: the parts to look at; ("TEST",) where nothing is trained.

    Raises:
        ValueError: only one of a part's two keys is set, the training data has no annotations, or
            :func:`register_coco_json` refuses the data.
    """
    for split in splits:
        json_key, images_key = f"DATASETS.{split}_JSON", f"DATASETS.{split}_IMAGES"
        json_value, images_value = cfg.DATASETS[f"{split}_JSON"], cfg.DATASETS[f"{split}_IMAGES"]
        if not json_value and not images_value:
            continue
        if not json_value or not images_value:
            given, missing = (json_key, images_key) if json_value else (images_key, json_key)
            raise ValueError(f"{given} is set and {missing} is not; a data set needs both")
        json_file, image_root = (Path(value).expanduser().resolve() for value in (json_value, images_value))
        digest = hashlib.sha1(f"{json_file}\n{image_root}".encode()).hexdigest()[:8]
        name = f"user_{re.sub(r'[^A-Za-z0-9_-]+', '_', json_file.stem)}_{digest}"
        num_annotations = _register(name, json_file, image_root, split == "TEST", json_key, images_key)
        if split == "TRAIN" and num_annotations == 0:
            raise ValueError(f"{json_key}: {json_file} has no annotations to train on")
        cfg.DATASETS[split] = (name,)


def class_info(dataset_name: str) -> ClassInfo:
    """The classes of a registered data set, which is loaded where its metadata does not have them yet.

    Raises:
        ValueError: the name is not registered, its files cannot be read, or it has no classes.
    """
    if dataset_name not in DatasetCatalog:
        raise ValueError(
            f"There is no data set {dataset_name!r} (DATASETS.TRAIN, DATASETS.TEST). Register it, or give your own "
            "data as DATASETS.TRAIN_JSON and DATASETS.TRAIN_IMAGES, DATASETS.TEST_JSON and DATASETS.TEST_IMAGES"
        )
    metadata = MetadataCatalog.get(dataset_name)
    # Detectron2's register_coco_instances fills in both only when the json is read; other data sets may have no ids.
    has_ids = metadata.get("thing_dataset_id_to_contiguous_id") is not None or metadata.get("evaluator_type") != "coco"
    if metadata.get("thing_classes") is None or not has_ids:
        try:
            DatasetCatalog.get(dataset_name)
        except OSError as error:
            raise ValueError(f"The data set {dataset_name!r} cannot be read: {error}") from error
    names = metadata.get("thing_classes")
    if not names:
        raise ValueError(f"The data set {dataset_name!r} has no class names (thing_classes of its metadata)")
    index_of_id = metadata.get("thing_dataset_id_to_contiguous_id")
    if index_of_id is None:
        # Without the map LVISEvaluator adds 1 to our indices, and COCOEvaluator takes them as they are.
        first_id = 1 if metadata.get("evaluator_type") == "lvis" else 0
        return ClassInfo(list(names), list(range(first_id, first_id + len(names))))
    return ClassInfo(list(names), sorted(index_of_id, key=index_of_id.__getitem__))


def check_num_classes(cfg: CfgNode, splits: Sequence[str] = ("TRAIN", "TEST")) -> None:
    """Check MODEL.SPARSE_INST.DECODER.NUM_CLASSES against all data sets of DATASETS.TRAIN and DATASETS.TEST.

    Args:
        cfg: after :func:`register_user_datasets`.
        splits: the parts to look at.

    Raises:
        ValueError: two data sets have different classes, or their number is not the model's; the message has the
            value to set. Or a data set is not registered.
    """
    infos = {(f"DATASETS.{split}", name): class_info(name).names for split in splits for name in cfg.DATASETS[split]}
    if not infos:
        return
    (first_key, first_name), first_names = next(iter(infos.items()))
    for (key, name), names in infos.items():
        if names != first_names:
            raise ValueError(
                f"{key} {name!r} has {_count(names)}, but {first_key} {first_name!r} has {_count(first_names)}: "
                f"one model needs the same classes in the same order (set {key}, or {key}_JSON and {key}_IMAGES)"
            )
    num_classes = cfg.MODEL.SPARSE_INST.DECODER.NUM_CLASSES
    if len(first_names) != num_classes:
        raise ValueError(
            f"{first_key} {first_name!r} has {_count(first_names)}, but MODEL.SPARSE_INST.DECODER.NUM_CLASSES is "
            f"{num_classes}: set MODEL.SPARSE_INST.DECODER.NUM_CLASSES {len(first_names)}"
        )


def _count(names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {'class' if len(names) == 1 else 'classes'} ({shown})"


def _register(
    name: str, json_file: Path, image_root: Path, for_evaluation: bool, json_key: str, images_key: str
) -> int:
    """As :func:`register_coco_json`, with names of the two paths for messages; returns the number of annotations."""
    if not json_file.is_file():
        raise ValueError(f"{json_key}: there is no file {json_file}")
    if not image_root.is_dir():
        raise ValueError(f"{images_key}: there is no folder {image_root}")
    known_as = MetadataCatalog.get(name).get("json_file") if name in MetadataCatalog else None
    if name in DatasetCatalog and known_as != str(json_file):
        raise ValueError(f"The name {name!r} is already that of another data set ({known_as}); take another name")

    content = load_checked_json(json_file, for_evaluation)
    first_image = content["images"][0]["file_name"]
    if not (image_root / first_image).is_file():
        raise ValueError(f"{images_key}: {image_root} has no file {first_image!r}, the first image of {json_file}")

    # Metadata cannot be changed once set, so a data set that is registered again gets new ones.
    DatasetCatalog.pop(name, None)
    MetadataCatalog.pop(name, None)
    categories = sorted(content["categories"], key=lambda category: category["id"])
    MetadataCatalog.get(name).set(
        json_file=str(json_file),
        image_root=str(image_root),
        evaluator_type="coco",
        thing_classes=[category["name"] for category in categories],
        thing_dataset_id_to_contiguous_id={category["id"]: index for index, category in enumerate(categories)},
    )
    # Annotation ids are read for the messages of our mapper.
    DatasetCatalog.register(
        name, lambda: load_coco_json(str(json_file), str(image_root), name, extra_annotation_keys=["id"])
    )
    return len(content.get("annotations", []))


def load_checked_json(json_file: Path, for_evaluation: bool = False) -> dict:
    """Read a COCO json, with `images`, `categories` and, unless it is to be segmented only, `annotations`.

    Args:
        json_file: in COCO's instances format.
        for_evaluation: also ask for the fields that only COCO's evaluation reads.

    Raises:
        ValueError: there is no such file, it is broken, or it lacks a field.
    """
    content = _read_json(json_file)
    _check_content(content, json_file, for_evaluation)
    return content


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"There is no file {path}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of the text's encoding as well as of the JSON
        raise ValueError(f"{path} is not valid JSON (cut off?): {error}") from error


def _check_content(content: Any, json_file: Path, for_evaluation: bool) -> None:
    """Everything that Detectron2 or pycocotools would answer with a bare KeyError or assertion, perhaps hours later."""
    if not isinstance(content, dict):
        raise ValueError(
            f"{json_file} holds {type(content).__name__}; expected COCO's object with 'images', 'annotations' and "
            "'categories' (a list is a results file, or another format)"
        )
    for part in ("images", "categories"):
        if not content.get(part):
            raise ValueError(f"{json_file} has no {part!r}; expected COCO's object with 'images' and 'categories'")
    annotations = content.get("annotations", [])
    needed = _ANNOTATION_KEYS + _EVALUATED_ANNOTATION_KEYS * for_evaluation
    image_ids = _check_entries(content["images"], "images", _IMAGE_KEYS, json_file)
    category_ids = _check_entries(content["categories"], "categories", _CATEGORY_KEYS, json_file)
    annotation_ids = _check_entries(annotations, "annotations", needed, json_file)
    for category in content["categories"]:
        if not isinstance(category["name"], str):
            raise ValueError(
                f"{json_file}: the name of category {category['id']} is {category['name']!r}; expected text"
            )
    if annotations and not any(annotation.get("segmentation") for annotation in annotations):
        raise ValueError(f"{json_file}: no annotation has a segmentation; SparseInst needs masks, boxes do not do")
    for annotation in annotations:
        if annotation["category_id"] not in category_ids:
            raise ValueError(
                f"{json_file}: annotation {annotation['id']} has category_id {annotation['category_id']}, which is not "
                f"in 'categories' ({sorted(category_ids)[:5]}, ...)"
            )
        if annotation["image_id"] not in image_ids:
            raise ValueError(
                f"{json_file}: annotation {annotation['id']} has image_id {annotation['image_id']}, which is not in "
                "'images'"
            )
        segmentation = annotation.get("segmentation")
        if isinstance(segmentation, list) and not all(isinstance(polygon, list) for polygon in segmentation):
            raise ValueError(
                f"{json_file}: the segmentation of annotation {annotation['id']} is not a list of polygons "
                "[[x0, y0, x1, y1, ...], ...]"
            )
        if annotation.get("ignore"):
            raise ValueError(
                f"{json_file}: annotation {annotation['id']} has 'ignore', which Detectron2 refuses; use 'iscrowd'"
            )
    if for_evaluation and 0 in annotation_ids:
        _logger.warning(
            "%s: annotation id 0 stands for 'not matched' in COCO's evaluation, so this object counts as missed; "
            "number the annotations from 1",
            json_file,
        )


def _check_entries(entries: Any, part: str, needed: Iterable[str], json_file: Path) -> set[int]:
    """Check that all entries have the needed keys and ids of their own. Returns the ids."""
    if not isinstance(entries, list):
        raise ValueError(f"{json_file}: {part!r} is a {type(entries).__name__}; expected a list")
    for index, entry in enumerate(entries):
        missing = [key for key in needed if not isinstance(entry, dict) or key not in entry]
        if missing:
            raise ValueError(f"{json_file}: entry {index} of {part!r} has no {', '.join(map(repr, missing))}")
    ids = {entry["id"] for entry in entries}
    if len(ids) != len(entries):
        raise ValueError(f"{json_file}: {len(entries) - len(ids)} ids of {part!r} are not unique")
    return ids

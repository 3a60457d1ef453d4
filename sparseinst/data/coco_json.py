"""A user's own COCO json and image folder as a Detectron2 data set, and the classes that it has."""

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from pycocotools import mask as coco_mask

from sparseinst import config
from sparseinst.data.coco_checks import Finding, JsonReport, check_content

_logger = logging.getLogger(__name__)

NOTHING_TO_TRAIN_ON = "has no annotations to train on: no object that is not a crowd and has a mask"

# Problems that an error message shows; check_dataset shows more.
_NUM_SHOWN = 3


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
        return cls.from_content(read_json(Path(path)), str(path))

    @classmethod
    def from_content(cls, content: Any, source: str) -> "ClassInfo":
        """The classes of a dict form that may be anything.

        Args:
            content: what was found.
            source: where, for messages.

        Raises:
            ValueError: it is something else.
        """
        if not isinstance(content, dict) or set(content) != set(cls._fields):
            raise ValueError(f"{source} has no list of classes; expected a dict with the keys {cls._fields}")
        info = cls(**content)
        if not all(isinstance(values, list) for values in info) or len(info.names) != len(info.category_ids):
            raise ValueError(f"{source}: 'names' and 'category_ids' must be lists of one length")
        if not all(isinstance(name, str) for name in info.names) or not all(type(i) is int for i in info.category_ids):
            raise ValueError(f"{source}: 'names' must be text, and 'category_ids' whole numbers")
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
    for warning in MetadataCatalog.get(name).data_warnings:
        _logger.warning(warning)


def register_user_datasets(cfg: CfgNode, splits: Sequence[str] = ("TRAIN", "TEST")) -> None:
    """Register the data that DATASETS.TRAIN_JSON and the like name, and set DATASETS.TRAIN and DATASETS.TEST to it.

    The names follow from the paths, so that all processes of a run have the same ones. Without such keys nothing is
    changed. What is worth a warning is kept for :func:`log_data_warnings`.

    Args:
        cfg: not frozen; changed in place.
        splits: the parts to look at; ("TEST",) where nothing is trained.

    Raises:
        ValueError: only one of a part's two keys is set, the training data has no object to learn, or
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
        report = _register(name, json_file, image_root, split == "TEST", json_key, images_key)
        if split == "TRAIN" and not report.num_instances.total():
            raise ValueError(f"{json_key}: {json_file} {NOTHING_TO_TRAIN_ON}")
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
    """Check the model's number of classes against all data sets of DATASETS.TRAIN and DATASETS.TEST.

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
    key, num_classes = config.num_classes(cfg) or (None, len(first_names))
    if len(first_names) != num_classes:
        raise ValueError(
            f"{first_key} {first_name!r} has {_count(first_names)}, but {key} is "
            f"{num_classes}: set {key} {len(first_names)}"
        )


def _count(names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {'class' if len(names) == 1 else 'classes'} ({shown})"


def log_data_warnings(cfg: CfgNode, splits: Sequence[str] = ("TRAIN", "TEST")) -> None:
    """Log what a user's own data have that can be used, but perhaps is not meant; a line each.

    Annotations that are left out; images with more objects than the model has predictions for.

    Args:
        cfg: after :func:`register_user_datasets`.
        splits: the parts to look at.
    """
    limit = config.max_instances(cfg)
    for split in splits:
        for name in cfg.DATASETS[split]:
            metadata = MetadataCatalog.get(name)
            crowded = crowded_warning(metadata.get("num_instances", Counter()), limit)
            for warning in (*metadata.get("data_warnings", ()), crowded and f"{metadata.json_file}: {crowded}"):
                if warning:
                    _logger.warning("DATASETS.%s: %s", split, warning)


def crowded_warning(num_instances: Counter[int], limit: tuple[str, int] | None) -> str | None:
    """What to say where images have more objects than a model has predictions; None where none has.

    Args:
        num_instances: objects of each image, by image id.
        limit: the key and the most instances that the model can learn, from config.max_instances.
    """
    key, num_masks = limit or (None, float("inf"))
    crowded = [count for count in num_instances.values() if count > num_masks]
    if not crowded:
        return None
    return (
        f"{len(crowded)} of {len(num_instances)} images with objects have more of them than "
        f"{key}, which is {num_masks}: of an image no more are learned, and no more are "
        f"found. {key} {max(crowded)} would hold all"
    )


def _register(
    name: str, json_file: Path, image_root: Path, for_evaluation: bool, json_key: str, images_key: str
) -> JsonReport:
    """As :func:`register_coco_json`, with names of the two paths for messages; warnings are left to the metadata."""
    if not json_file.is_file():
        raise ValueError(f"{json_key}: there is no file {json_file}")
    if not image_root.is_dir():
        raise ValueError(f"{images_key}: there is no folder {image_root}")
    known_as = MetadataCatalog.get(name).get("json_file") if name in MetadataCatalog else None
    if name in DatasetCatalog and known_as != str(json_file):
        raise ValueError(f"The name {name!r} is already that of another data set ({known_as}); take another name")

    content = read_json(json_file)
    report = check_content(content, for_evaluation)
    raise_problems(report.problems(), json_file)
    absent = missing_files([image["file_name"] for image in content["images"]], image_root)
    if absent:
        raise ValueError(
            f"{images_key}: {image_root} has no file {absent[0]!r} ({len(absent)} of the {len(content['images'])} "
            f"images of {json_file} are not there); correct the folder, or remove them from the json"
        )

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
        data_warnings=_describe_warnings(report.findings, json_file, for_evaluation),
        num_instances=report.num_instances,
    )
    DatasetCatalog.register(name, lambda: to_dataset_dicts(read_json(json_file), image_root))
    return report


def raise_problems(problems: list[Finding], json_file: Path) -> None:
    """Raises ValueError, with the first few in its one line, where there are problems."""
    if not problems:
        return
    shown = "; ".join(problem.message for problem in problems[:_NUM_SHOWN])
    more = len(problems) - _NUM_SHOWN
    rest = f"; and {more} more problems, which python -m sparseinst.tools.check_dataset lists" if more > 0 else ""
    raise ValueError(f"{json_file}: {shown}{rest}")


def _describe_warnings(findings: list[Finding], json_file: Path, for_evaluation: bool) -> list[str]:
    """A line for what is left out; another for anything else."""
    places: dict[str, list[str]] = {}
    warnings = []
    for finding in findings:
        if finding.kind == "annotation id 0":
            warnings.append(f"{json_file}: {finding.message}")
        elif not finding.stops:
            places.setdefault(finding.kind, []).append(finding.message)
    if places:
        parts = [f"{len(where)} with {kind} (the first: {where[0]})" for kind, where in places.items()]
        what = "annotations that nothing can match" if for_evaluation else "annotations that are left out"
        warnings.append(f"{json_file}: {what}: {', '.join(parts)}")
    return warnings


def missing_files(file_names: list[str], image_root: Path) -> list[str]:
    """Those of a folder's files that are not there; each folder is listed once, since many files may be far away."""
    present: dict[str, set[str]] = {}
    absent = []
    for file_name in file_names:
        folder, base = os.path.split(file_name)
        if folder not in present:
            path = image_root / folder
            present[folder] = set(os.listdir(path)) if path.is_dir() else set()
        # The second question is for file systems to which A.jpg is a.jpg.
        if base not in present[folder] and not (image_root / file_name).is_file():
            absent.append(file_name)
    return absent


def to_dataset_dicts(content: dict, image_root: str | Path) -> list[dict]:
    """The images of a COCO json in Detectron2's standard format, as its `load_coco_json` makes them.

    Unlike there no optional field can make it fail; ids of annotations are kept, for messages; annotations without a
    mask are left out.

    Args:
        content: what :func:`load_checked_json` returns.
        image_root: the folder that `file_name` are relative to.
    """
    categories = sorted(category["id"] for category in content["categories"])
    class_of_id = {category_id: index for index, category_id in enumerate(categories)}
    annotations_of_image: dict[int, list[dict]] = {image["id"]: [] for image in content["images"]}
    for annotation in content.get("annotations", []):
        segmentation = annotation.get("segmentation")
        if isinstance(segmentation, list):
            segmentation = [polygon for polygon in segmentation if len(polygon) >= 6]
        elif segmentation and isinstance(segmentation["counts"], list):
            # Detectron2's own mapper reads compressed RLE only.
            segmentation = coco_mask.frPyObjects(segmentation, *segmentation["size"])
        if segmentation:
            kept = {key: annotation[key] for key in ("id", "iscrowd", "bbox") if key in annotation}
            kept.update(
                bbox_mode=BoxMode.XYWH_ABS,
                category_id=class_of_id[annotation["category_id"]],
                segmentation=segmentation,
            )
            annotations_of_image[annotation["image_id"]].append(kept)
    return [
        {
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": annotations_of_image[image["id"]],
        }
        for image in sorted(content["images"], key=lambda image: image["id"])
    ]


def load_checked_json(json_file: Path, for_evaluation: bool = False) -> dict:
    """Read a COCO json, with `images`, `categories` and, unless it is to be segmented only, `annotations`.

    Args:
        json_file: in COCO's instances format.
        for_evaluation: also check the fields that only COCO's evaluation reads.

    Raises:
        ValueError: there is no such file, it cannot be read, or something is wrong with it that stops
            (:mod:`sparseinst.data.coco_checks` says what).
    """
    content = read_json(json_file)
    raise_problems(check_content(content, for_evaluation).problems(), json_file)
    return content


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises ValueError where there is no such file, or it cannot be read."""
    if not path.is_file():
        raise ValueError(f"There is no file {path}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is no COCO json: its lists lie too deep in one another") from error
    except ValueError as error:  # of the text's encoding as well as of the JSON
        raise ValueError(f"{path} is not valid JSON (cut off?): {error}") from error

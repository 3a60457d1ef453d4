"""Register a COCO json and its image folder as a Detectron2 data set, and find its classes."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from pycocotools import mask as coco_mask

from sparseinst import config
from sparseinst.checkpoint.atomic_write import write_text_atomically
from sparseinst.data.coco_checks import LEFT_OUT, Finding, JsonReport, check_content
from sparseinst.data.crowded_images import crowded_warning, instances_of_images
from sparseinst.data.image_files import absent_findings, find_files, name_findings, sample_findings, with_found_names
from sparseinst.data.json_file import read_json
from sparseinst.data.other_formats import describe_path
from sparseinst.data.val_split import register_parts

_logger = logging.getLogger(__name__)

NOTHING_TO_TRAIN_ON = "has no annotations to train on: no object that is not a crowd and has a mask"

# Most problems, and most class names, in one error message.
_NUM_SHOWN = 3
_NAMES_SHOWN = 30


class ClassInfo(NamedTuple):
    """The classes of a data set, in the order of the model's class indices.

    `classes.json` and checkpoints hold its dict form, {"names": [...], "category_ids": [...]}.

    Attributes:
        names: of the classes.
        category_ids: of the COCO json; may have gaps.
    """

    names: list[str]
    category_ids: list[int]

    def category_ids_of(self, names: Sequence[str], source: str) -> list[int]:
        """Return the category id of each of a model's classes, matched by name.

        Args:
            names: of the model's classes, in the model's order.
            source: the data set of these classes, for the error.

        Raises:
            ValueError: the names are others, or several classes have one name and the order differs.
        """
        if list(names) == self.names:
            return self.category_ids
        if sorted(names) != sorted(self.names) or len(set(names)) < len(names):
            raise ValueError(
                f"The model was trained on the {_all_names(names)}, but the data set {source!r} has the "
                f"{_all_names(self.names)}: evaluate on data with the classes of the model, or train on these data"
            )
        id_of = dict(zip(self.names, self.category_ids))
        return [id_of[name] for name in names]

    def save(self, path: str | Path) -> None:
        """Write the classes as JSON."""
        write_text_atomically(path, json.dumps(self._asdict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "ClassInfo":
        """Read a file that :meth:`save` wrote. Raise ValueError where it does not exist or holds something else."""
        return cls.from_content(read_json(Path(path)), str(path))

    @classmethod
    def from_content(cls, content: Any, source: str) -> "ClassInfo":
        """Convert a dict form, which may be anything. Raise ValueError, which names the source, where it is wrong."""
        if not isinstance(content, dict) or set(content) != set(cls._fields):
            raise ValueError(f"{source} has no list of classes; expected a dict with the keys {cls._fields}")
        info = cls(**content)
        if not all(isinstance(values, list) for values in info) or len(info.names) != len(info.category_ids):
            raise ValueError(f"{source}: 'names' and 'category_ids' must be lists of one length")
        if not all(isinstance(name, str) for name in info.names) or not all(type(i) is int for i in info.category_ids):
            raise ValueError(f"{source}: 'names' must be text, and 'category_ids' must be whole numbers")
        return info


def register_coco_json(
    name: str, json_file: str | Path, image_root: str | Path, *, for_evaluation: bool = False
) -> None:
    """Check and register a COCO json and its image folder.

    Replaces Detectron2's `register_coco_instances`, which checks nothing: of the 57 flaws in tests/data/flawed_json.py
    that stop a training here, 21 are accepted silently there, 4 crash the process in pycocotools, and most others end
    in a bare KeyError, TypeError or AssertionError. This function sets the class names at once, and a second call with
    the same json reads it again. A json without `annotations` is registered for prediction: COCOEvaluator writes the
    results and computes no AP.

    Args:
        name: of the data set, for DATASETS.TRAIN and DATASETS.TEST.
        json_file: in COCO's instances format; category ids may have gaps.
        image_root: the folder that the json's `file_name` are relative to.
        for_evaluation: also require the fields that only COCO's evaluation reads.

    Raises:
        ValueError: a path does not exist, the json is broken or lacks a field, or the name belongs to another data set.
    """
    json_file, image_root = (Path(path).expanduser().resolve() for path in (json_file, image_root))
    _register(name, json_file, image_root, for_evaluation, "json_file", "image_root")
    for warning in MetadataCatalog.get(name).data_warnings:
        _logger.warning(warning)


def register_user_datasets(cfg: CfgNode, splits: Sequence[str] = ("TRAIN", "TEST")) -> None:
    """Register the data of DATASETS.TRAIN_JSON, TRAIN_IMAGES, TEST_JSON, TEST_IMAGES; set DATASETS.TRAIN and TEST.

    The names are derived from the paths, so all processes of a run agree on them. A split without these keys is not
    changed. With DATASETS.VAL_SHARE both splits are parts of TRAIN_JSON. :func:`log_data_warnings` logs the warnings.

    Args:
        cfg: not frozen; changed in place.
        splits: ("TEST",) where nothing is trained.

    Raises:
        ValueError: only one of a split's two keys is set, the training data has no object to learn, or
            :func:`register_coco_json` refuses the data.
    """
    share = cfg.DATASETS.VAL_SHARE
    for split in ("TRAIN",) if share else splits:
        keys = [f"{split}_JSON", f"{split}_IMAGES"]
        values = [cfg.DATASETS[key] for key in keys]
        if not any(values):
            continue
        if not all(values):
            given, missing = keys if values[0] else keys[::-1]
            raise ValueError(f"DATASETS.{given} is set and DATASETS.{missing} is not; a data set needs both")
        json_file, image_root = (Path(value).expanduser().resolve() for value in values)
        digest = hashlib.sha1(f"{json_file}\n{image_root}".encode()).hexdigest()[:8]
        name = f"user_{re.sub(r'[^A-Za-z0-9_-]+', '_', json_file.stem)}_{digest}"
        limit = cfg.DATALOADER.MAX_BROKEN_IMAGES
        sources = [f"DATASETS.{key}" for key in keys]
        report = _register(name, json_file, image_root, split == "TEST" or share > 0, *sources, limit)
        if split == "TRAIN" and not report.num_instances.total():
            causes = "; ".join([NOTHING_TO_TRAIN_ON, *describe_warnings(report.findings, for_evaluation=False)])
            raise ValueError(f"DATASETS.TRAIN_JSON: {json_file} {causes}")
        cfg.DATASETS[split] = (name,)
        if share:
            train_name, val_name = register_parts(name, share)
            cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (train_name,), (val_name,)


def registered_images(dataset_name: str) -> list[dict]:
    """Return the images of a registered data set. Raise ValueError where its files cannot be read."""
    try:
        return DatasetCatalog.get(dataset_name)
    except OSError as error:
        raise unreadable_data(repr(dataset_name), error) from error


def unreadable_data(names: str, error: OSError) -> ValueError:
    """Return the error for registered data sets whose files cannot be read."""
    return ValueError(
        f"The data set {names} cannot be read: {error}. If it is one of Detectron2's, set the environment variable "
        "DETECTRON2_DATASETS to the folder that holds it (coco/annotations, coco/train2017, ...); for your own data, "
        "give --train-json and --train-images"
    )


def class_info(dataset_name: str) -> ClassInfo:
    """Return the classes of a registered data set; load it where its metadata does not have them yet.

    Raises:
        ValueError: the name is not registered, its files cannot be read, or it has no classes.
    """
    if dataset_name not in DatasetCatalog:
        raise ValueError(
            f"The data set {dataset_name!r} (DATASETS.TRAIN, DATASETS.TEST) is not registered. Register it, or "
            "give your own data as DATASETS.TRAIN_JSON and DATASETS.TRAIN_IMAGES, DATASETS.TEST_JSON and "
            "DATASETS.TEST_IMAGES"
        )
    metadata = MetadataCatalog.get(dataset_name)
    # register_coco_instances sets both only when the json is read; data sets of other formats may have no ids.
    has_ids = metadata.get("thing_dataset_id_to_contiguous_id") is not None or metadata.get("evaluator_type") != "coco"
    if metadata.get("thing_classes") is None or not has_ids:
        registered_images(dataset_name)
    names = metadata.get("thing_classes")
    if not names:
        raise ValueError(f"The data set {dataset_name!r} has no class names (thing_classes of its metadata)")
    index_of_id = metadata.get("thing_dataset_id_to_contiguous_id")
    if index_of_id is None:
        # Without the map, LVISEvaluator adds 1 to the class index, and COCOEvaluator uses it unchanged.
        first_id = 1 if metadata.get("evaluator_type") == "lvis" else 0
        return ClassInfo(list(names), list(range(first_id, first_id + len(names))))
    return ClassInfo(list(names), sorted(index_of_id, key=index_of_id.__getitem__))


def check_num_classes(cfg: CfgNode, splits: Sequence[str] = ("TRAIN", "TEST")) -> None:
    """Check the model's number of classes against all data sets of DATASETS.TRAIN and DATASETS.TEST.

    Args:
        cfg: after :func:`register_user_datasets`.
        splits: the splits to check.

    Raises:
        ValueError: a data set is not registered, two have different classes, or the model has another number of
            classes; the message has the value to set.
    """
    infos = [(f"DATASETS.{split}", name, class_info(name).names) for split in splits for name in cfg.DATASETS[split]]
    if not infos:
        return
    first_key, first_name, first_names = infos[0]
    for key, name, names in infos:
        # The evaluation matches classes by name.
        is_matched = (first_key, key) == ("DATASETS.TRAIN", "DATASETS.TEST") and len(set(names)) == len(names)
        if names != first_names and not (is_matched and sorted(names) == sorted(first_names)):
            raise ValueError(
                f"{_told(key, name)} has {_count(names)}, but {_told(first_key, first_name)} has "
                f"{_count(first_names)}: one model needs the same classes in the same order (set {key}, or {key}_JSON "
                f"and {key}_IMAGES)"
            )
    key, num_classes = config.num_classes(cfg) or (None, len(first_names))
    if len(first_names) != num_classes:
        raise ValueError(
            f"{_told(first_key, first_name)} has {_count(first_names)}, but {key} is {num_classes}: set "
            f"{key} {len(first_names)}"
        )


def _all_names(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN]) + ", ..." * (len(names) > _NAMES_SHOWN)
    return f"{len(names)} {'class' if len(names) == 1 else 'classes'} [{shown}]"


def _told(key: str, dataset_name: str) -> str:
    json_file = MetadataCatalog.get(dataset_name).get("json_file")
    return f"{key} {dataset_name!r}" + (f" ({json_file})" if json_file else "")


def _count(names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {'class' if len(names) == 1 else 'classes'} ({shown})"


def log_data_warnings(cfg: CfgNode, splits: Sequence[str] = ("TRAIN", "TEST")) -> None:
    """Log one warning for annotations that are left out, and one for images with more objects than the model finds.

    Args:
        cfg: after :func:`register_user_datasets`.
        splits: the splits to look at.
    """
    for split in splits:
        for name in cfg.DATASETS[split]:
            metadata = MetadataCatalog.get(name)
            for note in metadata.get("data_notes", ()):
                _logger.info(note)
            for warning in metadata.get("data_warnings", ()):
                _logger.warning("DATASETS.%s: %s", split, warning)
    if crowded := crowded_warning(instances_of_images(cfg, splits), cfg):
        _logger.warning("DATASETS.%s: %s", " and ".join(splits), crowded)


def _register(
    name: str,
    json_file: Path,
    image_root: Path,
    for_evaluation: bool,
    json_key: str,
    images_key: str,
    max_missing: int = 0,
) -> JsonReport:
    """Register as :func:`register_coco_json`; errors name the two keys, and the metadata gets the warnings."""
    if other_format := describe_path(json_file):
        raise ValueError(f"{json_key}: {other_format}")
    if not json_file.is_file():
        raise ValueError(f"{json_key}: the file {json_file} does not exist")
    if not image_root.is_dir():
        raise ValueError(f"{images_key}: the folder {image_root} does not exist")
    known_as = MetadataCatalog.get(name).get("json_file") if name in MetadataCatalog else None
    if name in DatasetCatalog and known_as != str(json_file):
        raise ValueError(f"The name {name!r} is already that of another data set ({known_as}); use another name")

    content, report = load_checked_json(json_file, for_evaluation)
    file_names = [image["file_name"] for image in content["images"]]
    files = find_files(file_names, image_root)
    report.findings.extend(name_findings(file_names, files, image_root))
    for finding in absent_findings(files.absent, len(file_names), image_root, max_missing):
        if finding.stops:
            raise ValueError(f"{images_key}: {finding.message} (json: {json_file})")
        report.findings.append(finding)
    content = with_found_names(content, files.found)
    report.findings.extend(sample_findings(content["images"], image_root))

    # Metadata cannot be changed once set.
    DatasetCatalog.pop(name, None)
    MetadataCatalog.pop(name, None)
    categories = sorted(content["categories"], key=lambda category: category["id"])
    MetadataCatalog.get(name).set(
        json_file=str(json_file),
        image_root=str(image_root),
        evaluator_type="coco",
        thing_classes=[category["name"] for category in categories],
        thing_dataset_id_to_contiguous_id={category["id"]: index for index, category in enumerate(categories)},
        data_warnings=[f"{json_file}: {line}" for line in describe_warnings(report.findings, for_evaluation)],
        num_instances=report.num_instances,
        object_sides=report.sides,
    )
    DatasetCatalog.register(
        name, lambda: to_dataset_dicts(with_found_names(read_json(json_file), files.found), image_root)
    )
    return report


def load_checked_json(json_file: Path, for_evaluation: bool = False) -> tuple[dict, JsonReport]:
    """Read and check a COCO json: `images`, `categories` and, unless it is for prediction only, `annotations`.

    Args:
        json_file: in COCO's instances format.
        for_evaluation: also check the fields that only COCO's evaluation reads.

    Raises:
        ValueError: the file does not exist or cannot be read, or has a flaw that stops
            (:mod:`sparseinst.data.coco_checks` lists them); one line with the first few.
    """
    content = read_json(json_file)
    report = check_content(content, for_evaluation)
    if problems := report.problems():
        shown = "; ".join(problem.message for problem in problems[:_NUM_SHOWN])
        more = len(problems) - _NUM_SHOWN
        rest = f"; and {more} more problems, which python -m sparseinst.tools.check_dataset lists" if more > 0 else ""
        raise ValueError(f"{json_file}: {shown}{rest}")
    return content, report


def describe_warnings(findings: list[Finding], for_evaluation: bool) -> list[str]:
    """Return one line for all annotations that are left out, and one for each other warning."""
    lines = [finding.message for finding in findings if finding.kind not in LEFT_OUT and not finding.stops]
    names = {kind: [f.message for f in findings if f.kind == kind] for kind in dict.fromkeys(f.kind for f in findings)}
    parts = [f"{len(names[k])} with {k} (the first: {names[k][0]})" for k in names if k in LEFT_OUT]
    if parts:
        effect = "annotations that nothing can match" if for_evaluation else "annotations that are left out"
        lines.append(f"{effect}: {', '.join(parts)}")
    return lines


def to_dataset_dicts(content: dict, image_root: str | Path) -> list[dict]:
    """Convert a COCO json to Detectron2's standard format.

    Replaces Detectron2's `load_coco_json`, which fails on an empty or null `bbox` and keeps annotations without a mask;
    a training reads `bbox` with INPUT.ANNOTATION_BOXES only. Otherwise the dicts are the same, plus the ids of
    annotations.

    Args:
        content: of :func:`load_checked_json`.
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
            kept.update(bbox_mode=BoxMode.XYWH_ABS, segmentation=segmentation)
            kept["category_id"] = class_of_id[annotation["category_id"]]
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

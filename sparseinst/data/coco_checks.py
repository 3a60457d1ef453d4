"""Check a COCO json before training and evaluation.

| flaw | training | evaluation |
|---|---|---|
| not COCO's object; `images` or `categories` missing or empty; an entry without a required key | stops | stops |
| ids that are not whole numbers, or not unique; a `category_id` or `image_id` that does not exist | stops | stops |
| category ids with gaps, in any order | works | works |
| `height`, `width`, `file_name`, `iscrowd` or a category's name of a wrong type; `ignore` | stops | stops |
| polygons: not numbers, NaN, infinite, far outside of the image, an odd number of values | stops | stops |
| RLE: another size than the image's, broken run lengths, or run lengths that do not fill the image | stops | stops |
| no segmentation, or only polygons of fewer than three points | left out, one warning | stops |
| a polygon of fewer than three points next to valid ones | left out | stops: COCO's evaluation reads it as a box |
| polygons outside of the image; RLE without a pixel | left out, one warning | never found, one warning |
| self-crossing outlines | drawn as pycocotools draws them | drawn as pycocotools draws them |
| objects without a pixel | left out, one warning; stops where all are such | as in training |
| polygon coordinates from 0 to 1 (normalised) | one warning; stops where all are such | as in training |
| crowds | left out; a warning where all objects of a class or of an image are crowds | COCO's rules, same warning |
| the same object twice; a `bbox` that disagrees with its mask; `area` 0 | one warning each | as in training |
| two categories of one name | one warning | one warning |
| a category without annotations, such as Roboflow's root | one warning | not reported |
| an image listed twice, also by two spellings; file names of Windows or URLs | a warning each | a warning each |
| images that EXIF turns, of unchanged size; 16-bit images that use few levels | a warning each | a warning each |
| missing files | one warning, skipped up to DATALOADER.MAX_BROKEN_IMAGES | as in training |
| images without annotations | DATALOADER.FILTER_EMPTY_ANNOTATIONS decides | evaluated |
| `annotations` missing or empty | stops | predicts and writes the results, no AP |
| `bbox`, `area` missing or invalid | not read; with INPUT.ANNOTATION_BOXES the mask's box | stops |
"""

import sys
from collections import Counter
from collections.abc import Collection
from typing import Any, NamedTuple

from sparseinst.data.findings import Finding, class_findings, crowd_findings, mask_findings, measure_masks
from sparseinst.data.images import DataError
from sparseinst.data.mask_decoding import (
    NO_PIXEL,
    NO_SEGMENTATION,
    OUTSIDE,
    TOO_FEW_POINTS,
    check_segmentation,
    is_whole,
)
from sparseinst.data.other_formats import describe_other_format

_IMAGE_KEYS = ("id", "file_name", "height", "width")
_CATEGORY_KEYS = ("id", "name")
_ANNOTATION_KEYS = ("id", "image_id", "category_id")
# Only COCO's evaluation needs these.
_EVALUATED_ANNOTATION_KEYS = ("bbox", "area", "iscrowd", "segmentation")

_REPAIR = "; correct the annotation, or remove it from the json"


# Kinds of findings about one annotation that gives no instance; all other warnings are about the whole file.
LEFT_OUT = (NO_SEGMENTATION, TOO_FEW_POINTS, OUTSIDE, NO_PIXEL)


ImageEntry = tuple[dict, list[dict]]  # an image and its annotations


class JsonReport(NamedTuple):
    """The result of checking a json.

    Attributes:
        findings: in the json's order.
        num_instances: by image id, the number of annotations that are used: no crowds, none that are left out.
            Complete only where no finding stops.
        usable: by image id, each image of a valid size with its annotations, without crowds and those with findings.
        sides: by image id, the sides of these objects, see `Shapes.sides`.
    """

    findings: list[Finding]
    num_instances: Counter[int]
    usable: dict[int, ImageEntry]
    sides: dict[int, list[list[float]]]

    def add(self, kind: str, message: str, stops: bool = True) -> None:
        """Append a finding."""
        self.findings.append(Finding(kind, message, stops))

    def problems(self) -> list[Finding]:
        """Return the findings that stop."""
        return [finding for finding in self.findings if finding.stops]


def check_content(content: Any, for_evaluation: bool = False) -> JsonReport:
    """Find each flaw that makes Detectron2 or pycocotools fail hours later with a bare KeyError or worse.

    Args:
        content: the parsed json; may be anything.
        for_evaluation: also check the fields that only COCO's evaluation reads.
    """
    report = JsonReport([], Counter(), {}, {})
    if other_format := describe_other_format(content):
        report.add("another format", other_format)
        return report
    if not isinstance(content, dict):
        expected = "expected COCO's object with 'images', 'annotations' and 'categories'"
        message = f"holds {type(content).__name__}; {expected} (a list is a results file, or another format)"
        report.add("no COCO json", message)
        return report
    for part in ("images", "categories"):
        if not content.get(part):
            report.add("no COCO json", f"has no {part!r}; expected COCO's object with 'images' and 'categories'")
    if report.findings:
        return report
    images = _check_entries(content["images"], "images", _IMAGE_KEYS, report)
    categories = _check_entries(content["categories"], "categories", _CATEGORY_KEYS, report)
    for category_id, category in categories.items():
        if not isinstance(name := category["name"], str):
            report.add("category name", f"the name of category {category_id} is {name!r}; expected text")
    all_image_ids = _whole_ids(content["images"])
    for image_id, image in images.items():
        name, height, width = image["file_name"], image["height"], image["width"]
        if not isinstance(name, str) or not name:
            report.add("file_name", f"image {image_id} has the file_name {name!r}; expected text")
        if not _has_size(image):
            found = f"image {image_id} ({name!r}) has height {height!r} and width {width!r}"
            report.add("image size", f"{found}; expected whole numbers of pixels")
        elif isinstance(name, str):
            report.usable[image_id] = (image, [])

    needed = _ANNOTATION_KEYS + _EVALUATED_ANNOTATION_KEYS * for_evaluation
    annotations = _check_entries(content.get("annotations", []), "annotations", needed, report)
    if annotations and not any(annotation.get("segmentation") for annotation in annotations.values()):
        report.add("no masks", "no annotation has a segmentation; boxes do not suffice: add the masks")
        return report
    usable: list[dict] = []
    for annotation_id, annotation in annotations.items():
        image_id, name = annotation["image_id"], f"annotation {annotation_id}"
        if not is_whole(image_id) or image_id not in images:
            # The image's own flaw is reported already.
            if not is_whole(image_id) or image_id not in all_image_ids:
                report.add("image_id", f"{name} has image_id {image_id!r}, which is not in 'images'" + _REPAIR)
            continue
        image = images[image_id]
        name += f" ({image['file_name']!r})"
        num_findings = len(report.findings)
        _check_fields(annotation, categories, name, report)
        if for_evaluation:
            _check_evaluated_fields(annotation, name, report)
        if _has_size(image):
            _check_mask(annotation, (image["height"], image["width"]), name, for_evaluation, report)
            if len(report.findings) == num_findings:
                usable.append(annotation)
    if for_evaluation and 0 in annotations:
        message = (
            "COCO's evaluation reads annotation id 0 as 'not matched', so this object counts as missed; number the "
        )
        report.add("annotation id 0", message + "annotations from 1", stops=False)
    objects = [annotation for annotation in usable if not annotation.get("iscrowd")]
    for annotation in objects:
        if (image_id := annotation["image_id"]) in report.usable:
            report.usable[image_id][1].append(annotation)
    with_class = [annotation for annotation in annotations.values() if is_whole(annotation["category_id"])]
    report.findings.extend(class_findings(categories, with_class, for_evaluation))
    report.findings.extend(crowd_findings(categories, images, usable))
    if objects:
        shapes = measure_masks(images, objects)
        for annotation, side in zip(objects, shapes.sides().tolist()):
            report.sides.setdefault(annotation["image_id"], []).append(side)
        report.findings.extend(mask_findings(shapes, images, objects))
    return report


def _check_entries(entries: Any, part: str, needed: tuple[str, ...], report: JsonReport) -> dict[int, dict]:
    """Check that each entry has the needed keys and a unique whole number as id; return the valid ones by id."""
    if not isinstance(entries, list):
        report.add("no COCO json", f"{part!r} is a {type(entries).__name__}; expected a list")
        return {}
    by_id: dict[int, dict] = {}
    repeated: Counter[int] = Counter()
    for index, entry in enumerate(entries):
        start = f"entry {index} of {part!r} has"
        missing = [key for key in needed if not isinstance(entry, dict) or key not in entry]
        if missing:
            report.add("missing key", f"{start} no {', '.join(map(repr, missing))}; complete it, or remove it")
        elif not is_whole(entry["id"]):
            report.add("id", f"{start} the id {entry['id']!r}; expected a whole number: number them")
        elif entry["id"] in by_id:
            repeated[entry["id"]] += 1
        else:
            by_id[entry["id"]] = entry
    if repeated:
        message = (
            f"{repeated.total()} ids of {part!r} are not unique ({_first_few(repeated)}); give each entry its own "
        )
        report.add("id", message + "id, or remove the duplicates")
    return by_id


def _whole_ids(entries: Any) -> set[int]:
    """Return the ids of all entries, including those that lack other keys."""
    entries = entries if isinstance(entries, list) else []
    return {entry["id"] for entry in entries if isinstance(entry, dict) and is_whole(entry.get("id"))}


def _first_few(ids: Collection[int]) -> str:
    return ", ".join(map(str, list(ids)[:5])) + ", ..." * (len(ids) > 5)


def _has_size(image: dict) -> bool:
    return all(is_whole(image[side]) and image[side] > 0 for side in ("height", "width"))


def _check_fields(annotation: dict, categories: dict[int, dict], name: str, report: JsonReport) -> None:
    category_id, crowd = annotation["category_id"], annotation.get("iscrowd", 0)
    if not is_whole(category_id) or category_id not in categories:
        message = f"{name} has category_id {category_id!r}, which is not in 'categories' "
        message += f"([{_first_few(sorted(categories))}]); correct it, or add the category"
        report.add("category_id", message)
    if not isinstance(crowd, int) or crowd not in (0, 1):
        report.add("iscrowd", f"{name} has iscrowd {crowd!r}; expected 0 or 1")
    if annotation.get("ignore"):
        report.add("ignore", f"{name} has 'ignore', which Detectron2 refuses; use 'iscrowd'")


def _check_evaluated_fields(annotation: dict, name: str, report: JsonReport) -> None:
    box, area, segmentation = annotation["bbox"], annotation["area"], annotation["segmentation"]
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_finite, box)) or box[2] < 0 or box[3] < 0:
        report.add("bbox", f"{name} has bbox {box!r}; expected [x, y, width, height] in pixels" + _REPAIR)
    if not _is_finite(area) or area < 0:
        report.add("area", f"{name} has area {area!r}; expected a number of pixels" + _REPAIR)
    lengths = [len(p) for p in segmentation if isinstance(p, list)] if isinstance(segmentation, list) else []
    if min(lengths, default=6) < 6 <= max(lengths, default=0):
        message = f"{name} has a polygon of {min(lengths)} numbers next to longer ones, which COCO's evaluation takes "
        report.add("segmentation", message + "for a box; remove this polygon")


def _check_mask(
    annotation: dict, image_size: tuple[int, int], name: str, for_evaluation: bool, report: JsonReport
) -> None:
    try:
        reason = check_segmentation(annotation.get("segmentation"), image_size)
    except DataError as error:
        report.add("segmentation", f"the segmentation of {name} is broken: {error}" + _REPAIR)
        return
    is_crowd = bool(annotation.get("iscrowd", 0))
    if for_evaluation and reason in (NO_SEGMENTATION, TOO_FEW_POINTS):
        report.add("segmentation", f"{name}: {reason}, which COCO's evaluation cannot read" + _REPAIR)
    elif not is_crowd and reason is not None:
        report.add(reason, name, stops=False)
    elif not is_crowd:
        report.num_instances[annotation["image_id"]] += 1


def _is_finite(value: Any) -> bool:
    """Return whether a value is an int or a float of JSON, and finite as a float."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max

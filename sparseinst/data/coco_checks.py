"""What can be wrong with a COCO json, found before anything is trained or evaluated.

| what is found | training | evaluation |
|---|---|---|
| not COCO's object; `images` or `categories` missing or empty; an entry without a key that is read | stops | stops |
| ids that are not whole numbers, or not unique; a `category_id` or `image_id` that is nowhere | stops | stops |
| category ids with gaps, in any order | works | works |
| `height`, `width`, `file_name`, `iscrowd`, a category's name of a wrong type; `ignore` | stops | stops |
| polygons: not numbers, NaN, infinite, far outside of the image, an odd number of values | stops | stops |
| RLE: another size than the image's, run lengths that are garbage or do not fill the image | stops | stops |
| no segmentation, or only polygons of fewer than three points | left out, one warning | stops |
| a polygon of fewer than three points beside others | left out | stops: COCO's evaluation takes it for a box |
| polygons outside of the image; RLE without a pixel | left out, one warning | never found, one warning |
| outlines that cross themselves | drawn as pycocotools draws them | the same |
| objects without a pixel once drawn; crowds | left out; crowds without a word | COCO's rules |
| images without annotations | DATALOADER.FILTER_EMPTY_ANNOTATIONS says | evaluated |
| no `annotations`, or none | stops | predicts, writes the results, no AP |
| `bbox`, `area` missing or garbage | not read | stops |
"""

import math
from collections import Counter
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

from sparseinst.data.images import DataError
from sparseinst.data.mask_decoding import NO_SEGMENTATION, TOO_FEW_POINTS, check_segmentation, is_whole

_IMAGE_KEYS = ("id", "file_name", "height", "width")
_CATEGORY_KEYS = ("id", "name")
# Reading and training need the first three; COCO's evaluation reads the others too.
_ANNOTATION_KEYS = ("id", "image_id", "category_id")
_EVALUATED_ANNOTATION_KEYS = ("bbox", "area", "iscrowd", "segmentation")

_REPAIR = "; correct the annotation, or remove it from the json"


class Finding(NamedTuple):
    """One thing that is wrong.

    Attributes:
        kind: what findings are counted by.
        message: where it is, what is found and what to do.
        stops: whether the data cannot be used so; otherwise it is a warning.
    """

    kind: str
    message: str
    stops: bool = True


class JsonReport(NamedTuple):
    """What a json's check found.

    Attributes:
        findings: in the json's order.
        num_instances: by image id, how many annotations are objects to be found: no crowd, and not left out. Complete
            where nothing stops.
    """

    findings: list[Finding]
    num_instances: Counter[int]

    def problems(self) -> list[Finding]:
        """Those findings that stop."""
        return [finding for finding in self.findings if finding.stops]


def check_content(content: Any, for_evaluation: bool = False) -> JsonReport:
    """Check all that Detectron2 or pycocotools would answer with a bare KeyError, an assertion or worse, hours later.

    Args:
        content: what the json holds, in whatever state.
        for_evaluation: also check the fields that only COCO's evaluation reads.
    """
    num_instances: Counter[int] = Counter()
    return JsonReport(list(_find(content, for_evaluation, num_instances)), num_instances)


def _find(content: Any, for_evaluation: bool, num_instances: Counter[int]) -> Iterator[Finding]:
    if not isinstance(content, dict):
        yield Finding(
            "no COCO json",
            f"holds {type(content).__name__}; expected COCO's object with 'images', 'annotations' and 'categories' (a "
            "list is a results file, or another format)",
        )
        return
    missing = [part for part in ("images", "categories") if not content.get(part)]
    for part in missing:
        yield Finding("no COCO json", f"has no {part!r}; expected COCO's object with 'images' and 'categories'")
    if missing:
        return
    images = yield from _check_entries(content["images"], "images", _IMAGE_KEYS)
    categories = yield from _check_entries(content["categories"], "categories", _CATEGORY_KEYS)
    for category in categories.values():
        if not isinstance(category["name"], str):
            yield Finding(
                "category name", f"the name of category {category['id']} is {category['name']!r}; expected text"
            )
    sizes = yield from _check_images(images)

    needed = _ANNOTATION_KEYS + _EVALUATED_ANNOTATION_KEYS * for_evaluation
    annotations = yield from _check_entries(content.get("annotations", []), "annotations", needed)
    if annotations and not any(annotation.get("segmentation") for annotation in annotations.values()):
        yield Finding(
            "no masks", "no annotation has a segmentation; SparseInst needs masks, boxes do not do: add the masks"
        )
        return
    for annotation in annotations.values():
        image = images.get(annotation["image_id"]) if is_whole(annotation["image_id"]) else None
        place = f"annotation {annotation['id']}"
        if image is None:
            yield Finding(
                "image_id", f"{place} has image_id {annotation['image_id']!r}, which is not in 'images'" + _REPAIR
            )
            continue
        place += f" ({image['file_name']!r})"
        yield from _check_fields(annotation, categories, place)
        if for_evaluation:
            yield from _check_evaluated_fields(annotation, place)
        size = sizes.get(image["id"])
        if size is None:
            continue
        try:
            reason = check_segmentation(annotation.get("segmentation"), size)
        except DataError as error:
            yield Finding("segmentation", f"the segmentation of {place} is broken: {error}" + _REPAIR)
            continue
        is_crowd = bool(annotation.get("iscrowd", 0))
        if reason is None:
            if not is_crowd:
                num_instances[image["id"]] += 1
        elif for_evaluation and reason in (NO_SEGMENTATION, TOO_FEW_POINTS):
            yield Finding("segmentation", f"{place}: {reason}, which COCO's evaluation cannot read" + _REPAIR)
        elif not is_crowd:
            yield Finding(reason, place, stops=False)
    if for_evaluation and 0 in annotations:
        yield Finding(
            "annotation id 0",
            "annotation id 0 stands for 'not matched' in COCO's evaluation, so this object counts as missed; number "
            "the annotations from 1",
            stops=False,
        )


def _check_entries(entries: Any, part: str, needed: tuple[str, ...]) -> Generator[Finding, None, dict[int, dict]]:
    """Check that all entries have the needed keys and whole numbers of their own as ids. Returns the good by id."""
    if not isinstance(entries, list):
        yield Finding("no COCO json", f"{part!r} is a {type(entries).__name__}; expected a list")
        return {}
    by_id: dict[int, dict] = {}
    repeated: Counter[int] = Counter()
    for index, entry in enumerate(entries):
        missing = [key for key in needed if not isinstance(entry, dict) or key not in entry]
        if missing:
            yield Finding(
                "missing key",
                f"entry {index} of {part!r} has no {', '.join(map(repr, missing))}; complete it, or remove it",
            )
        elif not is_whole(entry["id"]):
            yield Finding(
                "id", f"entry {index} of {part!r} has the id {entry['id']!r}; expected a whole number: number them"
            )
        elif entry["id"] in by_id:
            repeated[entry["id"]] += 1
        else:
            by_id[entry["id"]] = entry
    if repeated:
        shown = ", ".join(map(str, list(repeated)[:5])) + ", ..." * (len(repeated) > 5)
        yield Finding(
            "id",
            f"{repeated.total()} ids of {part!r} are not unique ({shown}); give each entry an id of its own, or remove "
            "what is there twice",
        )
    return by_id


def _check_images(images: dict[int, dict]) -> Generator[Finding, None, dict[int, tuple[int, int]]]:
    """Returns the (height, width) of the good ones."""
    sizes = {}
    for image in images.values():
        if not isinstance(image["file_name"], str) or not image["file_name"]:
            yield Finding("file_name", f"image {image['id']} has the file_name {image['file_name']!r}; expected text")
        size = (image["height"], image["width"])
        if all(is_whole(side) and side > 0 for side in size):
            sizes[image["id"]] = size
        else:
            yield Finding(
                "image size",
                f"image {image['id']} ({image['file_name']!r}) has height {size[0]!r} and width {size[1]!r}; expected "
                "whole numbers of pixels",
            )
    return sizes


def _check_fields(annotation: dict, categories: dict[int, dict], place: str) -> Iterator[Finding]:
    category_id = annotation["category_id"]
    if not is_whole(category_id) or category_id not in categories:
        shown = ", ".join(map(str, sorted(categories)[:5])) + ", ..." * (len(categories) > 5)
        yield Finding(
            "category_id",
            f"{place} has category_id {category_id!r}, which is not in 'categories' ([{shown}]); correct it, or add "
            "the category",
        )
    crowd = annotation.get("iscrowd", 0)
    if not isinstance(crowd, int) or crowd not in (0, 1):
        yield Finding("iscrowd", f"{place} has iscrowd {crowd!r}; expected 0 or 1")
    if annotation.get("ignore"):
        yield Finding("ignore", f"{place} has 'ignore', which Detectron2 refuses; use 'iscrowd'")


def _check_evaluated_fields(annotation: dict, place: str) -> Iterator[Finding]:
    box = annotation["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_finite, box)) or box[2] < 0 or box[3] < 0:
        yield Finding("bbox", f"{place} has bbox {box!r}; expected [x, y, width, height] in pixels" + _REPAIR)
    if not _is_finite(annotation["area"]) or annotation["area"] < 0:
        yield Finding("area", f"{place} has area {annotation['area']!r}; expected a number of pixels" + _REPAIR)
    segmentation = annotation["segmentation"]
    if isinstance(segmentation, list):
        lengths = [len(polygon) for polygon in segmentation if isinstance(polygon, list)]
        if min(lengths, default=6) < 6 <= max(lengths, default=0):
            yield Finding(
                "segmentation",
                f"{place} has a polygon of {min(lengths)} numbers beside others, which COCO's evaluation takes for a "
                "box; remove this polygon",
            )


def _is_finite(value: Any) -> bool:
    """Whether a value is a number of JSON's, and finite as a float."""
    if type(value) not in (int, float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False

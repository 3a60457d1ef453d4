"""Find what is valid in a COCO json but probably wrong: each finding is one warning with counts and the first file."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from detectron2.data import transforms as T
from pycocotools import mask as coco_mask

from sparseinst.data.mask_decoding import read_mask

# Images whose annotations are all crowds occur in COCO, but in fewer than 1 of 100 images.
_USUAL_CROWD_IMAGES = 0.01
# Pixels by which a box may differ from its mask without a warning; larger differences count below this IoU.
_BOX_TOLERANCE, _BOX_IOU = 2, 0.5
# A json may declare any size.
_LARGEST_SIDE = 2**31


class Finding(NamedTuple):
    """One flaw of the data.

    Attributes:
        kind: the group in which findings are counted.
        message: the entry, the value that was found, and the remedy.
        stops: True: the data cannot be used. False: a warning.
    """

    kind: str
    message: str
    stops: bool = True


class Shapes(NamedTuple):
    """Geometry of N masks, pixels.

    Attributes:
        bounds: float64 (N, 4), left, top, right, bottom.
        areas: float64 (N,); of polygons by the shoelace formula, overlaps counted twice.
        sizes: float64 (N, 2), height and width of the image.
        are_polygons: bool (N,); others are RLE.
    """

    bounds: np.ndarray
    areas: np.ndarray
    sizes: np.ndarray
    are_polygons: np.ndarray

    def sides(self) -> np.ndarray:
        """Return (N, 3): the root of the area of each mask's box inside the image, the image's short and long side."""
        boxes = self.inside()[:, 2:] - self.inside()[:, :2]
        return np.stack([np.sqrt(boxes.prod(axis=1)), self.sizes.min(axis=1), self.sizes.max(axis=1)], axis=1)

    def inside(self) -> np.ndarray:
        """Return the bounds, cut at the edges of the image."""
        return np.clip(self.bounds, 0, np.concatenate([self.sizes[:, ::-1]] * 2, axis=1))


def class_findings(categories: dict[int, dict], annotations: Sequence[dict], for_evaluation: bool) -> Iterator[Finding]:
    """Yield findings about categories (by id): names used twice, and in training, categories without annotations."""
    spellings: dict[str, list[dict]] = {}
    for category in categories.values():
        spellings.setdefault(str(category["name"]).strip().casefold(), []).append(category)
    if repeated := [entries for entries in spellings.values() if len(entries) > 1]:
        ids = ", ".join(f"{entry['name']!r} (id {entry['id']})" for entry in repeated[0][:3])
        message = f"{len(repeated)} category names are used twice or more: {ids}; a model learns them as different "
        yield Finding("category name used twice", message + "classes: merge them, or give them other names", False)
    counts = Counter(annotation.get("category_id") for annotation in annotations)
    empty = [category for id, category in categories.items() if not counts[id]]
    if for_evaluation or not empty or len(empty) == len(categories):
        return
    names = ", ".join(f"{category['name']!r} (id {category['id']})" for category in empty[:3])
    message = f"{len(empty)} of {len(categories)} categories are without annotations: {names}"
    message += ", ..." * (len(empty) > 3)
    parents = {category.get("supercategory") for category in categories.values()}
    if roots := [category["name"] for category in empty if category["name"] in parents]:
        message += f"; {roots[0]!r} is only the supercategory of others, as Roboflow writes it"
    message += ". The model gets a class that nothing trains; sparseinst.tools.select_classes removes it"
    yield Finding("category without annotations", message, False)


def crowd_findings(
    categories: dict[int, dict], images: dict[int, dict], annotations: Sequence[dict]
) -> Iterator[Finding]:
    """Yield findings about classes and images whose annotations are all crowds."""
    remedy = "crowds are neither learned nor counted. CVAT writes brush masks so: set iscrowd 0 for single objects"
    crowds = [annotation for annotation in annotations if annotation.get("iscrowd")]
    for key, kind, names, label in (
        ("category_id", "only crowds in a class", {i: c["name"] for i, c in categories.items()}, "categories"),
        ("image_id", "only crowds in an image", {i: m["file_name"] for i, m in images.items()}, "images with objects"),
    ):
        totals = Counter(annotation[key] for annotation in annotations)
        numbers = Counter(annotation[key] for annotation in crowds)
        # A dict keeps the order, and finds each id at once.
        affected = {id: number for id, number in numbers.items() if number == totals[id]}
        if not affected or (key == "image_id" and len(affected) <= _USUAL_CROWD_IMAGES * len(totals)):
            continue
        first = next(annotation for annotation in crowds if annotation[key] in affected)
        shown = ", ".join(repr(names[id]) for id in list(affected)[:3]) + ", ..." * (len(affected) > 3)
        message = (
            f"in {len(affected)} of {len(totals)} {label} ({shown}) all "
            f"{sum(affected.values())} annotations are crowds, iscrowd 1 (the first: "
            f"{_name(first, images)}); {remedy}"
        )
        yield Finding(kind, message, False)


def mask_findings(shapes: Shapes, images: dict[int, dict], annotations: Sequence[dict]) -> Iterator[Finding]:
    """Yield findings about masks and boxes.

    Args:
        shapes: what `measure_masks` returned for them.
        images: by id, with valid height and width.
        annotations: at least one, no crowds; with valid masks, checked by `check_segmentation`.
    """

    def found(kind: str, is_affected: np.ndarray, text: str, stops: bool = False) -> Iterator[Finding]:
        if is_affected.any():
            count = f"{is_affected.sum()} of {len(annotations)} objects"
            first = _name(annotations[int(np.argmax(is_affected))], images)
            yield Finding(kind, f"{count} {text} (the first: {first})", stops)

    # 1.001: tools round up. An image of 2 pixels has such coordinates itself.
    are_normalised = shapes.are_polygons & (shapes.sizes.min(axis=1) > 2)
    are_normalised &= (shapes.bounds.min(axis=1) >= -0.001) & (shapes.bounds.max(axis=1) <= 1.001)
    yield from found(
        "coordinates look normalised",
        are_normalised,
        "have polygon coordinates from 0 to 1, which look normalised; expected pixels: multiply x by the width and y "
        "by the height",
        bool(are_normalised.all()),
    )
    are_empty = _are_empty(shapes, images, annotations) & ~are_normalised
    yield from found(
        "objects without a pixel",
        are_empty,
        "have no pixel in the image's size: their outlines are thinner than a pixel, or almost outside",
        bool(are_empty.all()),
    )
    yield from found("same object twice", _are_repeated(shapes, annotations), "are the same mask of the same class as "
                     "another one of their image; remove the duplicates")  # fmt: skip
    areas = _numbers([annotation.get("area", 1) for annotation in annotations])
    yield from found(
        "area of 0",
        (areas == 0) & ~are_empty & ~are_normalised,
        "have 'area' 0 and a mask with pixels; an evaluation sorts objects into small, medium and large by 'area': "
        "write the mask's number of pixels",
    )
    yield from _box_findings(shapes, ~are_normalised, annotations, found)


def measure_masks(images: dict[int, dict], annotations: Sequence[dict]) -> Shapes:
    """Return the geometry of valid masks; polygons are not drawn."""
    segmentations = [annotation["segmentation"] for annotation in annotations]
    sizes = [(images[a["image_id"]]["height"], images[a["image_id"]]["width"]) for a in annotations]
    sizes = np.minimum(np.array(sizes, dtype=object), _LARGEST_SIDE).astype(np.float64)
    are_polygons = np.array([not isinstance(segmentation, dict) for segmentation in segmentations])
    bounds, areas = np.zeros((len(segmentations), 4)), np.zeros(len(segmentations))
    outlines = [[polygon for polygon in s if len(polygon) >= 6] for s in segmentations if not isinstance(s, dict)]
    if outlines:
        polygons = list(chain.from_iterable(outlines))
        lengths = np.fromiter(map(len, polygons), np.int64, len(polygons)) // 2
        points = np.fromiter(chain.from_iterable(polygons), np.float64, 2 * lengths.sum()).reshape(-1, 2)
        starts = np.cumsum(lengths) - lengths
        following = np.arange(1, len(points) + 1)
        following[starts + lengths - 1] = starts
        xs, ys = points.T
        polygon_areas = abs(np.add.reduceat(xs * ys[following] - xs[following] * ys, starts)) / 2
        first_polygons = np.cumsum([0, *map(len, outlines)])[:-1]
        first_points = starts[first_polygons]
        areas[are_polygons] = np.add.reduceat(polygon_areas, first_polygons)
        bounds[are_polygons, :2] = np.minimum.reduceat(points, first_points)
        bounds[are_polygons, 2:] = np.maximum.reduceat(points, first_points)
    # pycocotools fails on more than 255 masks at once.
    for index in np.flatnonzero(~are_polygons):
        rle = segmentations[index]
        rle = rle if isinstance(rle["counts"], bytes | str) else coco_mask.frPyObjects(rle, *rle["size"])
        left, top, width, height = coco_mask.toBbox(rle)
        bounds[index], areas[index] = (left, top, left + width, top + height), coco_mask.area(rle)
    return Shapes(bounds, areas, sizes, are_polygons)


def _are_empty(shapes: Shapes, images: dict[int, dict], annotations: Sequence[dict]) -> np.ndarray:
    """Return which polygons have no pixel, bool (N,); only those that are thin inside of the image are drawn."""
    inside = shapes.inside()
    sides = inside[:, 2:] - inside[:, :2]
    is_thin = (sides.min(axis=1) < 1) | (shapes.areas < (shapes.bounds[:, 2:] - shapes.bounds[:, :2]).max(axis=1))
    are_empty = np.zeros(len(annotations), dtype=bool)
    for index in np.flatnonzero(is_thin & shapes.are_polygons):
        size = (int(shapes.sizes[index, 0]), int(shapes.sizes[index, 1]))
        are_empty[index] = read_mask(annotations[index]["segmentation"], T.TransformList([]), size, size) is None
    return are_empty


def _are_repeated(shapes: Shapes, annotations: Sequence[dict]) -> np.ndarray:
    """Return which masks equal an earlier one of their image and class, bool (N,), within a tenth of a pixel."""
    owners: dict[tuple[int, int], int] = {}
    keys = [owners.setdefault((a["image_id"], a["category_id"]), len(owners)) for a in annotations]
    hashes = np.array(keys, dtype=np.int64)
    for column in (*(10 * shapes.bounds).T, shapes.areas):
        # Overflow is part of the hash; np.unique of whole rows takes ten times as long.
        hashes = hashes * 1_000_003 + np.round(column).astype(np.int64)
    repeated = np.ones(len(hashes), dtype=bool)
    repeated[np.unique(hashes, return_index=True)[1]] = False
    return repeated


def _box_findings(
    shapes: Shapes, are_valid: np.ndarray, annotations: Sequence[dict], found: Callable[..., Iterator[Finding]]
) -> Iterator[Finding]:
    """Yield a finding where boxes differ from valid masks, with the convention that most of them follow."""
    nothing = [np.nan] * 4
    boxes = [annotation.get("bbox") for annotation in annotations]
    boxes = [box if isinstance(box, list) and len(box) == 4 else nothing for box in boxes]
    boxes = _numbers(list(chain.from_iterable(boxes))).reshape(-1, 4)
    left, top, right, bottom = shapes.bounds.T
    height, width = shapes.sizes.T
    expected = np.stack([left, top, right - left, bottom - top], axis=1)
    is_wrong = are_valid & np.isfinite(boxes).all(axis=1) & ~_agree(boxes, expected)
    if not is_wrong.any():
        return
    x, y, w, h = expected.T
    conventions = {
        "the corners [x0, y0, x1, y1]": (left, top, right, bottom),
        "x and y swapped": (y, x, h, w),
        "width and height swapped": (x, y, h, w),
        "y from below": (x, height - bottom, w, h),
        "the corners with y from below": (left, height - bottom, right, height - top),
        "the center [x, y, width, height]": (x + w / 2, y + h / 2, w, h),
        "fractions of the image's size": (x / width, y / height, w / width, h / height),
        "the center in fractions of the image's size": (
            (x + w / 2) / width, (y + h / 2) / height, w / width, h / height
        ),
    }  # fmt: skip
    fits = {}
    for name, values in conventions.items():
        deviations = abs(boxes - np.stack(values, axis=1)).max(axis=1)
        fits[name] = int((deviations[is_wrong] <= (0.01 if "fraction" in name else _BOX_TOLERANCE)).sum())
    name = max(fits, key=fits.__getitem__)
    index = int(np.argmax(is_wrong))
    text = (
        f"have a bbox that disagrees with their mask: {[round(v, 1) for v in boxes[index].tolist()]}, expected [x, y, "
        f"width, height], here {[round(v, 1) for v in expected[index].tolist()]}"
    )
    if fits[name] > is_wrong.sum() / 2:
        text += f"; they look like {name}"
    yield from found(
        "bbox disagrees with mask",
        is_wrong,
        text + ". Only an evaluation of boxes and INPUT.ANNOTATION_BOXES read them",
    )


def _agree(boxes: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Return whether boxes x, y, width, height, float64 (N, 4), nearly agree, bool (N,)."""
    ends, expected_ends = boxes[:, :2] + boxes[:, 2:], expected[:, :2] + expected[:, 2:]
    sides = np.minimum(ends, expected_ends) - np.maximum(boxes[:, :2], expected[:, :2])
    overlap = sides.clip(0).prod(axis=1)
    union = boxes[:, 2:].prod(axis=1) + expected[:, 2:].prod(axis=1) - overlap
    deviations = np.maximum(abs(boxes[:, :2] - expected[:, :2]), abs(ends - expected_ends)).max(axis=1)
    return (deviations <= _BOX_TOLERANCE) | (overlap > _BOX_IOU * union)


def _numbers(values: list) -> np.ndarray:
    """Return values as float64; NaN where a value is not a number."""
    if set(map(type, values)) <= {int, float}:
        with contextlib.suppress(OverflowError):
            return np.array(values, dtype=np.float64)
    return np.array([float(v) if type(v) in (int, float) and abs(v) < 1e15 else np.nan for v in values])


def _name(annotation: dict, images: dict[int, dict]) -> str:
    return f"annotation {annotation['id']} ({images[annotation['image_id']]['file_name']!r})"

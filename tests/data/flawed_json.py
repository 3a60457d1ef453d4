"""Define a small COCO data set, and its flaws with their effects."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 40, 60


def annotation(number: int, image_id: int, category_id: int, x: float, y: float, side: float) -> dict:
    return {
        "id": number, "image_id": image_id, "category_id": category_id, "bbox": [x, y, side, side],
        "area": side * side, "iscrowd": 0,
        "segmentation": [[x, y, x + side, y, x + side, y + side, x, y + side]],
    }  # fmt: skip


# Ids of categories with gaps; the third image has a crowd only, the fourth nothing.
CONTENT = {
    "images": [
        {"id": number, "file_name": f"{number}.png", "height": HEIGHT, "width": WIDTH} for number in (1, 2, 3, 4)
    ],
    "categories": [{"id": 90, "name": "disc"}, {"id": 3, "name": "cross"}, {"id": 17, "name": "bar"}],
    "annotations": [
        annotation(1, 1, 90, 5, 6, 20),
        annotation(2, 1, 3, 30, 8, 25),
        annotation(3, 2, 17, 2, 2, 30),
        {**annotation(4, 3, 17, 0, 0, 10), "iscrowd": 1,
         "segmentation": {"size": [HEIGHT, WIDTH], "counts": [0, 400, 2000]}},
    ],
}  # fmt: skip


def write(folder: Path, content: object = CONTENT) -> tuple[Path, Path]:
    """Write json and images; return the paths of both."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for image in CONTENT["images"]:
        Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)).save(images / image["file_name"])
    (folder / "data.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder / "data.json", images


class Flaw(NamedTuple):
    """A change of CONTENT, and the message that stops a training and an evaluation, or None."""

    change: Callable[[dict], object]
    training: str | None
    evaluation: str | None


def _annotation(**values: object) -> Callable[[dict], object]:
    """Set fields of annotation 2."""
    return lambda content: content["annotations"][1].update(values)


def _polygon(*polygons: object) -> Callable[[dict], object]:
    return _annotation(segmentation=list(polygons))


def _rle(counts: object, size: object = (HEIGHT, WIDTH)) -> Callable[[dict], object]:
    return _annotation(segmentation={"size": list(size) if isinstance(size, tuple) else size, "counts": counts})


def _image(**values: object) -> Callable[[dict], object]:
    return lambda content: content["images"][1].update(values)


def _both(change: Callable[[dict], object], message: str) -> Flaw:
    return Flaw(change, message, message)


SQUARE = [5, 5, 9, 5, 9, 9, 5, 9]
NAN, INFINITY = float("nan"), float("inf")

FLAWS: dict[str, Flaw] = {
    "none": Flaw(lambda content: None, None, None),
    # Polygons
    "NaN": _both(_polygon([1, 1, NAN, 5, 5, 5]), "annotation 2 .*coordinate nan"),
    "infinite": _both(_polygon([1, 1, 5, INFINITY, 5, 5]), "annotation 2 .*coordinate inf"),
    "huge": _both(_polygon([1, 1, 1e9, 5, 5, 5]), r"annotation 2 .*coordinate 1000000000.0"),
    "a polygon of strings": _both(_polygon(["1", "1", "5", "1", "5", "5"]), "annotation 2 .*not a list of numbers"),
    "a polygon with null": _both(_polygon([1, 1, None, 5, 5, 5]), "annotation 2 .*not a list of numbers"),
    "an odd number": _both(_polygon([1, 1, 5, 1, 5, 5, 1]), "annotation 2 .*a polygon of 7 numbers"),
    "no list of polygons": _both(_annotation(segmentation=SQUARE), "annotation 2 .*not a list of polygons"),
    "an endless outline": _both(_polygon([-900, -900, 900, 900] * 100), "annotation 2 .*pixels long"),
    "segmentation is text": _both(_annotation(segmentation="abc"), "annotation 2 .*of type str"),
    "two points": Flaw(_polygon([5, 5, 9, 9]), None, "annotation 2 .*fewer than three points"),
    "two points beside a polygon": Flaw(_polygon([5, 5, 9, 9], SQUARE), None, "annotation 2 .*takes for a box"),
    "no points": Flaw(_polygon([]), None, "annotation 2 .*fewer than three points"),
    "no polygons": Flaw(_polygon(), None, "annotation 2 .*no segmentation"),
    "null segmentation": Flaw(_annotation(segmentation=None), None, "annotation 2 .*no segmentation"),
    "outside": Flaw(_polygon([100, 5, 120, 5, 120, 20]), None, None),
    "self-crossing": Flaw(_polygon([5, 5, 30, 30, 30, 5, 5, 30]), None, None),
    "zero area": Flaw(_polygon([5, 5, 9, 9, 5, 5]), None, None),
    "less than a pixel": Flaw(_polygon([5.1, 5.1, 5.2, 5.1, 5.2, 5.2]), None, None),
    "one pixel": Flaw(_polygon([5, 5, 6, 5, 6, 6, 5, 6]), None, None),
    # RLE
    "uncompressed RLE": Flaw(_rle([100, 300, 2000]), None, None),
    "compressed RLE": Flaw(_rle("T3\\9`n1"), None, None),
    "RLE without a pixel": Flaw(_rle([2400]), None, None),
    "RLE of another size": _both(_rle([2400], (30, 80)), r"annotation 2 .*size \[30, 80\] on an image of \[40, 60\]"),
    "RLE turned": _both(_rle([2400], (60, 40)), "annotation 2 .*in the other order"),
    "RLE of no size": _both(_rle([2400], [40.0, "60"]), "annotation 2 .*two whole numbers"),
    "RLE without counts": _both(_annotation(segmentation={"size": [40, 60]}), "annotation 2 .*'size' and 'counts'"),
    "a wrong sum": _both(_rle([100, 300]), "annotation 2 .*sum to 400, expected height . width = 2400"),
    "a negative run": _both(_rle([-100, 2500]), "annotation 2 .*a run length of -100"),
    "a huge run": _both(_rle([0, 2**40]), "annotation 2 .*a run length of 1099511627776"),
    "runs that are fractions": _both(_rle([0.5, 2399.5]), "annotation 2 .*must be whole numbers"),
    "counts that are null": _both(_rle(None), "annotation 2 .*must be whole numbers"),
    "counts of garbage": _both(_rle("~~~é"), "annotation 2 .*a character that is not COCO's"),
    "counts cut off": _both(_rle("T3\\9`"), "annotation 2 .*cut off"),
    # Ids and classes
    "duplicate annotation ids": _both(_annotation(id=1), r"1 ids of 'annotations' are not unique \(1\)"),
    "duplicate image ids": _both(_image(id=1), r"1 ids of 'images' are not unique \(1\)"),
    "an id of text": _both(_annotation(id="two"), "entry 1 of 'annotations' has the id 'two'; expected a whole number"),
    "an id that is a list": _both(_annotation(id=[2]), r"entry 1 of 'annotations' has the id \[2\]"),
    "an image id of text": _both(_image(id="2"), "entry 1 of 'images' has the id '2'"),
    "an id of a fraction": _both(_annotation(id=2.5), "entry 1 of 'annotations' has the id 2.5"),
    "a missing category": _both(_annotation(category_id=4), r"annotation 2 .*category_id 4, .*\(\[3, 17, 90\]\)"),
    "a category of text": _both(_annotation(category_id="cross"), "annotation 2 .*category_id 'cross'"),
    "a category that is a list": _both(_annotation(category_id=[3]), r"annotation 2 .*category_id \[3\]"),
    "a missing image": _both(_annotation(image_id=77), "annotation 2 has image_id 77"),
    "an image id that is null": _both(_annotation(image_id=None), "annotation 2 has image_id None"),
    "an annotation that is a number": _both(
        lambda content: content["annotations"].append(7), "entry 4 of 'annotations' has no 'id'"
    ),
    "duplicate category ids": _both(
        lambda content: content["categories"][0].update(id=3), r"1 ids of 'categories' are not unique \(3\)"
    ),
    "no category_id": _both(
        lambda content: content["annotations"][1].pop("category_id"), "entry 1 of 'annotations' has no 'category_id'"
    ),
    # Fields
    "iscrowd is text": _both(_annotation(iscrowd="0"), "annotation 2 .*iscrowd '0'; expected 0 or 1"),
    "iscrowd is 2": _both(_annotation(iscrowd=2), "annotation 2 .*iscrowd 2; expected 0 or 1"),
    "ignore": _both(_annotation(ignore=1), "annotation 2 .*'ignore'.*use 'iscrowd'"),
    "bbox is null": Flaw(_annotation(bbox=None), None, "annotation 2 .*bbox None; expected"),
    "bbox is empty": Flaw(_annotation(bbox=[]), None, r"annotation 2 .*bbox \[\]; expected"),
    "bbox has NaN": Flaw(_annotation(bbox=[1, 2, NAN, 4]), None, "annotation 2 .*bbox .*nan"),
    "bbox has text": Flaw(_annotation(bbox=[1, 2, "3", 4]), None, "annotation 2 .*bbox .*'3'"),
    "bbox is negative": Flaw(_annotation(bbox=[1, 2, -3, 4]), None, "annotation 2 .*bbox .*-3"),
    "area is NaN": Flaw(_annotation(area=NAN), None, "annotation 2 .*area nan"),
    "area is text": Flaw(_annotation(area="400"), None, "annotation 2 .*area '400'"),
    "area is negative": Flaw(_annotation(area=-1), None, "annotation 2 .*area -1"),
    "no area": Flaw(lambda content: content["annotations"][1].pop("area"), None, "entry 1 of 'annotations' has no 'a"),
    "keypoints of garbage": Flaw(_annotation(keypoints="abc"), None, None),
    # Images
    "height is text": _both(_image(height="40"), "image 2 .*height '40'"),
    "height is zero": _both(_image(height=0), "image 2 .*height 0"),
    "width is missing": _both(lambda content: content["images"][1].pop("width"), "entry 1 of 'images' has no 'width'"),
    "file_name is null": _both(_image(file_name=None), "image 2 has the file_name None"),
    "a missing file": _both(
        _image(file_name="absent_2.png"), "'absent_2.png' does not exist|absent_2.png: No such file"
    ),
    "another size": _both(_image(height=50), "2.png has 40 x 60 pixels .*made for 50 x 60: correct height and width"),
    "turned": _both(_image(height=60, width=40), "2.png has 40 x 60 .*for 60 x 40: .*EXIF"),
    # The whole
    "nothing but a crowd": Flaw(
        lambda content: content.update(annotations=content["annotations"][3:]), "no object that is not a crowd", None
    ),
    "no annotations": Flaw(lambda content: content.pop("annotations"), "has no annotations to train on", None),
    "empty annotations": Flaw(lambda content: content.update(annotations=[]), "has no annotations to train on", None),
    "annotations is null": _both(lambda content: content.update(annotations=None), "'annotations' is a NoneType"),
    "annotations is an object": _both(lambda content: content.update(annotations={"a": 1}), "'annotations' is a dict"),
    "boxes only": _both(
        lambda content: [entry.pop("segmentation") for entry in content["annotations"]],
        "no annotation has a segmentation|has no 'segmentation'",
    ),
    "no images": _both(lambda content: content.pop("images"), "has no 'images'"),
    "images is empty": _both(lambda content: content.update(images=[]), "has no 'images'"),
    "images is a number": _both(lambda content: content.update(images=7), "'images' is a int"),
    "no categories": _both(lambda content: content.update(categories=[]), "has no 'categories'"),
    "a category without a name": _both(
        lambda content: content["categories"][0].pop("name"), "entry 0 of 'categories' has no 'name'"
    ),
    "a category's name is null": _both(lambda content: content["categories"][0].update(name=None), "category 90 is N"),
    "one category too many": _both(
        lambda content: content["categories"].append({"id": 5, "name": "ring"}), "NUM_CLASSES 4"
    ),
}


def flawed(name: str) -> dict:
    """Return CONTENT with a flaw."""
    content = copy.deepcopy(CONTENT)
    FLAWS[name].change(content)
    return content

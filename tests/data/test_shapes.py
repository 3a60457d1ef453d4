"""Test the drawn-shapes data set, above all that the classes differ only in their outlines."""

import json
from itertools import combinations
from typing import NamedTuple

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from pycocotools import mask as mask_util
from scipy import stats
from shapely.geometry import Polygon

from sparseinst.data.shapes import (
    CLASS_NAMES,
    MAX_OBJECTS,
    MIN_VISIBLE,
    SHAPES,
    TEXTURES,
    ShapeScene,
    annotate_scene,
    compose_scene,
    draw_shapes_image,
    paint_scene,
    random_ellipses,
    rasterize,
)
from sparseinst.tools.make_shapes import write_shapes_dataset

SIZE = 128
NUM_IMAGES = 350
SEED = 7
IMAGE_AREA = SIZE * SIZE
LOWEST_P_VALUE = 0.001


class Drawn(NamedTuple):
    scene: ShapeScene
    image: np.ndarray
    annotations: list[dict]


@pytest.fixture(scope="module")
def drawn() -> list[Drawn]:
    return draw(NUM_IMAGES)


@pytest.fixture(scope="module")
def few() -> list[Drawn]:
    return draw(100)


def draw(num_images: int) -> list[Drawn]:
    sample = []
    for index in range(num_images):
        rng = np.random.default_rng((SEED, index))
        scene = compose_scene(rng, SIZE, SIZE)
        sample.append(Drawn(scene, paint_scene(rng, scene), annotate_scene(scene)))
    return sample


def decode(segmentation: list | dict, height: int = SIZE, width: int = SIZE) -> np.ndarray:
    """Boolean mask (H, W) of COCO polygons or of an uncompressed RLE."""
    encoded = mask_util.frPyObjects(segmentation, height, width)
    return mask_util.decode(mask_util.merge(encoded) if isinstance(encoded, list) else encoded).astype(bool)


def iou(first: np.ndarray, second: np.ndarray) -> float:
    return (first & second).sum() / (first | second).sum()


def test_four_shapes_of_one_area_and_different_outlines():
    assert CLASS_NAMES == ["disc", "triangle", "cross", "bar"]
    for outline in SHAPES.values():
        polygon = Polygon(outline)
        assert polygon.area == pytest.approx(1)
        assert polygon.centroid.coords[0] == pytest.approx((0, 0), abs=1e-9)
    # Perimeters at area 1: disc 2 sqrt(pi), triangle 6 / 3 ** 0.75, plus of five squares 12 / sqrt(5), 1:4 bar 5.
    perimeters = [Polygon(outline).length for outline in SHAPES.values()]
    assert perimeters == pytest.approx([3.545, 4.559, 5.367, 5.0], abs=0.01)


def test_rasterize_gives_the_share_of_each_pixel():
    # From x 0.5 to 2, y 0 to 1: half of the first pixel, all of the second. OpenCV fills the edges too: 1/8 pixel.
    rectangle = np.array([[0.5, 0], [2, 0], [2, 1], [0.5, 1]])
    shares = rasterize([rectangle], (2, 3))
    assert shares.dtype == np.float32
    assert shares == pytest.approx(np.array([[0.5, 1, 0], [0, 0, 0]]), abs=0.126)


def test_random_ellipses_stay_inside_with_the_median_area():
    outlines = random_ellipses(np.random.default_rng(0), (60, 90), 200, median_area=0.04)
    shares = [(rasterize([outline], (60, 90)) > 0.5).mean() for outline in outlines]
    assert all((outline >= 0).all() and (outline <= (90, 60)).all() for outline in outlines)
    # The image's border cuts some.
    assert 0.02 < np.median(shares) < 0.045 and min(shares) > 0
    assert random_ellipses(np.random.default_rng(0), (60, 90), 0) == []


def test_one_to_eight_objects_and_some_empty_images(drawn):
    counts = np.bincount([len(item.annotations) for item in drawn], minlength=MAX_OBJECTS + 1)
    assert len(counts) == MAX_OBJECTS + 1
    assert 0.02 <= counts[0] / NUM_IMAGES <= 0.10
    assert (counts[1:] > 0.01 * NUM_IMAGES).all()


def test_areas_places_and_colors(drawn):
    for item in drawn:
        for shape, annotation in zip(item.scene.objects, item.annotations, strict=True):
            full_area = Polygon(shape.outline).area
            assert 0.005 <= full_area / IMAGE_AREA <= 0.20
            assert 0.005 <= annotation["area"] / IMAGE_AREA <= 0.20
            visible_area = sum(Polygon(polygon).area for polygon in shape.visible)
            assert visible_area >= MIN_VISIBLE * full_area * (1 - 1e-9)
            assert (shape.outline >= 0).all() and (shape.outline <= SIZE).all()
            assert np.linalg.norm(shape.tones[0] - item.scene.background_tones[0]) > 100


def test_a_quarter_of_the_objects_overlap_another(drawn):
    num_objects = num_overlapping = 0
    for item in drawn:
        polygons = [Polygon(shape.outline) for shape in item.scene.objects]
        overlapping = [
            pair for pair in combinations(range(len(polygons)), 2) if polygons[pair[0]].intersects(polygons[pair[1]])
        ]
        num_objects += len(polygons)
        num_overlapping += len({index for pair in overlapping for index in pair})
    assert 0.15 <= num_overlapping / num_objects <= 0.35


def test_visible_parts_do_not_overlap_and_boxes_are_tight(few):
    for item in few:
        masks = [decode(annotation["segmentation"]) for annotation in item.annotations]
        for first, second in combinations(masks, 2):
            # Both polygons' boundaries run through the same pixels.
            assert (first & second).sum() <= 0.1 * min(first.sum(), second.sum())
        for mask, annotation in zip(masks, item.annotations):
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
            assert annotation["bbox"] == box and annotation["area"] == mask.sum()


def test_polygons_are_the_pixels_that_are_drawn(few):
    ious = []
    for item in few[:40]:
        for index, annotation in enumerate(item.annotations):
            # The pixels that an object is drawn on are those that change with its color.
            painted = []
            for level in (0.0, 255.0):
                objects = list(item.scene.objects)
                objects[index] = objects[index]._replace(texture="flat", tones=np.full((2, 3), level))
                painted.append(paint_scene(np.random.default_rng(0), item.scene._replace(objects=objects)))
            change = painted[1].astype(float).mean(axis=2) - painted[0].astype(float).mean(axis=2)
            ious.append(iou(change > 127, decode(annotation["segmentation"])))
    assert len(ious) > 100
    # The smallest objects are 5 pixels thick, and pycocotools rounds corners to a fifth of a pixel.
    assert np.mean(ious) > 0.95 and min(ious) > 0.85


# What must not depend on the class. Each gets a name and a value per object.
MEASURES = ("red", "green", "blue", "area", "centre x", "centre y")


@pytest.fixture(scope="module")
def measured(drawn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of all objects: class (n,), texture (n,) as an index, and MEASURES (n, 6), from pixels and visible masks."""
    classes, textures, values = [], [], []
    for item in drawn:
        for shape, annotation in zip(item.scene.objects, item.annotations, strict=True):
            mask = decode(annotation["segmentation"])
            y, x = np.nonzero(mask)
            classes.append(shape.class_index)
            textures.append(TEXTURES.index(shape.texture))
            values.append([*item.image[mask].mean(axis=0), mask.sum(), x.mean(), y.mean()])
    return np.array(classes), np.array(textures), np.array(values)


def p_values(classes: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Kolmogorov-Smirnov tests (K, 6) of each class against all others, measure by measure."""
    return np.array(
        [
            [stats.ks_2samp(column[classes == index], column[classes != index]).pvalue for column in values.T]
            for index in range(len(CLASS_NAMES))
        ]
    )


def contingency_p_value(classes: np.ndarray, labels: np.ndarray) -> float:
    table = np.zeros((classes.max() + 1, labels.max() + 1))
    np.add.at(table, (classes, labels), 1)
    return stats.chi2_contingency(table).pvalue


def test_classes_are_equally_common(measured):
    classes, _, _ = measured
    assert stats.chisquare(np.bincount(classes, minlength=len(CLASS_NAMES))).pvalue > LOWEST_P_VALUE


def test_color_area_and_position_do_not_tell_the_class(measured):
    classes, _, values = measured
    found = p_values(classes, values)
    assert (found > LOWEST_P_VALUE).all(), dict(zip(MEASURES, found.min(axis=0), strict=True))


def test_texture_and_overlap_do_not_tell_the_class(drawn, measured):
    classes, textures, _ = measured
    assert contingency_p_value(classes, textures) > LOWEST_P_VALUE
    hidden = [
        len(shape.visible) > 1 or len(shape.visible[0]) != len(shape.outline)
        for item in drawn
        for shape in item.scene.objects
    ]
    assert contingency_p_value(classes, np.array(hidden, int)) > LOWEST_P_VALUE


def test_the_comparisons_notice_a_bias(measured):
    classes, textures, values = measured
    # Discs a little redder, larger, further right: a shift by half the spread.
    values = values + 0.5 * values.std(axis=0) * (classes == 0)[:, None]
    assert (p_values(classes, values)[0] < LOWEST_P_VALUE).all()
    discs = np.flatnonzero(classes == 0)
    textures = textures.copy()
    textures[discs[: len(discs) // 3]] = 0
    assert contingency_p_value(classes, textures) < LOWEST_P_VALUE


@pytest.mark.parametrize("index", range(8))
def test_a_crowd_is_a_group_of_touching_shapes_of_one_class(index):
    rng = np.random.default_rng((3, index))
    scene = compose_scene(rng, SIZE, SIZE, with_crowd=True)
    members = [shape for shape in scene.objects if shape.is_crowd]
    crowds = [annotation for annotation in annotate_scene(scene) if annotation["iscrowd"]]
    assert len(members) == 7 and len({shape.class_index for shape in members}) == 1
    assert len(crowds) == 1 and crowds[0]["category_id"] == members[0].class_index + 1
    mask = decode(crowds[0]["segmentation"])
    assert mask.sum() == crowds[0]["area"]
    num_parts = cv2.connectedComponents(mask.astype(np.uint8))[0] - 1
    assert num_parts <= 3
    union = np.any([decode([shape.outline.reshape(-1).tolist()]) for shape in members], axis=0)
    assert iou(mask, union) > 0.9


@pytest.mark.parametrize("size", [(64, 64), (96, 200), (201, 77)])
def test_any_image_size(size):
    height, width = size
    for index in range(10):
        image, annotations = draw_shapes_image(np.random.default_rng((0, index)), height, width, with_crowd=index == 0)
        assert image.shape == (height, width, 3) and image.dtype == np.uint8
        assert len(np.unique(image.reshape(-1, 3), axis=0)) > 1000
        for annotation in annotations:
            assert annotation["area"] == decode(annotation["segmentation"], height, width).sum()
            x, y, box_width, box_height = annotation["bbox"]
            assert x + box_width <= width and y + box_height <= height


def test_the_data_are_a_function_of_the_seed_and_start_the_same_at_any_length(tmp_path):
    first = write_shapes_dataset(tmp_path / "first", 4, seed=2)
    second = write_shapes_dataset(tmp_path / "second", 4, seed=2)
    longer = write_shapes_dataset(tmp_path / "longer", 6, seed=2)
    other = write_shapes_dataset(tmp_path / "other", 1, seed=3)
    assert first.read_bytes() == second.read_bytes()
    short, long = json.loads(first.read_text()), json.loads(longer.read_text())
    assert long["images"][:4] == short["images"]
    assert long["annotations"][: len(short["annotations"])] == short["annotations"]
    for image in short["images"]:
        name = f"train/{image['file_name']}"
        assert (first.parent / name).read_bytes() == (longer.parent / name).read_bytes()
    assert (other.parent / "train/000000.jpg").read_bytes() != (first.parent / "train/000000.jpg").read_bytes()


def test_detectron2_loads_what_is_written(tmp_path):
    json_path = write_shapes_dataset(tmp_path, 30, seed=0, split="val")
    content = json.loads(json_path.read_text())
    assert [category["id"] for category in content["categories"]] == [1, 2, 3, 4]
    for part, count in (("images", 30), ("annotations", len(content["annotations"]))):
        assert [entry["id"] for entry in content[part]] == list(range(1, count + 1))
    assert content["info"]["seed"] == 0 and content["info"]["size"] == SIZE
    assert sum(annotation["iscrowd"] for annotation in content["annotations"]) == 1

    name = "shapes_of_test_shapes"
    register_coco_instances(name, {}, str(json_path), str(tmp_path / "val"))
    try:
        records = DatasetCatalog.get(name)
        assert MetadataCatalog.get(name).thing_classes == CLASS_NAMES
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    assert len(records) == 30 and any(not record["annotations"] for record in records)
    assert sum(len(record["annotations"]) for record in records) == len(content["annotations"])
    written = cv2.imread(records[0]["file_name"])
    image, _ = draw_shapes_image(np.random.default_rng((0, 0)), SIZE, SIZE, with_crowd=True)
    # JPEG takes a little; channels swapped would be far off.
    assert np.abs(written[..., ::-1].astype(float) - image).mean() < 10


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"num_images": 0}, "images of 'val' must be at least 1, not 0"),
        ({"seed": -1}, "seed of 'val' must not be negative, not -1"),
        ({"size": 63}, "at least 64 pixels, not 63 x 63"),
    ],
)
def test_numbers_out_of_range_are_refused(numbers, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_shapes_dataset(tmp_path, **{"num_images": 1, "seed": 0, **numbers}, split="val")

"""Test the mapper on random valid and broken annotations: a DataError, or instances whose parts agree."""

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from sparseinst.data.augmentations import RandomCrop, ResizeShortestEdge
from sparseinst.data.coco_checks import check_content
from sparseinst.data.coco_json import to_dataset_dicts
from sparseinst.data.dataset_mapper import SparseInstDatasetMapper
from sparseinst.data.images import DataError

HEIGHT, WIDTH = 20, 30

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
coordinates = st.floats(-20, 50) | st.integers(-400, 400) | st.sampled_from([0, 5.5, 20, 30, 1e6, -1e-300])
polygons = st.lists(coordinates, max_size=16)
good_polygons = st.lists(st.tuples(st.floats(-5, 35), st.floats(-5, 25)), min_size=3, max_size=8).map(
    lambda points: [value for point in points for value in point]
)


@st.composite
def rles(draw):
    mask = np.random.default_rng(draw(st.integers(0, 999))).random((HEIGHT, WIDTH)) < draw(st.floats(0, 1))
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    kind = draw(st.sampled_from(["good", "text", "damaged", "list", "any"]))
    if kind == "text":
        rle["counts"] = rle["counts"].decode()
    elif kind == "damaged":
        position = draw(st.integers(0, len(rle["counts"])))
        rle["counts"] = rle["counts"][:position] + draw(st.binary(max_size=3)) + rle["counts"][position + 1 :]
    elif kind == "list":
        cuts = sorted(draw(st.lists(st.integers(-3, HEIGHT * WIDTH + 3), max_size=6)))
        rle["counts"] = np.diff([0, *cuts, HEIGHT * WIDTH]).tolist()
    elif kind == "any":
        rle = {"size": draw(st.just([HEIGHT, WIDTH]) | json_values), "counts": draw(json_values)}
    return rle


segmentations = (
    st.lists(good_polygons, min_size=1, max_size=3)
    | st.lists(polygons | json_values, max_size=3)
    | rles()
    | json_values
)
annotations = (
    st.fixed_dictionaries(
        {"segmentation": segmentations, "category_id": st.integers(0, 5)},
        optional={"iscrowd": st.sampled_from([0, 1, False, True]), "id": json_values, "bbox": json_values},
    )
    | st.fixed_dictionaries(
        {"segmentation": st.lists(good_polygons, min_size=1, max_size=3), "category_id": st.just(0) | json_values},
        optional={"iscrowd": json_values},
    )
    | st.fixed_dictionaries(
        {}, optional={"segmentation": segmentations, "category_id": json_values, "iscrowd": json_values}
    )
)

AUGMENTATIONS = {
    "none": [],
    "flip and resize": [T.RandomFlip(), ResizeShortestEdge([8, 40], 45, "choice")],
    "crop": [RandomCrop("relative_range", (0.1, 0.1)), ResizeShortestEdge([30], 60, "choice")],
    "rotation": [T.RandomRotation([-40, 40])],
}


@pytest.fixture(scope="module")
def image_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("mapper") / "a.png"
    Image.new("RGB", (WIDTH, HEIGHT), (9, 90, 200)).save(path)
    return str(path)


def assert_agreement(instances, image):
    size = tuple(image.shape[1:])
    masks = instances.gt_masks.tensor
    assert instances.image_size == size and masks.shape == (len(instances), *size) and masks.dtype == torch.bool
    assert len(instances.gt_boxes) == len(instances.gt_classes) == len(instances)
    assert instances.gt_classes.dtype == torch.int64 and (instances.gt_classes >= 0).all()
    assert masks.flatten(1).any(1).all()
    assert torch.equal(instances.gt_boxes.tensor, instances.gt_masks.get_bounding_boxes().tensor)


@pytest.mark.parametrize("name", AUGMENTATIONS)
@given(given_annotations=st.lists(annotations | json_values, max_size=4) | json_values, seed=st.integers(0, 99))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_annotations(name, image_path, given_annotations, seed):
    mapper = SparseInstDatasetMapper(True, augmentations=AUGMENTATIONS[name], image_format="RGB")
    np.random.seed(seed)
    try:
        mapped = mapper({"file_name": image_path, "annotations": given_annotations})
    except DataError as error:
        assert str(error).startswith(image_path) and "annotation" in str(error)
        return
    assert_agreement(mapped["instances"], mapped["image"])
    assert len(mapped["instances"]) <= len(given_annotations)


@given(segmentations_of_image=st.lists(st.lists(good_polygons, min_size=1, max_size=2) | rles(), max_size=5))
@settings(max_examples=100, deadline=None)
def test_the_json_s_check_and_the_mapper_agree(image_path, segmentations_of_image):
    """The mapper maps what the check accepts, and refuses what the check refuses."""
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}],
        "categories": [{"id": 7, "name": "disc"}],
        "annotations": [
            # A json has text where an RLE of pycocotools has bytes.
            {"id": index + 1, "image_id": 1, "category_id": 7, "segmentation": _as_json(segmentation)}
            for index, segmentation in enumerate(segmentations_of_image)
        ],
    }
    report = check_content(content)
    mapper = SparseInstDatasetMapper(True, augmentations=[], image_format="RGB")
    # These stop where a training would learn nothing; the mapper reads them.
    of_all_objects = ("coordinates look normalised", "objects without a pixel")
    if any(problem.kind not in of_all_objects for problem in report.problems()):
        image = {"file_name": image_path, "annotations": [{**a, "category_id": 0} for a in content["annotations"]]}
        with pytest.raises(DataError):
            mapper(image)
        return
    (image,) = to_dataset_dicts(content, "")
    mapped = mapper({**image, "file_name": image_path})
    assert_agreement(mapped["instances"], mapped["image"])
    assert len(mapped["instances"]) <= report.num_instances.total()


def _as_json(segmentation):
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], bytes):
        return {**segmentation, "counts": segmentation["counts"].decode("latin-1")}
    return segmentation


@given(st.dictionaries(st.sampled_from(["file_name", "height", "width", "annotations", "image_id"]), json_values))
@settings(max_examples=100, deadline=None)
def test_any_dataset_dict(dataset_dict):
    mapper = SparseInstDatasetMapper(True, augmentations=[], image_format="RGB")
    with pytest.raises(DataError):
        mapper(dataset_dict)


def optional(*keys):
    return {key: json_values for key in keys}


def entries(*valid_or_random):
    return st.lists(st.one_of(*valid_or_random), max_size=3) | json_values


jsons = st.fixed_dictionaries(
    {},
    optional={
        "images": entries(
            st.fixed_dictionaries({}, optional=optional("id", "file_name", "height", "width")),
            st.just({"id": 1, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}),
        ),
        "categories": entries(
            st.fixed_dictionaries({}, optional=optional("id", "name")), st.just({"id": 7, "name": "disc"})
        ),
        "annotations": entries(
            st.fixed_dictionaries(
                {"id": st.integers(), "image_id": st.just(1) | json_values, "category_id": st.just(7) | json_values},
                optional=optional("bbox", "area", "iscrowd", "ignore") | {"segmentation": segmentations},
            )
        ),
    },
)


@given(jsons | json_values, st.booleans())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_json_is_checked(content, for_evaluation):
    report = check_content(content, for_evaluation)
    if not report.problems():
        assert len(to_dataset_dicts(content, "images")) == len(content["images"])
    assert all("\n" not in finding.message or "\\n" in repr(content) for finding in report.findings)

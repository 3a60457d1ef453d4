"""Test the mapper on small images: masks of all formats, crops, empty images, broken annotations."""

import copy
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BitMasks, BoxMode, Instances
from fvcore.transforms.transform import CropTransform, NoOpTransform, PadTransform
from PIL import Image
from pycocotools import mask as coco_mask

from sparseinst import add_sparse_inst_config
from sparseinst.data.augmentations import build_train_augmentations
from sparseinst.data.dataset_mapper import SparseInstDatasetMapper
from sparseinst.data.images import DataError

HEIGHT, WIDTH = 24, 32

_SHARED_DATA = Path(os.environ.get("SPARSEINST_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture
def image_file(tmp_path: Path) -> str:
    path = tmp_path / "image.png"
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def _rectangle(x0: float, y0: float, x1: float, y1: float) -> list[float]:
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def _bitmask(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[y0:y1, x0:x1] = 1
    return mask


def _rle(mask: np.ndarray, form: str) -> dict:
    """RLE of a mask, with counts as "bytes", "text" or "list"."""
    rle = coco_mask.encode(np.asfortranarray(mask))
    if form == "text":
        rle["counts"] = rle["counts"].decode("ascii")
    elif form == "list":
        pixels = mask.flatten(order="F")
        changes = np.flatnonzero(np.diff(pixels)) + 1
        runs = np.diff([0, *changes, len(pixels)]).tolist()
        rle["counts"] = runs if pixels[0] == 0 else [0, *runs]
    return rle


def _annotation(segmentation: list | dict, category_id: int = 0, **more: object) -> dict:
    box = {"bbox": [0, 0, 1, 1], "bbox_mode": BoxMode.XYWH_ABS}
    return {"segmentation": segmentation, "category_id": category_id, **box, **more}


def _dict(image_file: str, *annotations: dict) -> dict:
    size = {"height": HEIGHT, "width": WIDTH}
    return {"file_name": image_file, "image_id": 7, **size, "annotations": list(annotations)}


def _mapper(*augmentations: T.Augmentation | T.Transform, is_train: bool = True) -> SparseInstDatasetMapper:
    return SparseInstDatasetMapper(is_train, augmentations=list(augmentations), image_format="RGB")


def _cfg(**keys: object) -> CfgNode:
    cfg = get_cfg()
    add_sparse_inst_config(cfg)
    cfg.INPUT.FORMAT = "RGB"
    cfg.merge_from_list([item for key, value in keys.items() for item in (key.replace("__", "."), value)])
    return cfg


def _assert_complete(instances: Instances, num_instances: int, size: tuple[int, int]) -> None:
    assert len(instances) == num_instances
    assert instances.image_size == size
    assert isinstance(instances.gt_masks, BitMasks)
    assert instances.gt_masks.tensor.dtype == torch.bool
    assert instances.gt_masks.tensor.shape == (num_instances, *size)
    assert instances.gt_classes.dtype == torch.int64
    assert instances.gt_boxes.tensor.dtype == torch.float32
    assert torch.equal(instances.gt_boxes.tensor, instances.gt_masks.get_bounding_boxes().tensor)
    assert instances.gt_masks.nonempty().all()


def test_output_keeps_the_dict_and_leaves_the_input_alone(image_file: str) -> None:
    dataset_dict = _dict(image_file, _annotation([_rectangle(4, 6, 12, 20)], 3))
    before = copy.deepcopy(dataset_dict)
    result = _mapper(T.Resize((2 * HEIGHT, 2 * WIDTH)))(dataset_dict)
    assert dataset_dict == before
    assert set(result) == {"file_name", "image_id", "height", "width", "image", "instances"}
    assert (result["height"], result["width"], result["image_id"]) == (HEIGHT, WIDTH, 7)
    assert result["image"].dtype == torch.uint8
    assert result["image"].shape == (3, 2 * HEIGHT, 2 * WIDTH)
    assert result["image"].is_contiguous()
    _assert_complete(result["instances"], 1, (2 * HEIGHT, 2 * WIDTH))
    assert result["instances"].gt_classes.tolist() == [3]
    assert result["instances"].gt_boxes.tensor.tolist() == [[8, 12, 24, 40]]


@pytest.mark.parametrize("form", ["bytes", "text", "list"])
@pytest.mark.parametrize(
    "augmentation",
    [
        NoOpTransform(),
        T.HFlipTransform(WIDTH),
        T.VFlipTransform(HEIGHT),
        T.Resize((2 * HEIGHT, 2 * WIDTH)),
        CropTransform(6, 4, 20, 15),
    ],
    ids=lambda augmentation: type(augmentation).__name__,
)
def test_polygon_and_rle_of_one_object_give_one_mask(form: str, augmentation: T.Transform, image_file: str) -> None:
    corners = (3, 5, 17, 11)
    # Mixed in one image, with a mask that begins with ones (an RLE whose first run is 0).
    annotations = [
        _annotation([_rectangle(*corners)]),
        _annotation(_rle(_bitmask(*corners), form)),
        _annotation([_rectangle(0, 0, 9, 8)]),
        _annotation(_rle(_bitmask(0, 0, 9, 8), form)),
    ]
    result = _mapper(augmentation)(_dict(image_file, *annotations))
    masks = result["instances"].gt_masks.tensor
    _assert_complete(result["instances"], 4, tuple(result["image"].shape[1:]))
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[2], masks[3])
    assert not torch.equal(masks[0], masks[2])


def test_flips_are_exact(image_file: str) -> None:
    dataset_dict = _dict(image_file, _annotation([_rectangle(3, 5, 17, 11), _rectangle(20, 1, 22, 3)]))
    reference = _mapper()(dataset_dict)
    for transform, dimension in ((T.HFlipTransform(WIDTH), 2), (T.VFlipTransform(HEIGHT), 1)):
        flipped = _mapper(transform)(dataset_dict)
        assert torch.equal(flipped["image"], reference["image"].flip(dimension))
        assert torch.equal(flipped["instances"].gt_masks.tensor, reference["instances"].gt_masks.tensor.flip(dimension))


def test_polygons_are_rasterized_at_the_final_size(image_file: str) -> None:
    # 2.5 to 5.5 is 10 to 22 at four times the size: a mask rasterized first would lie on multiples of 4.
    dataset_dict = _dict(image_file, _annotation([_rectangle(2.5, 2.5, 5.5, 5.5)]))
    result = _mapper(T.Resize((4 * HEIGHT, 4 * WIDTH)))(dataset_dict)
    assert result["instances"].gt_boxes.tensor.tolist() == [[10, 10, 22, 22]]
    assert result["instances"].gt_masks.tensor.sum() == 12 * 12


def _compare_with_the_stock_mapper(dicts: list[dict], augmentation: T.Augmentation) -> int:
    """Compare images, classes and masks; return the number of instances."""
    stock = DatasetMapper(
        True, augmentations=[augmentation], image_format="RGB", use_instance_mask=True, instance_mask_format="bitmask"
    )
    num_instances = 0
    for dataset_dict in dicts:
        result, expected = _mapper(augmentation)(dataset_dict), stock(dataset_dict)
        ours, theirs = result["instances"], expected["instances"]
        assert torch.equal(result["image"], expected["image"])
        assert torch.equal(ours.gt_classes, theirs.gt_classes)
        if len(theirs):
            _assert_complete(ours, len(theirs), theirs.image_size)
            assert torch.equal(ours.gt_masks.tensor, theirs.gt_masks.tensor)
        num_instances += len(ours)
    return num_instances


def test_same_masks_as_the_stock_mapper(image_file: str) -> None:
    rng = np.random.default_rng(1)
    # Star-shaped outlines, some over the right and the lower border. (Left of and above the image the mapper rounds as
    # inside, pycocotools does not.)
    annotations = []
    for _ in range(40):
        angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
        points = rng.uniform(0, (WIDTH, HEIGHT)) + rng.uniform(2, 8, (9, 1)) * np.stack(
            [np.cos(angles), np.sin(angles)], axis=1
        )
        annotations.append(_annotation([np.maximum(points, 0).reshape(-1).tolist()]))
    assert _compare_with_the_stock_mapper([_dict(image_file, *annotations)], T.Resize((50, 70))) == 40


@pytest.mark.skipif(
    not (_SHARED_DATA / "coco_mini").is_dir(),
    reason=f"no folder {_SHARED_DATA / 'coco_mini'} (set SPARSEINST_TEST_DATA)",
)
def test_same_masks_as_the_stock_mapper_on_photographs() -> None:
    folder = _SHARED_DATA / "coco_mini"
    dicts = load_coco_json(str(folder / "instances_val.json"), str(folder / "images"), "coco_mini_mapper_test")[:20]
    assert _compare_with_the_stock_mapper(dicts, T.ResizeShortestEdge(320, 640)) > 100


def test_crop_cuts_masks_and_boxes(image_file: str) -> None:
    annotations = [
        _annotation([_rectangle(0, 0, 10, 10)], 0),  # cut to (0, 0, 2, 5) of the crop
        _annotation([_rectangle(0, 0, 8, 5)], 1),  # touches the crop's corner from outside
        _annotation([_rectangle(20, 20, 30, 23)], 2),  # outside
        _annotation([_rectangle(-5, -5, 60, 60)], 3),  # larger than the image
    ]
    result = _mapper(CropTransform(8, 5, 10, 12))(_dict(image_file, *annotations))
    _assert_complete(result["instances"], 2, (12, 10))
    assert result["instances"].gt_classes.tolist() == [0, 3]
    assert result["instances"].gt_boxes.tensor.tolist() == [[0, 0, 2, 5], [0, 0, 10, 12]]
    assert result["instances"].gt_masks.tensor[0].sum() == 2 * 5
    assert result["instances"].gt_masks.tensor[1].all()


@pytest.mark.parametrize(
    "polygon",
    [
        [2.0, 2.0, 22.0, 18.0, 22.0, 2.0, 2.0, 18.0],  # self-crossing
        # An outline that touches itself, around a hole.
        [*_rectangle(2, 2, 22, 18), 2, 2, 6, 6, 6, 14, 18, 14, 18, 6, 6, 6],
        [2.0, 2.0, 22.0, 2.0, 22.0, 18.0, 22.0, 2.0],  # a spike, no area on the way back
    ],
)
def test_crop_of_invalid_polygons_is_the_crop_of_their_mask(polygon: list[float], image_file: str) -> None:
    whole = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([polygon], HEIGHT, WIDTH))).astype(bool)
    result = _mapper(CropTransform(4, 4, 15, 12))(_dict(image_file, _annotation([polygon])))
    expected = torch.from_numpy(np.ascontiguousarray(whole[4:16, 4:19]))
    masks = result["instances"].gt_masks.tensor
    assert torch.equal(masks.any(dim=0), expected)


def test_padding_shows_nothing_that_was_cropped_away(image_file: str) -> None:
    mask = (0, 0, 32, 24)
    for segmentation in ([_rectangle(*mask)], _rle(_bitmask(*mask), "bytes")):
        for value in (0, 255):  # FixedSizeCrop marks its padding with 255
            transforms = [CropTransform(8, 4, 10, 10), PadTransform(3, 2, 5, 6, 10, 10, 128, value)]
            result = _mapper(*transforms)(_dict(image_file, _annotation(segmentation)))
            _assert_complete(result["instances"], 1, (18, 18))
            assert result["instances"].gt_boxes.tensor.tolist() == [[3, 2, 13, 12]]


@pytest.mark.parametrize(
    ("annotations", "augmentations"),
    [
        ([], []),
        ([_annotation([_rectangle(1, 1, 5, 5)], iscrowd=1)], []),
        ([_annotation(_rle(_bitmask(1, 1, 5, 5), "list"), iscrowd=1)], []),
        ([_annotation([_rectangle(1, 1, 5, 5)])], [CropTransform(10, 10, 8, 7)]),
        ([_annotation(_rle(_bitmask(1, 1, 5, 5), "bytes"))], [CropTransform(10, 10, 8, 7)]),
        ([_annotation([[1, 1, 5, 5]]), _annotation([[3, 3]]), _annotation([]), _annotation([[]])], []),
        ([_annotation([_rectangle(3.1, 3.1, 3.2, 3.2)])], []),
        ([_annotation(_rle(_bitmask(0, 0, 0, 0), "list"))], []),
    ],
    ids=["none", "crowd", "crowd RLE", "cropped polygon", "cropped RLE", "no area", "no pixel", "empty RLE"],
)
def test_no_instance_left(annotations: list, augmentations: list, image_file: str) -> None:
    result = _mapper(*augmentations)(_dict(image_file, *annotations))
    _assert_complete(result["instances"], 0, tuple(result["image"].shape[1:]))
    assert result["instances"].gt_boxes.tensor.shape == (0, 4)


def test_dict_without_annotations_trains_as_an_empty_image(image_file: str) -> None:
    result = _mapper()({"file_name": image_file, "image_id": 1})
    _assert_complete(result["instances"], 0, (HEIGHT, WIDTH))
    assert (result["height"], result["width"]) == (HEIGHT, WIDTH)


# tests/data/test_mask_decoding.py has all messages.
@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[1, 1, float("nan"), 5, 5, 5]], "coordinate nan"),
        ({"size": [WIDTH, HEIGHT], "counts": [HEIGHT * WIDTH]}, r"RLE of size \[32, 24\] on an image of \[24, 32\]"),
    ],
)
def test_broken_annotation_is_named(segmentation: object, message: str, image_file: str) -> None:
    good = _annotation([_rectangle(1, 1, 5, 5)])
    with pytest.raises(ValueError, match=message) as error:
        _mapper()(_dict(image_file, good, _annotation(segmentation, id=4711)))
    assert str(error.value).startswith(f"{image_file}, annotation 1 (id 4711): ")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"category_id": -1}, "category_id is -1; expected a class"),
        ({"category_id": 1.0}, "category_id is 1.0"),
        ({"category_id": "1"}, "category_id is '1'"),
        ({"category_id": True}, "category_id is True"),
        ({"category_id": None}, "category_id is None"),
        ({"iscrowd": "0"}, "iscrowd is '0'; expected 0 or 1"),
        ({"iscrowd": 2}, "iscrowd is 2"),
        ({"iscrowd": None}, "iscrowd is None"),
        ({"iscrowd": [1]}, r"iscrowd is \[1\]"),
    ],
)
def test_wrong_fields_are_named(fields: dict, message: str, image_file: str) -> None:
    annotation = _annotation([_rectangle(1, 1, 5, 5)], id="x") | fields
    with pytest.raises(DataError, match=rf"^{image_file}, annotation 0 \(id x\): {message}"):
        _mapper()(_dict(image_file, annotation))


def test_any_type_of_zero_and_one_is_a_crowd_or_none(image_file: str) -> None:
    for crowd in (0, 1, False, True, np.int64(1), np.bool_(False)):
        annotation = _annotation([_rectangle(1, 1, 5, 5)], np.int64(2), iscrowd=crowd)
        assert len(_mapper()(_dict(image_file, annotation))["instances"]) == (not crowd)


def test_unreadable_image_is_named(tmp_path: Path, image_file: str) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(image_file).read_bytes()[:200])
    for path in (broken, tmp_path / "absent.png"):
        with pytest.raises(ValueError, match=f"Cannot read the image {path}"):
            _mapper()({"file_name": str(path)})
    with pytest.raises(ValueError, match=f"image.png has {HEIGHT} x {WIDTH} pixels.* 5 x {WIDTH}"):
        _mapper()(_dict(image_file) | {"height": 5})


def test_published_recipe() -> None:
    cfg = _cfg(INPUT__CROP__ENABLED=True, INPUT__CROP__TYPE="absolute_range", INPUT__CROP__SIZE=[384, 600])
    flip, crop, resize = build_train_augmentations(cfg)
    assert isinstance(flip, T.RandomFlip)
    assert isinstance(crop, T.RandomApply)
    assert isinstance(resize, T.ResizeShortestEdge)
    np.random.seed(0)
    image = np.zeros((100, 150, 3), dtype=np.uint8)
    short_sides, num_crops = set(), 0
    for _ in range(200):
        transforms = T.AugmentationList([crop])(T.AugInput(image)).transforms
        if len(transforms) == 2:
            num_crops += 1
            short_sides.add(transforms[0].new_h)
            assert transforms[0].new_w == transforms[0].new_h * 3 // 2  # no maximum
            assert min(384, transforms[0].new_h) <= transforms[1].h <= 600
    assert short_sides == {400, 500, 600}
    assert 70 < num_crops < 130


@pytest.mark.parametrize(
    ("flip", "kinds"), [("none", []), ("horizontal", [T.HFlipTransform]), ("vertical", [T.VFlipTransform])]
)
def test_random_flip_is_honoured(flip: str, kinds: list) -> None:
    augmentations = build_train_augmentations(_cfg(INPUT__RANDOM_FLIP=flip))
    np.random.seed(0)
    image = np.zeros((10, 10, 3), dtype=np.uint8)
    seen = {
        type(transform)
        for _ in range(20)
        for transform in T.AugmentationList(augmentations[:-1])(T.AugInput(image)).transforms
    }
    assert seen - {NoOpTransform} == set(kinds)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"INPUT__RANDOM_FLIP": "both"}, "INPUT.RANDOM_FLIP is 'both'"),
        ({"INPUT__MIN_SIZE_TRAIN_SAMPLING": "any"}, "INPUT.MIN_SIZE_TRAIN_SAMPLING is 'any'"),
        (
            {"INPUT__MIN_SIZE_TRAIN_SAMPLING": "range", "INPUT__MIN_SIZE_TRAIN": (1, 2, 3)},
            r"INPUT.MIN_SIZE_TRAIN is \(1, 2, 3\)",
        ),
        ({"INPUT__CROP__ENABLED": True, "INPUT__CROP__TYPE": "all"}, "INPUT.CROP.TYPE is 'all'"),
        ({"INPUT__CROP__ENABLED": True, "INPUT__CROP__SIZE": [384.0, 600.0]}, "two fractions"),
        ({"INPUT__CROP__ENABLED": True, "INPUT__CROP__TYPE": "absolute_range"}, "two whole numbers"),
        (
            {"INPUT__CROP__ENABLED": True, "INPUT__CROP__TYPE": "absolute_range", "INPUT__CROP__SIZE": [600, 384]},
            r"takes \(least, most\)",
        ),
    ],
)
def test_meaningless_value_is_refused(keys: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_train_augmentations(_cfg(**keys))


def test_same_seed_same_output(image_file: str) -> None:
    cfg = _cfg(INPUT__CROP__ENABLED=True, INPUT__CROP__SIZE=[0.4, 0.4], INPUT__MIN_SIZE_TRAIN=(20, 30, 40))
    mapper = SparseInstDatasetMapper(cfg, True)
    dataset_dict = _dict(image_file, _annotation([_rectangle(3, 5, 17, 11)]), _annotation([_rectangle(0, 9, 9, 19)]))
    first, second = [], []
    for results in (first, second):
        np.random.seed(5)
        random.seed(5)
        results += [mapper(dataset_dict) for _ in range(12)]
    assert len({tuple(result["image"].shape) for result in first}) > 2
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["instances"].gt_masks.tensor, b["instances"].gt_masks.tensor)
        _assert_complete(a["instances"], len(a["instances"]), tuple(a["image"].shape[1:]))

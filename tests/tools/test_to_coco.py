"""Convert files of other formats to COCO, and name the format where they are given as COCO."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from sparseinst.data.coco_checks import check_content
from sparseinst.data.coco_json import register_user_datasets
from sparseinst.data.other_formats import describe_path
from sparseinst.tools import check_dataset, to_coco
from tests.tiny_model import tiny_cfg

SQUARE = [(2, 3), (12, 3), (12, 13), (2, 13)]  # 10 x 10 pixels at x 2, y 3


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (40, 20)).save(folder / f"{name}.png")
    return folder


def labelme(folder):
    folder = folder / "labels"
    folder.mkdir()
    shapes = [
        {"label": "cat", "points": SQUARE, "group_id": None, "shape_type": "polygon"},
        {"label": "dog", "points": [[20, 3], [30, 13]], "group_id": 1, "shape_type": "rectangle"},
        {"label": "dog", "points": [[35, 10], [35, 12]], "group_id": 1, "shape_type": "circle"},
        {"label": "dog", "points": [[1, 1]], "shape_type": "point"},
    ]
    content = {"shapes": shapes, "imagePath": "..\\images\\a.png", "imageHeight": 20, "imageWidth": 40}
    # As Windows programs save it.
    (folder / "a.json").write_text(json.dumps(content), encoding="utf-8-sig")
    return folder


def via(folder):
    xs, ys = map(list, zip(*SQUARE))
    regions = [
        {"shape_attributes": {"name": "polygon", "all_points_x": xs, "all_points_y": ys},
         "region_attributes": {"class": "cat"}},
        {"shape_attributes": {"name": "rect", "x": 20, "y": 3, "width": 10, "height": 10},
         "region_attributes": {"class": {"cat": False, "dog": True}}},
        {"shape_attributes": {"name": "ellipse", "cx": 35, "cy": 10, "rx": 4, "ry": 2, "theta": 1.5708},
         "region_attributes": {"class": "dog"}},
    ]  # fmt: skip
    path = folder / "via.json"
    content = {"_via_settings": {}, "_via_img_metadata": {"a.png1": {"filename": "a.png", "regions": regions}}}
    path.write_text(json.dumps(content))
    return path


def yolo(folder):
    labels = folder / "labels"
    labels.mkdir()
    square = " ".join(f"{x / 40} {y / 20}" for x, y in SQUARE)
    (labels / "a.txt").write_text(f"0 {square}\n1 0.5 0.15 0.75 0.15 0.75 0.65 0.5 0.65\n\n")
    (labels / "b.txt").write_text("")
    (folder / "data.yaml").write_text("names: {0: cat, 1: dog}\n")
    return labels


@pytest.mark.parametrize("make", [labelme, via, yolo])
def test_polygons(make, tmp_path, images, capsys):
    source = make(tmp_path)
    assert to_coco.main([str(source), str(images), "--output", str(tmp_path / "out.json")]) == 0
    content = json.loads((tmp_path / "out.json").read_text())
    assert not check_content(content, for_evaluation=True).findings
    assert [image["file_name"] for image in content["images"]] == ["a.png", "b.png"]
    assert [category["name"] for category in content["categories"]] == ["cat", "dog"]
    cat, dog = content["annotations"][:2]
    assert (cat["category_id"], dog["category_id"]) == (1, 2) and cat["image_id"] == dog["image_id"] == 1
    assert cat["bbox"] == [2, 3, 10, 10] and cat["area"] == 100 and dog["bbox"][:2] == [20, 3]
    if make is labelme:
        assert len(content["annotations"]) == 2 and len(dog["segmentation"]) == 2  # a group is one object
        assert dog["bbox"] == pytest.approx([20, 3, 17, 10], abs=1)
    if make is via:
        assert content["annotations"][2]["bbox"] == pytest.approx([33, 6, 4, 8], abs=1)  # turned by 90 degrees
    assert "(cat 1, dog" in capsys.readouterr().out
    # The same file is not replaced, and other classes are refused.
    assert to_coco.main([str(source), str(images), "--output", str(tmp_path / "out.json")]) == 1
    assert to_coco.main([str(source), str(images), "--output", str(tmp_path / "x.json"), "--classes", "cat"]) == 1
    assert "already exists" in (error := capsys.readouterr().err) and "cat" in error
    assert "expected one of {0: 'cat'}" in error if make is yolo else "is not one of ['cat']" in error


def mask_file(folder, name, *squares):
    values = np.zeros((20, 40), np.uint8)
    for value, left in squares:
        values[3:13, left : left + 10] = value
    path = folder / "masks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return folder / "masks"


@pytest.mark.parametrize(
    ("files", "options", "expected"),
    [
        ({"a.png": [(1, 2), (2, 14)]}, [], [("object", 2, 100), ("object", 14, 100)]),
        ({"a.png": [(255, 2), (255, 14)]}, [], [("object", 2, 100), ("object", 14, 100)]),
        ({"a_0.png": [(1, 2)], "a_1.png": [(1, 8)]}, [], [("object", 2, 100), ("object", 8, 100)]),
        ({"a/masks/7.png": [(1, 2)]}, [], [("object", 2, 100)]),
        ({"a.png": [(1, 2), (1, 14), (2, 28)]}, ["--values", "classes"],
         [("class 1", 2, 100), ("class 1", 14, 100), ("class 2", 28, 100)]),
    ],
)  # fmt: skip
def test_masks(files, options, expected, tmp_path, images):
    for name, squares in files.items():
        source = mask_file(tmp_path, name, *squares)
    assert to_coco.main([str(source), str(images), "--output", str(tmp_path / "out.json"), *options]) == 0
    content = json.loads((tmp_path / "out.json").read_text())
    assert not check_content(content, for_evaluation=True).findings
    names = {category["id"]: category["name"] for category in content["categories"]}
    found = [(names[a["category_id"]], a["bbox"][0], a["area"]) for a in content["annotations"]]
    assert found == expected
    assert coco_mask.decode(content["annotations"][0]["segmentation"]).sum() == 100


def file_names_of_objects(path):
    content = json.loads(path.read_text())
    names = {image["id"]: image["file_name"] for image in content["images"]}
    return [names[annotation["image_id"]] for annotation in content["annotations"]]


@pytest.mark.parametrize(
    ("image_names", "masks", "expected"),
    [
        (["v1/0001.png", "v2/0001.png"], ["v1/0001.png", "v2/0001.png"], ["v1/0001.png", "v2/0001.png"]),
        (["v1/0001.png", "v2/0001.png"], ["v1/0001/3.png", "v2/0001_3.png"], ["v1/0001.png", "v2/0001.png"]),
        (["1.png", "2.png"], ["1/2.png"], ["1.png"]),  # mask 2 of image 1
        (["1/1.png", "1/2.png"], ["1/2.png"], ["1/2.png"]),
        (["1.png", "v/1.png"], ["1.png", "v/1.png"], ["1.png", "v/1.png"]),
    ],
)
def test_folders_decide_between_images_of_one_name(image_names, masks, expected, tmp_path):
    for name in image_names:
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 20)).save(tmp_path / "images" / name)
    for name in masks:
        source = mask_file(tmp_path, name, (1, 2))
    assert to_coco.main([str(source), str(tmp_path / "images"), "--output", str(tmp_path / "out.json")]) == 0
    assert file_names_of_objects(tmp_path / "out.json") == expected


def test_labelme_files_in_folders_of_equal_names(tmp_path):
    for folder in ("v1", "v2"):
        (tmp_path / "images" / folder).mkdir(parents=True)
        Image.new("RGB", (40, 20)).save(tmp_path / "images" / folder / "a.png")
        path = labelme(tmp_path / "images" / folder) / "a.json"
        path.write_text(path.read_text("utf-8-sig").replace("..\\\\images\\\\a.png", "../a.jpg"))
    assert to_coco.main([str(tmp_path / "images")] * 2 + ["--output", str(tmp_path / "out.json")]) == 0
    assert file_names_of_objects(tmp_path / "out.json") == ["v1/a.png"] * 2 + ["v2/a.png"] * 2


@pytest.mark.parametrize("other", ["a.jpg", "v/a.png"])
def test_an_annotation_that_fits_several_images_is_refused(other, tmp_path, images, capsys):
    (images / "v").mkdir()
    Image.new("RGB", (40, 20)).save(images / other)
    (images / "a.png").rename(images / "w.png" if other == "a.jpg" else images / "v" / "w.png")
    Image.new("RGB", (40, 20)).save(images / "a.png" if other == "a.jpg" else images / "a.bmp")
    source = mask_file(tmp_path, "train/a.png", (1, 2))
    assert to_coco.main([str(source), str(images), "--output", str(tmp_path / "out.json")]) == 1
    assert (error := capsys.readouterr().err).count("\n") == 1
    assert "a.png: the image 'train/a' may be" in error and str(images / other) in error


def test_masks_in_jpeg_are_black_and_white(tmp_path, images):
    (tmp_path / "masks").mkdir()
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[3:13, 2:12] = 255
    Image.fromarray(pixels).save(tmp_path / "masks" / "a.jpg", quality=30)  # values near 0 too
    arguments = [str(tmp_path / "masks"), str(images), "--output", str(tmp_path / "out.json"), "--values", "classes"]
    assert to_coco.main(arguments) == 0
    content = json.loads((tmp_path / "out.json").read_text())
    assert [(a["bbox"], a["area"]) for a in content["annotations"]] == [([2, 3, 10, 10], 100)]
    assert [category["name"] for category in content["categories"]] == ["class 1"]


def test_the_yaml_of_yolo(tmp_path, images, capsys):
    labels, output = yolo(tmp_path), ["--output", str(tmp_path / "out.json")]
    (tmp_path / "other.yaml").write_text("key: !Tag [")  # not read
    assert to_coco.main([str(labels), str(images), *output]) == 0
    (tmp_path / "out.json").unlink()
    for text, message in (("names: [", "not valid YAML"), ("- cat", "no class names"), ("", "no class names")):
        (tmp_path / "data.yaml").write_text(text)
        assert to_coco.main([str(labels), str(images), *output]) == 1
        error = capsys.readouterr().err
        assert message in error and "data.yaml" in error and error.count("\n") == 1, error
        assert to_coco.main([str(labels), str(images), *output, "--classes", "cat", "dog"]) == 0
        (tmp_path / "out.json").unlink()
        capsys.readouterr()
    (tmp_path / "mine.yaml").write_text("names: [x, y]")
    assert to_coco.main([str(tmp_path / "mine.yaml"), str(images), *output]) == 0
    assert "(x 1, y 1)" in capsys.readouterr().out


def test_the_limit_of_pixels(tmp_path, images, capsys):
    source, output = mask_file(tmp_path, "a.png", (1, 2)), ["--output", str(tmp_path / "out.json")]
    assert to_coco.main([str(source), str(images), *output, "--max-image-pixels", "799"]) == 1
    assert "INPUT.MAX_IMAGE_PIXELS is 799" in capsys.readouterr().err
    assert to_coco.main([str(source), str(images), *output, "--max-image-pixels", "800"]) == 0


def test_what_cannot_be_converted(tmp_path, images, capsys):
    output = ["--output", str(tmp_path / "out.json")]
    (tmp_path / "empty").mkdir()
    assert to_coco.main([str(tmp_path / "empty"), str(images), *output]) == 1
    assert "no labelme, VIA or YOLO" in capsys.readouterr().err
    labels = yolo(tmp_path)
    (labels / "a.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    assert to_coco.main([str(labels), str(images), *output]) == 1
    assert "expected a polygon (boxes: no masks)" in capsys.readouterr().err
    (labels / "a.txt").rename(labels / "c.txt")
    assert to_coco.main([str(labels), str(images), *output]) == 1
    assert "c.txt: " in (error := capsys.readouterr().err) and "has no image 'c'" in error
    path = via(tmp_path)
    path.write_text(path.read_text().replace("all_points_x", "points"))
    assert to_coco.main([str(path), str(images), *output]) == 1
    assert f"{path}: an annotation that cannot be read: KeyError('all_points_x')" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (labelme, "is a folder with labelme files.*to_coco .*labels IMAGES"),
        (lambda folder: labelme(folder) / "a.json", "is a labelme file.*to_coco FOLDER"),
        (via, "VGG Image Annotator .*to_coco THIS_FILE"),
        (yolo, "is a folder with YOLO labels.*to_coco .*labels IMAGES"),
        (lambda folder: yolo(folder) / "a.txt", "a.txt belongs to YOLO labels.*to_coco .*labels IMAGES"),
        (lambda folder: yolo(folder).parent / "data.yaml", "data.yaml belongs to YOLO labels"),
        (lambda folder: mask_file(folder, "a.png", (1, 2)), "is a folder with images .masks.*to_coco .*masks IMAGES"),
        (lambda folder: folder / "images" / "a.png", "a.png belongs to images"),
    ],
)
def test_other_formats_are_named_with_the_command(make, message, tmp_path, images, capsys):
    path = make(tmp_path)
    cfg = tiny_cfg("DATASETS.TRAIN_JSON", str(path), "DATASETS.TRAIN_IMAGES", str(images))
    with pytest.raises(ValueError, match=message) as error:
        register_user_datasets(cfg, ("TRAIN",))
    assert "\n" not in str(error.value) and "expected a COCO json" in str(error.value)
    assert check_dataset.main([str(path), str(images)]) in (1, 2)
    captured = capsys.readouterr()
    assert "sparseinst.tools.to_coco" in captured.out + captured.err


def test_images_with_a_coco_json_are_not_named_masks(images):
    (images / "train.json").write_text('{"images": [], "annotations": [], "categories": []}')
    assert "to_coco" not in (message := describe_path(images)) and "expected a COCO json" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"image_id": 1, "category_id": 1, "score": 0.5, "segmentation": {}}], "a list of COCO results"),
        ([{"data": {"image": "a"}, "annotations": []}], "Label Studio"),
        ({"images": [], "annotations": [{"segments_info": []}]}, "panoptic"),
        ({"type": "FeatureCollection", "features": []}, "GeoJSON"),
        ({"objects": [], "size": {}}, "Supervisely"),
    ],
)
def test_formats_that_other_tools_export(content, message):
    (finding,) = check_content(content).findings
    assert message in finding.message and finding.stops

"""Test the warnings about valid data that are probably wrong: each once, with counts and the first file."""

import argparse
import copy
import functools
import json
import logging
import re

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from PIL import Image
from pycocotools import mask as coco_mask

from sparseinst.data.coco_checks import check_content
from sparseinst.data.coco_json import log_data_warnings, register_user_datasets
from sparseinst.data.image_files import find_files, spellings
from sparseinst.tools import check_dataset, check_dataset_run
from tests.data.flawed_json import CONTENT, HEIGHT, WIDTH, annotation, write
from tests.tiny_model import tiny_cfg

# Boxes of objects of 20 x 10 pixels, as x, y, width, height.
BOXES = [(4, 22, 20, 10), (30, 5, 20, 10), (35, 25, 20, 10)]


@pytest.fixture(autouse=True)
def _heard(monkeypatch):
    """Propagate log messages to pytest; a command in another test may have turned it off."""
    monkeypatch.setattr(logging.getLogger("sparseinst"), "propagate", True)


def good():
    """Return three images with three objects each, of classes a and b."""
    content = {
        "images": copy.deepcopy(CONTENT["images"][:3]),
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        "annotations": [],
    }
    for number in range(9):
        x, y, width, height = BOXES[number % 3]
        entry = annotation(number + 1, 1 + number // 3, 1 + number % 2, x, y, width)
        entry["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]
        content["annotations"].append({**entry, "bbox": [x, y, width, height], "area": width * height})
    return content


def each(change):
    """Change all annotations."""
    return lambda content: [change(entry) for entry in content["annotations"]]


def as_rle(entry):
    (rle,) = coco_mask.frPyObjects(entry["segmentation"], HEIGHT, WIDTH)
    entry["segmentation"] = {**rle, "counts": rle["counts"].decode()}


def crowds_of_b(content):
    for entry in content["annotations"]:
        entry["iscrowd"] = int(entry["category_id"] == 2)
        if entry["iscrowd"]:
            as_rle(entry)


def crowds_of_image_2(content):
    for entry in content["annotations"][3:6]:
        entry["iscrowd"] = 1
        as_rle(entry)


def normalise(entry):
    (polygon,) = entry["segmentation"]
    entry["segmentation"] = [(np.array(polygon) / ([WIDTH, HEIGHT] * 4)).tolist()]


def same_backwards(content):
    first = content["annotations"][0]
    backwards = np.array(first["segmentation"][0]).reshape(-1, 2)[::-1].reshape(1, -1).tolist()
    content["annotations"].append({**first, "id": 77, "segmentation": backwards})


def set_boxes(convention):
    """Set all boxes to a function of x, y, width and height."""
    return each(lambda entry: entry.update(bbox=convention(*entry["bbox"])))


def corners(x, y, width, height):
    return [x, y, x + width, y + height]


def set_annotation(number, **values):
    return lambda content: content["annotations"][number - 1].update(values)


def repeat_annotation(number):
    return lambda content: content["annotations"].append({**content["annotations"][number - 1], "id": 77})


def add_category(**entry):
    return lambda content: content["categories"].append({"id": 3, **entry})


def add_image(**values):
    return lambda content: content["images"].append({**content["images"][0], "id": 9, **values})


def set_names(start):
    return lambda content: [image.update(file_name=start + image["file_name"]) for image in content["images"]]


def all_of(*changes):
    return lambda content: [change(content) for change in changes]


NOT_DRAWN = set_annotation(4, segmentation=[[5.1, 5.1, 30, 5.2, 30, 5.3]], bbox=[5, 5, 25, 1])
NEXT_TO_THE_IMAGE = set_annotation(4, segmentation=[[59.9, 5, 90, 5, 90, 20]], bbox=[60, 5, 30, 15])
IS_ROOT = all_of(add_category(name="pets"), lambda content: content["categories"][0].update(supercategory="pets"))

FINDINGS = {
    "crowds of a class": (crowds_of_b, r"in 1 of 2 categories \('b'\) all 4 annotations are crowds.*annotation 2 \('1"),
    "crowds of an image": (crowds_of_image_2, r"in 1 of 3 images with objects \('2.png'\) all 3 .*annotation 4 \('2"),
    "some are normalised": (lambda content: normalise(content["annotations"][4]), "1 of 9 objects .*look normalised"),
    "no pixel": (NOT_DRAWN, r"1 of 9 objects have no pixel in the image's size.*annotation 4 \('2.png'\)"),
    "almost outside": (NEXT_TO_THE_IMAGE, "1 of 9 objects have no pixel"),
    "corners": (set_boxes(corners), "disagrees .*: .*look like the corners .x0, y0, x1, y1"),
    "swapped": (set_boxes(lambda x, y, w, h: [y, x, h, w]), "9 of 9 objects have a bbox .* look like x and y swapped"),
    "from below": (set_boxes(lambda x, y, w, h: [x, HEIGHT - y - h, w, h]), "objects have a bbox .* like y from below"),
    "centers": (set_boxes(lambda x, y, w, h: [x + w / 2, y + h / 2, w, h]), "bbox .* like the center .x, y, width"),
    "fractions": (
        set_boxes(lambda x, y, w, h: [x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT]),
        "bbox .* like fractions of the image's size",
    ),
    "one other box": (set_annotation(9, bbox=[0, 0, 5, 5]), r"1 of 9 .* \[0.0, 0.0, 5.0, 5.0\], expected"),
    "boxes of RLE": (all_of(each(as_rle), set_boxes(corners)), "objects have a bbox .* look like the corners"),
    "twice": (repeat_annotation(5), r"1 of 10 objects are the same mask .*annotation 77 \('2.png'\)"),
    "twice, backwards": (same_backwards, r"1 of 10 objects are the same mask .*annotation 77 \('1.png'\)"),
    "twice as RLE": (all_of(repeat_annotation(1), each(as_rle)), "1 of 10 objects are the same mask"),
    "area 0": (each(lambda entry: entry.update(area=0)), r"9 of 9 objects have 'area' 0.*annotation 1 \('1.png'\)"),
    "a name twice": (
        lambda content: content["categories"][1].update(name=" A"),
        r"1 category names are used twice.*'a' \(id 1\), ' A' \(id 2\)",
    ),
    "no annotations": (add_category(name="c"), r"1 of 3 categories are without annotations: 'c' \(id 3\)"),
    "a root": (IS_ROOT, r"'pets' \(id 3\); 'pets' is only the supercategory of others, as Roboflow"),
    "an image twice": (add_image(), "1 files are listed twice .*'1.png' is named by 2 images"),
    "an image by two spellings": (add_image(file_name="./1.png"), "'1.png' is named by 2 images, also as './1.png'"),
    "backslashes": (set_names("..\\images\\"), "3 of 3 images .*of another form.*1.png' is read as '../images/1.png'"),
    "a path of Windows": (set_names("C:\\data\\a b\\"), "3 of 3 images .*of another form.*is read as '1.png'"),
    "encoded": (lambda content: content["images"][1].update(file_name="%32%2Epng"), "'%32%2Epng' is read as '2.png'"),
    "missing": (
        add_image(file_name="absent.png"),
        "1 of 4 images are missing: .* has no file 'absent.png', and are skipped; more than 10 .DATALOADER.MAX_BROKEN",
    ),
}


@functools.cache
def default_cfg():
    return tiny_cfg()


def user_cfg(json_file, images, split, limit=10):
    cfg = default_cfg().clone()
    cfg.DATASETS[f"{split}_JSON"], cfg.DATASETS[f"{split}_IMAGES"] = str(json_file), str(images)
    cfg.DATALOADER.MAX_BROKEN_IMAGES = limit
    return cfg


def warnings_of(json_file, images, caplog, split="TRAIN"):
    cfg = user_cfg(json_file, images, split)
    register_user_datasets(cfg, (split,))
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="sparseinst"):
        log_data_warnings(cfg, (split,))
    assert len(DatasetCatalog.get(cfg.DATASETS[split][0])) >= 3
    return [record.getMessage() for record in caplog.records]


def warnings_of_checker(json_file, images):
    """Return what check_dataset finds without reading an image."""
    content = json.loads(json_file.read_text())
    files = find_files([image["file_name"] for image in content["images"]], images)
    args = argparse.Namespace(images=images, evaluation=False, config_file="")
    report = check_content(content, args.evaluation)
    findings = [*check_dataset_run.check_files(content, report, files, default_cfg(), args)]
    findings += check_dataset_run.broken_images([], files.absent, default_cfg())
    return [finding.message for finding in findings if finding.kind != "number of classes"]


def test_good_data_have_no_warning(tmp_path, caplog):
    for name, change in (("polygons", lambda entry: None), ("rle", as_rle)):
        content = good()
        each(change)(content)
        files = write(tmp_path / name, content)
        for split in ("TRAIN", "TEST"):
            assert warnings_of(*files, caplog, split) == []


@pytest.mark.parametrize("name", FINDINGS)
def test_each_finding_is_one_warning_of_training_and_checker(name, tmp_path, caplog):
    change, message = FINDINGS[name]
    content = good()
    change(content)
    files = write(tmp_path, content)
    (warning,) = warnings_of(*files, caplog)
    assert re.search(message, warning), warning
    of_checker = warnings_of_checker(*files)
    if name == "missing":
        assert of_checker[0] == "the file 'absent.png' does not exist" and of_checker[1].startswith(
            "1 of 1; a training skips"
        )
    else:
        assert len(of_checker) == 1 and of_checker[0] in warning


def test_where_all_objects_are_normalised_it_stops(tmp_path, capsys):
    content = good()
    each(normalise)(content)
    files = write(tmp_path, content)
    for split in ("TRAIN", "TEST"):
        cfg = tiny_cfg(f"DATASETS.{split}_JSON", str(files[0]), f"DATASETS.{split}_IMAGES", str(files[1]))
        with pytest.raises(
            ValueError, match="9 of 9 objects have polygon coordinates from 0 to 1, which look normalised"
        ):
            register_user_datasets(cfg, (split,))
    assert check_dataset.main([*map(str, files), "--quick"]) == 1


def test_images_without_size_are_not_missing_images():
    content = good()
    for image in content["images"]:
        del image["height"], image["width"]
    assert {finding.kind for finding in check_content(content).findings} == {"missing key"}


def test_missing_files_above_the_limit_stop(tmp_path):
    content = good()
    content["images"].append({**content["images"][0], "id": 9, "file_name": "absent.png"})
    json_file, images = write(tmp_path, content)
    with pytest.raises(
        ValueError, match="1 of 4 images are missing: .* no file 'absent.png', and DATALOADER.MAX_BROKEN"
    ):
        register_user_datasets(user_cfg(json_file, images, "TRAIN", limit=0), ("TRAIN",))
    for path in images.iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="4 of 4 images are missing"):
        register_user_datasets(user_cfg(json_file, images, "TRAIN"), ("TRAIN",))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_a_byte_order_mark_is_read(encoding, tmp_path, caplog):
    json_file, images = write(tmp_path, good())
    json_file.write_text(json.dumps(good()), encoding=encoding)
    assert warnings_of(json_file, images, caplog) == []


def test_names_without_folders_are_used_where_they_are_unique(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    assert find_files(["x/1.png"], tmp_path).found == {"x/1.png": "1.png"}
    assert find_files(["x/1.png", "y/1.png"], tmp_path) == ({}, ["x/1.png", "y/1.png"])
    assert find_files(["1.png", "2.png", ""], tmp_path) == ({}, ["2.png", ""])
    assert "a b.png" in spellings("/data/local-files/?d=x/a%20b.png")


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 6, 8])
def test_images_that_exif_turns_without_changing_their_size(orientation, tmp_path, caplog, capsys):
    content = good()
    json_file, images = write(tmp_path, content)
    exif = Image.Exif()
    exif[274] = orientation
    Image.open(images / "2.png").save(images / "2.png", exif=exif)
    if orientation >= 5:
        # The annotation tool has turned this image, so it knows EXIF.
        content["images"][1].update(height=WIDTH, width=HEIGHT)
        json_file.write_text(json.dumps(content))
    found = [line for line in warnings_of(json_file, images, caplog) if "EXIF" in line]
    assert len(found) == (orientation in (2, 3, 4))
    assert all("1 of 3 images" in line and "'2.png'" in line for line in found)
    check_dataset.main([str(json_file), str(images), "--quick"])
    assert ("turned by EXIF: 1" in capsys.readouterr().out) == bool(found)


def test_images_of_16_bits_that_use_few_levels(tmp_path, caplog, capsys):
    json_file, images = write(tmp_path, good())
    values = np.linspace(0, 65535, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint16)
    for number, bits in ((1, 16), (2, 16), (3, 12)):
        Image.fromarray(values >> (16 - bits)).save(images / f"{number}.png")
    (warning,) = warnings_of(json_file, images, caplog)
    assert "1 of 3 images of 16 bits that were looked at use few levels (the first: '3.png', 16 of 256" in warning
    assert check_dataset.main([str(json_file), str(images)]) == 0
    assert "16-bit images with few levels: 1" in capsys.readouterr().out


def test_huge_numbers_and_other_types_are_no_crash():
    content = good()
    content["images"][0].update(id=10**400, height=10**400)
    content["annotations"][0].update(image_id=10**400, area=10**400, bbox=["x", None, 1, 2])
    content["annotations"][1].update(bbox=[10**400, 1, 1, 1])
    content["annotations"][2].update(bbox=None)
    content["annotations"][3].update(bbox=[1, 2])
    check_content(content)

"""Lists of images, the header of a run, and the line of one image."""

import json
import os

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image
from pycocotools import mask as mask_api

from sparseinst.data.coco_json import ClassInfo
from sparseinst.inference.prediction_lines import error_line, header, header_differences, list_images, prediction_line
from sparseinst.structures.rle_masks import RLEMasks
from tests.red_segmenter import red_segmenter_config

CLASSES = ClassInfo(["red", "blue"], [3, 8])


@pytest.fixture
def cfg(tmp_path):
    (tmp_path / "model.pth").write_bytes(b"abc")
    cfg = red_segmenter_config()
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    return cfg


def test_a_list_names_files_that_need_not_exist(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"b.jpg\r\n\n/x/a b.jpg \ncaf\xe9.png\nb.jpg\n")
    names = list_images([str(tmp_path / "list.txt")])
    assert names == ["b.jpg", "/x/a b.jpg ", os.fsdecode(b"caf\xe9.png")]
    line = json.loads(error_line(names[2], ValueError("no\n such file")))
    assert os.fsencode(line["file_name"]) == b"caf\xe9.png" and line["error"] == "no such file"


def test_a_list_with_a_mark_and_unusual_characters(tmp_path):
    names = ["a.png", "line\u2028b.png", "next\x85c.png", "form\x0cd.png", "tab\x1ce.png"]
    (tmp_path / "list.txt").write_text("\n".join(names), encoding="utf-8-sig")
    assert list_images([str(tmp_path / "list.txt")]) == names


def test_folders_patterns_and_lists_together(tmp_path):
    for name in ("b.png", "a.png"):
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    (tmp_path / "list.txt").write_text(f"{tmp_path}/a.png\nother.png\n")
    found = list_images([str(tmp_path), str(tmp_path / "list.txt"), str(tmp_path / "*.png")])
    assert found == [str(tmp_path / "a.png"), str(tmp_path / "b.png"), "other.png"]


@pytest.mark.parametrize(("content", "message"), [(None, "No such file"), (b" \n", "is empty; expected one image")])
def test_a_list_that_is_missing_or_empty(tmp_path, content, message):
    if content is not None:
        (tmp_path / "list.txt").write_bytes(content)
    for arguments, flag in (((), "--input"), (("--calibration",), "--calibration")):
        with pytest.raises(ValueError, match=f"^{flag}: the list .*list.txt .*{message}"):
            list_images([str(tmp_path / "list.txt")], *arguments)


def test_messages_name_the_flag(tmp_path, caplog):
    with pytest.raises(ValueError, match="^--test-images: The folder .* matches no image"):
        list_images([str(tmp_path)], "--test-images")
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    (tmp_path / "b.heic").write_bytes(b"")
    with caplog.at_level("WARNING", "sparseinst"):
        list_images([str(tmp_path)], "--test-images")
    assert caplog.messages[0].startswith(f"--test-images {tmp_path}: 1 files of formats")


def test_the_header_identifies_images_weights_classes_and_config(cfg):
    expected = header(cfg, ["a", "b"], CLASSES)
    assert json.loads(json.dumps(expected)) == expected
    assert expected["images"]["count"] == 2
    # sha256sum of a file that holds abc.
    assert expected["weights"]["sha256"].startswith("ba7816bf8f01cfea414140de5dae2223")
    assert expected["categories"] == [{"id": 3, "name": "red"}, {"id": 8, "name": "blue"}]

    def changed(*opts, names=("a", "b"), classes=CLASSES):
        other = cfg.clone()
        other.merge_from_list(list(opts))
        return [text.split(" ")[0] for text in header_differences(expected, header(other, names, classes))]

    assert changed() == []
    assert changed(names=["a", "c"]) == ["images.sha256"]
    assert changed(names=["b", "a"]) == ["images.sha256"]
    assert changed(names=["a"]) == ["images.count", "images.sha256"]
    assert changed(classes=ClassInfo(["red", "green"], [3, 8])) == ["categories"]
    assert changed("INPUT.MIN_SIZE_TEST", 70) == ["config.INPUT.MIN_SIZE_TEST"]
    assert changed("MODEL.OUTPUT.SCORE_THRESHOLD", 0.2) == ["config.MODEL.OUTPUT.SCORE_THRESHOLD"]
    assert changed("MODEL.DEVICE", "cuda", "OUTPUT_DIR", "x", "SOLVER.MAX_ITER", 5, "DATASETS.TEST", ("x",)) == []


def test_long_values_are_compared_to_their_end(cfg):
    """The header of COCO's 80 categories starts alike in both runs."""
    names = [f"class {index}" for index in range(80)]
    headers = [header(cfg, ["a"], ClassInfo([*names[:-1], last], list(range(80)))) for last in ("cat", "dog")]
    (text,) = header_differences(*headers)
    assert text.startswith("categories is ") and "'cat'" in text and "'dog'" in text and len(text) < 200


def test_weights_are_known_by_their_content(cfg, tmp_path):
    expected = header(cfg, ["a"], CLASSES)
    (tmp_path / "moved.pth").write_bytes(b"abc")
    cfg.MODEL.WEIGHTS = str(tmp_path / "moved.pth")
    assert not header_differences(expected, header(cfg, ["a"], CLASSES))
    (tmp_path / "moved.pth").write_bytes(b"abd")
    assert [text.split(" ")[0] for text in header_differences(expected, header(cfg, ["a"], CLASSES))] == [
        "weights.sha256"
    ]
    cfg.MODEL.WEIGHTS = ""
    with pytest.raises(ValueError, match="MODEL.WEIGHTS is empty"):
        header(cfg, ["a"], CLASSES)


def test_the_line_of_an_image():
    mask = np.zeros((4, 5), bool)
    mask[1:3, 2:5] = True
    rle = mask_api.encode(np.asfortranarray(mask, np.uint8))
    instances = Instances(
        (4, 5), pred_boxes=Boxes(torch.tensor([[2.0, 1.0, 5.0, 3.0]])), pred_masks=RLEMasks([rle], (4, 5)),
        scores=torch.tensor([0.5]), pred_classes=torch.tensor([1]),
    )  # fmt: skip
    line = json.loads(prediction_line("a b.jpg", instances, CLASSES.category_ids))
    (detection,) = line.pop("detections")
    assert line == {"file_name": "a b.jpg", "height": 4, "width": 5}
    assert np.array_equal(mask_api.decode(detection.pop("segmentation")), mask)
    assert detection == {"category_id": 8, "bbox": [2.0, 1.0, 3.0, 2.0], "score": 0.5}
    assert json.loads(prediction_line("a", instances[:0], [3, 8]))["detections"] == []

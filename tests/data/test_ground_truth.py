"""Test finding ground truth by an image's file name."""

import json

import numpy as np
import pytest
from PIL import Image

from sparseinst.data.ground_truth import GroundTruth
from sparseinst.data.images import DataError


@pytest.fixture
def json_file(tmp_path):
    """Write two images of one name in two folders; category ids have a gap and are not in order."""
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / folder / "a.png")

    def annotation(id, image_id, category_id, x, y, iscrowd=0):
        outline = [x, y, x + 10, y, x + 10, y + 5, x, y + 5]
        segmentation = {"size": [20, 30], "counts": [0, 600]} if iscrowd else [outline]
        return {"id": id, "image_id": image_id, "category_id": category_id, "bbox": [x, y, 10, 5], "area": 50,
                "iscrowd": iscrowd, "segmentation": segmentation}  # fmt: skip

    images = [(1, "one/a.png"), (2, "two/a.png")]
    content = {
        "images": [{"id": id, "file_name": name, "height": 20, "width": 30} for id, name in images],
        "categories": [{"id": 9, "name": "bolt"}, {"id": 3, "name": "nut"}],
        "annotations": [annotation(1, 1, 9, 0, 0), annotation(2, 2, 3, 5, 10), annotation(3, 2, 9, 15, 2),
                        annotation(4, 2, 9, 0, 0, iscrowd=1)],
    }  # fmt: skip
    (tmp_path / "truth.json").write_text(json.dumps(content))
    return tmp_path / "truth.json"


def test_finds_an_images_own_instances_with_their_classes(json_file):
    truth = GroundTruth(json_file)
    one, two = (truth.find(json_file.parent / folder / "a.png") for folder in ("one", "two"))
    # By category id: nut, bolt.
    assert one.pred_classes.tolist() == [1] and one.pred_boxes.tensor.tolist() == [[0, 0, 10, 5]]
    assert two.pred_classes.tolist() == [0, 1]  # without the crowd
    assert two.pred_boxes.tensor.tolist() == [[5, 10, 15, 15], [15, 2, 25, 7]]
    assert two.image_size == (20, 30) and two.pred_masks.flatten(1).sum(1).tolist() == [50, 50]
    assert two.pred_masks[0, 10:15, 5:15].all() and not two.has("scores")


def test_classes_are_those_of_the_model_by_name(json_file):
    truth = GroundTruth(json_file, class_names=["bolt", "nut"])
    one, two = (truth.find(json_file.parent / folder / "a.png") for folder in ("one", "two"))
    assert one.pred_classes.tolist() == [0] and two.pred_classes.tolist() == [1, 0]
    for names in (["nut"], ["nut", "screw"], ["nut", "bolt", "screw"]):
        with pytest.raises(ValueError, match=r"'.*truth\.json' has the 2 classes \[nut, bolt\]"):
            GroundTruth(json_file, class_names=names)


def test_an_image_that_the_json_does_not_have(json_file):
    truth = GroundTruth(json_file)
    assert truth.find(json_file.parent / "three" / "a.png") is None
    assert truth.find(json_file.parent / "one" / "b.png") is None


@pytest.mark.parametrize("name", ["..\\two\\a.png", "two%2Fa.png", "two/%61.png"])
def test_names_of_windows_and_urls(name, json_file):
    json_file.write_text(json_file.read_text().replace("two/a.png", json.dumps(name)[1:-1]))
    truth = GroundTruth(json_file)
    assert len(truth.find(json_file.parent / "two" / "a.png").pred_classes) == 2
    assert len(truth.find(json_file.parent / "one" / "a.png").pred_classes) == 1


def test_broken_data_are_named(json_file):
    folder = json_file.parent
    truth = GroundTruth(json_file)
    Image.fromarray(np.zeros((30, 20, 3), np.uint8)).save(folder / "one" / "a.png")
    with pytest.raises(DataError, match=r"one/a.png has 30 x 20 pixels .*made for 20 x 30.*EXIF"):
        truth.find(folder / "one" / "a.png")
    (folder / "two" / "a.png").write_text("no image")
    with pytest.raises(DataError, match="two/a.png: it is not an image"):
        truth.find(folder / "two" / "a.png")
    content = json.loads(json_file.read_text())
    content["annotations"][2]["segmentation"][0][3] = float("inf")
    json_file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"truth.json: .*annotation 3 \('two/a.png'\) is broken: .*coordinate inf"):
        GroundTruth(json_file)

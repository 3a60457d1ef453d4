"""Test the command that selects classes of a COCO json."""

import json

import pytest

from sparseinst.tools import select_classes
from tests.shapes_data import write_shapes


@pytest.fixture
def shapes(tmp_path):
    return write_shapes(tmp_path / "shapes", 6)[0]


def test_keeps_the_classes_all_images_and_the_ids(shapes, tmp_path, capsys):
    output = tmp_path / "new" / "two.json"
    assert select_classes.main([shapes, "bar", "triangle", "--output", str(output)]) == 0
    with open(shapes) as file:
        before = json.load(file)
    after = json.loads(output.read_text())
    assert after["images"] == before["images"]
    assert [(c["id"], c["name"]) for c in after["categories"]] == [(2, "triangle"), (4, "bar")]
    expected = [a for a in before["annotations"] if a["category_id"] in (2, 4)]
    assert after["annotations"] == expected and 0 < len(expected) < len(before["annotations"])
    with_objects = len({a["image_id"] for a in expected})
    assert f"{len(expected)} objects of bar, triangle in {with_objects} of 6 images" in capsys.readouterr().out


def test_refusals_are_one_line_and_write_nothing(shapes, tmp_path, capsys):
    output = tmp_path / "out.json"
    assert select_classes.main([shapes, "dog", "--output", str(output)]) == 1
    assert "'dog'" in (message := capsys.readouterr().err) and "triangle" in message and not output.exists()
    assert select_classes.main([str(tmp_path / "none.json"), "bar", "--output", str(output)]) == 1
    assert "none.json" in capsys.readouterr().err and not output.exists()
    assert select_classes.main([shapes, "bar", "--output", shapes]) == 1
    assert "--output" in capsys.readouterr().err

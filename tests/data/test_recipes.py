import json

import pytest

from sparseinst.config import get_config_file
from sparseinst.data.recipes import MOST_ORDINARY, RECIPES, choose_recipe


def write(path, counts, crowds=0):
    annotations = [{"image_id": image} for image, count in enumerate(counts) for _ in range(count)]
    annotations += [{"image_id": 0, "iscrowd": 1}] * crowds
    path.write_text(json.dumps({"images": [], "annotations": annotations}))
    return str(path)


@pytest.mark.parametrize("name", RECIPES)
def test_a_named_recipe_does_not_read_the_data(name):
    config, reason = choose_recipe(name, "missing.json")
    assert config == RECIPES[name] and get_config_file(config) and name in reason


@pytest.mark.parametrize(
    "counts, expected",
    [
        ([3, 5, 8], "ordinary"),
        ([MOST_ORDINARY] * 20, "ordinary"),
        # One crowded image of 40 does not make a crowded data set; every tenth does.
        ([4] * 39 + [200], "ordinary"),
        ([4] * 9 + [200], "crowded"),
        ([300, 250, 100], "crowded"),
        ([], "ordinary"),
    ],
)
def test_auto_looks_at_the_objects_of_an_image(tmp_path, counts, expected):
    config, reason = choose_recipe("auto", write(tmp_path / "train.json", counts))
    assert config == RECIPES[expected] and expected in reason and config in reason


def test_the_line_for_the_log_holds(tmp_path):
    """Between 30 and 31 objects 30.4 would be printed as 30, which is not above 30."""
    counts = [MOST_ORDINARY] * 95 + [MOST_ORDINARY + 1] * 5
    reason = choose_recipe("auto", write(tmp_path / "train.json", counts))[1]
    assert "at most 31 (crowded: above 30)" in reason


def test_crowd_regions_do_not_count(tmp_path):
    assert choose_recipe("auto", write(tmp_path / "train.json", [5], crowds=500))[0] == RECIPES["ordinary"]


def test_wrong_names_and_files(tmp_path):
    with pytest.raises(ValueError, match="--recipe is 'x'; it must be one of auto, ordinary, crowded"):
        choose_recipe("x", "")
    with pytest.raises(ValueError, match="--recipe and --config-file are both given"):
        choose_recipe("ordinary", "", "mine.yaml")
    with pytest.raises(ValueError, match="give --train-json, or one of"):
        choose_recipe("auto", "")
    with pytest.raises(ValueError, match="The file .* does not exist"):
        choose_recipe("auto", str(tmp_path / "missing.json"))
    (tmp_path / "via.json").write_text(json.dumps({"a.jpg10": {"filename": "a.jpg", "regions": [], "size": 10}}))
    with pytest.raises(ValueError, match="VGG Image Annotator .*to-coco|VGG Image Annotator .*to_coco"):
        choose_recipe("auto", str(tmp_path / "via.json"))
    with pytest.raises(ValueError, match="is a folder"):
        choose_recipe("auto", str(tmp_path))
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match="not a COCO json"):
        choose_recipe("auto", str(tmp_path / "list.json"))

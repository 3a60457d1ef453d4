"""Test that training, evaluation and checker report each flaw of a json with the same message."""

import json
import logging
import re
from functools import partial

import pytest
from detectron2.data import DatasetCatalog

from sparseinst.data.coco_json import check_num_classes, log_data_warnings, register_user_datasets
from sparseinst.data.dataset_mapper import SparseInstDatasetMapper
from sparseinst.modeling.sparse_inst.target_check import is_on_grid
from sparseinst.tools import check_dataset
from tests.data.flawed_json import CONTENT, FLAWS, annotation, flawed, write
from tests.tiny_model import tiny_cfg


@pytest.fixture(autouse=True)
def _no_backbone(monkeypatch):
    """Skip building a backbone, which takes most of the checker's time."""
    on_grid = partial(is_on_grid, pixels_per_cell=4.0)
    monkeypatch.setattr("sparseinst.modeling.sparse_inst.model.target_check", lambda cfg: on_grid)


@pytest.fixture(autouse=True)
def _heard(monkeypatch):
    """Propagate log messages to pytest; a command in another test may have turned it off."""
    monkeypatch.setattr(logging.getLogger("sparseinst"), "propagate", True)


def user_cfg(json_file, images, split, *opts):
    return tiny_cfg(f"DATASETS.{split}_JSON", str(json_file), f"DATASETS.{split}_IMAGES", str(images), *opts)


def start(cfg, split):
    """Start as train_net.py does, then map each image once, as the loader does."""
    register_user_datasets(cfg, (split,))
    check_num_classes(cfg, (split,))
    mapper = SparseInstDatasetMapper(cfg, is_train=split == "TRAIN")
    return [mapper(image) for image in DatasetCatalog.get(cfg.DATASETS[split][0])]


@pytest.mark.parametrize("split", ["TRAIN", "TEST"])
@pytest.mark.parametrize("name", FLAWS)
def test_each_flaw_works_or_stops_and_the_checker_agrees(name, split, tmp_path, capsys):
    json_file, images = write(tmp_path, flawed(name))
    cfg = user_cfg(json_file, images, split)
    message = FLAWS[name].training if split == "TRAIN" else FLAWS[name].evaluation
    if message is None:
        mapped = start(cfg, split)
        assert len(mapped) == 4
    else:
        with pytest.raises(ValueError, match=message) as error:
            start(cfg, split)
        assert "\n" not in str(error.value)
        assert "data.json" in str(error.value) or "2.png" in str(error.value) or "NUM_CLASSES" in str(error.value)

    (tmp_path / "tiny.yaml").write_text(tiny_cfg("DATALOADER.MAX_BROKEN_IMAGES", 0).dump())
    arguments = [str(json_file), str(images), "--config-file", str(tmp_path / "tiny.yaml")]
    code = check_dataset.main([*arguments, *(["--evaluation"] if split == "TEST" else [])])
    output = capsys.readouterr().out
    assert code == (message is not None), output
    if message is not None:
        assert re.search(message, output), output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(CONTENT)[:700], "is not valid JSON"),
        (json.dumps(CONTENT["annotations"]), "holds list; expected COCO's object"),
        ("", "is not valid JSON"),
        ("7", "holds int"),
        ("null", "holds NoneType"),
        ("[" * 200_000, "is not a COCO json: its lists are nested too deep|is not valid JSON"),
        ('{"images": "abc", "categories": "abc"}', "'images' is a str"),
    ],
)
@pytest.mark.parametrize("split", ["TRAIN", "TEST"])
def test_files_that_are_no_coco_json(text, message, split, tmp_path, capsys):
    json_file, images = write(tmp_path, text)
    with pytest.raises(ValueError, match=message):
        register_user_datasets(user_cfg(json_file, images, split), (split,))
    assert check_dataset.main([str(json_file), str(images)]) == 1
    assert re.search(message, capsys.readouterr().out)


def test_several_problems_are_told_at_once_in_one_line(tmp_path):
    content = flawed("NaN")
    for index in (0, 2, 3):
        content["annotations"][index]["category_id"] = 5
    json_file, images = write(tmp_path, content)
    with pytest.raises(ValueError) as error:
        register_user_datasets(user_cfg(json_file, images, "TRAIN"), ("TRAIN",))
    assert re.search(
        "annotation 1 .*; .*annotation 2 .*coordinate nan.*; .*annotation 3 .*and 1 more problems.*check_dataset",
        str(error.value),
    )


def warnings_of(cfg, split, caplog):
    register_user_datasets(cfg, (split,))
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="sparseinst"):
        log_data_warnings(cfg, (split,))
    # 3.png has a crowd only.
    return [record.getMessage() for record in caplog.records if "all 1 annotations are crowds" not in record.message]


def test_what_is_left_out_is_one_warning(tmp_path, caplog):
    content = flawed("outside")
    content["annotations"][0]["segmentation"] = [[1, 1, 2, 2]]
    content["annotations"].append({**content["annotations"][0], "id": 9})
    json_file, images = write(tmp_path, content)
    cfg = user_cfg(json_file, images, "TRAIN")
    (warning,) = warnings_of(cfg, "TRAIN", caplog)
    assert "2 with polygons of fewer than three points (the first: annotation 1 ('1.png'))" in warning
    assert "1 with outside of the image (the first: annotation 2 ('1.png'))" in warning
    assert "left out" in warning and str(json_file) in warning
    mapper = SparseInstDatasetMapper(cfg, is_train=True)
    dicts = DatasetCatalog.get(cfg.DATASETS.TRAIN[0])
    assert [len(mapper(image)["instances"]) for image in dicts] == [0, 1, 0, 0]


def test_more_objects_than_masks_is_one_warning_that_says_how_many_would_do(tmp_path, caplog):
    content = flawed("none")
    for number in range(8):
        content["annotations"].append(annotation(100 + number, 1, 90, number, number, 20))
    json_file, images = write(tmp_path, content)
    for split in ("TRAIN", "TEST"):
        cfg = user_cfg(json_file, images, split)  # NUM_MASKS 6
        (warning,) = warnings_of(cfg, split, caplog)
        key = "MODEL.SPARSE_INST.DECODER.NUM_MASKS"
        assert f"1 of 2 images with objects have more of them than {key}, which is 6" in warning
        assert f"{key} 10 and MODEL.SPARSE_INST.MAX_DETECTIONS 100 would hold all" in warning
        assert f"DATASETS.{split}" in warning
    cfg = user_cfg(json_file, images, "TRAIN", "MODEL.SPARSE_INST.DECODER.NUM_MASKS", 10)
    assert warnings_of(cfg, "TRAIN", caplog) == []


def test_paths_with_spaces_and_other_letters(tmp_path):
    json_file, images = write(tmp_path / "meine Daten (ü, 写真)")
    cfg = user_cfg(json_file, images, "TRAIN")
    assert len(start(cfg, "TRAIN")) == 4
    (images / "2.png").rename(images / "Straße 2.png")
    content = flawed("none")
    content["images"][1]["file_name"] = "Straße 2.png"
    json_file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    assert [image["file_name"].endswith("Straße 2.png") for image in start(cfg, "TRAIN")][1]

"""Registration of a user's COCO json: what is refused and how, class ids with gaps, and a perfect evaluation."""

import copy
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_train_loader
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Instances
from PIL import Image

from sparseinst import add_sparse_inst_config
from sparseinst.data.coco_json import (
    ClassInfo,
    check_num_classes,
    class_info,
    register_coco_json,
    register_user_datasets,
)
from sparseinst.data.dataset_mapper import SparseInstDatasetMapper

SIZE = 64


def _annotation(annotation_id: int, image_id: int, category_id: int, x: int, y: int, side: int) -> dict:
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [x, y, side, side],
        "area": side * side,
        "iscrowd": 0,
        "segmentation": [[x, y, x + side, y, x + side, y + side, x, y + side]],
    }


# Category ids with gaps, not in order; one crowd; one image without annotations.
CONTENT = {
    "images": [
        {"id": image_id, "file_name": f"{image_id}.png", "height": SIZE, "width": SIZE} for image_id in (11, 12, 13)
    ],
    "categories": [{"id": 90, "name": "disc"}, {"id": 3, "name": "cross"}, {"id": 17, "name": "bar"}],
    "annotations": [
        _annotation(1, 11, 90, 5, 6, 20),
        _annotation(2, 11, 3, 30, 8, 25),
        _annotation(3, 12, 17, 2, 2, 40),
        _annotation(4, 12, 90, 50, 50, 10),
        {
            **_annotation(5, 12, 3, 0, 0, 0),
            "iscrowd": 1,
            "segmentation": {"size": [SIZE, SIZE], "counts": [60 * 64, 256]},
            "area": 256,
            "bbox": [60, 0, 4, 64],
        },
    ],
}


@pytest.fixture(autouse=True)
def _clean_catalogs() -> Iterator[None]:
    """Data sets and metadata that a test registered are gone after it."""
    before = {id(catalog): set(catalog) for catalog in (DatasetCatalog, MetadataCatalog)}
    yield
    for catalog in (DatasetCatalog, MetadataCatalog):
        for name in set(catalog) - before[id(catalog)]:
            catalog.remove(name)


@pytest.fixture
def image_root(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for image in CONTENT["images"]:
        Image.fromarray(np.full((SIZE, SIZE, 3), image["id"], dtype=np.uint8)).save(folder / image["file_name"])
    return folder


@pytest.fixture
def json_file(tmp_path: Path) -> Path:
    path = tmp_path / "my data (v1).json"
    path.write_text(json.dumps(CONTENT))
    return path


@pytest.fixture
def cfg() -> CfgNode:
    cfg = get_cfg()
    add_sparse_inst_config(cfg)
    cfg.MODEL.SPARSE_INST.DECODER.NUM_CLASSES = 3
    return cfg


def test_metadata_is_there_at_once(json_file: Path, image_root: Path) -> None:
    register_coco_json("test_gaps", json_file, image_root)
    metadata = MetadataCatalog.get("test_gaps")
    assert metadata.thing_classes == ["cross", "bar", "disc"]
    assert metadata.thing_dataset_id_to_contiguous_id == {3: 0, 17: 1, 90: 2}
    assert metadata.evaluator_type == "coco"
    assert (metadata.json_file, metadata.image_root) == (str(json_file), str(image_root))
    dicts = DatasetCatalog.get("test_gaps")
    assert [len(dataset_dict["annotations"]) for dataset_dict in dicts] == [2, 3, 0]
    assert [annotation["category_id"] for annotation in dicts[0]["annotations"]] == [2, 0]
    assert class_info("test_gaps") == ClassInfo(["cross", "bar", "disc"], [3, 17, 90])


def test_registering_again_reads_the_file_again(json_file: Path, image_root: Path) -> None:
    register_coco_json("test_again", json_file, image_root)
    register_coco_json("test_again", json_file, image_root)
    content = copy.deepcopy(CONTENT)
    content["categories"][0]["name"] = "ring"
    json_file.write_text(json.dumps(content))
    register_coco_json("test_again", json_file, image_root)
    assert MetadataCatalog.get("test_again").thing_classes == ["cross", "bar", "ring"]
    assert len(DatasetCatalog.get("test_again")) == 3


def test_a_name_of_another_data_set_is_refused(json_file: Path, image_root: Path) -> None:
    with pytest.raises(ValueError, match="'coco_2017_val' is already that of another data set"):
        register_coco_json("coco_2017_val", json_file, image_root)
    assert len(class_info("coco_2017_val").names) == 80


def _without(part: str, key: str, index: int = 0) -> Callable[[dict], None]:
    return lambda content: content[part][index].pop(key)


def _with(part: str, key: str, value: object, index: int = 0) -> Callable[[dict], None]:
    return lambda content: content[part][index].update({key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("images"), "has no 'images'"),
        (lambda content: content.update(images=[]), "has no 'images'"),
        (lambda content: content.pop("categories"), "has no 'categories'"),
        (lambda content: content.update(annotations={"a": 1}), "'annotations' is a dict; expected a list"),
        (_without("images", "height", 1), "entry 1 of 'images' has no 'height'"),
        (_without("categories", "name"), "entry 0 of 'categories' has no 'name'"),
        (_with("categories", "name", 5), "the name of category 90 is 5"),
        (_with("categories", "id", 3), "1 ids of 'categories' are not unique"),
        (_without("annotations", "category_id", 2), "entry 2 of 'annotations' has no 'category_id'"),
        (_with("annotations", "category_id", 4), r"annotation 1 \('11.png'\) has category_id 4.*\[3, 17, 90\]"),
        (_with("annotations", "image_id", 4, 1), "annotation 2 has image_id 4, which is not in 'images'"),
        (_with("annotations", "id", 2), "1 ids of 'annotations' are not unique"),
        (_with("annotations", "ignore", 1), r"annotation 1 \('11.png'\) has 'ignore'"),
        (
            _with("annotations", "segmentation", [1, 2, 3, 4, 5, 6]),
            r"annotation 1 \('11.png'\) is broken: not a list of polygons",
        ),
        (
            lambda content: [annotation.pop("segmentation") for annotation in content["annotations"]],
            "no annotation has a segmentation",
        ),
        (_with("images", "file_name", "absent.png"), r"has no file 'absent.png' \(1 of the 3 images"),
    ],
)
def test_broken_content_is_refused_in_one_line(
    change: Callable[[dict], None], message: str, json_file: Path, image_root: Path
) -> None:
    content = copy.deepcopy(CONTENT)
    change(content)
    json_file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        register_coco_json("test_broken", json_file, image_root)
    assert str(json_file) in str(error.value)
    assert "\n" not in str(error.value)
    assert "test_broken" not in DatasetCatalog


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(CONTENT)[:300], "is not valid JSON"),
        ("", "is not valid JSON"),
        (json.dumps(CONTENT["annotations"]), "holds list; expected COCO's object"),
        ("3", "holds int"),
    ],
    ids=["cut off", "empty", "list", "number"],
)
def test_broken_file_is_refused_in_one_line(text: str, message: str, json_file: Path, image_root: Path) -> None:
    json_file.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        register_coco_json("test_broken", json_file, image_root)
    assert str(json_file) in str(error.value)
    assert "\n" not in str(error.value)


def test_config_keys_become_data_sets(json_file: Path, image_root: Path, cfg: CfgNode) -> None:
    register_user_datasets(cfg)
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == ((), ())  # nothing set, nothing changed
    cfg.DATASETS.TRAIN_JSON = cfg.DATASETS.TEST_JSON = str(json_file)
    cfg.DATASETS.TRAIN_IMAGES = cfg.DATASETS.TEST_IMAGES = str(image_root)
    register_user_datasets(cfg)
    (name,) = cfg.DATASETS.TRAIN
    assert cfg.DATASETS.TEST == (name,)
    assert name.startswith("user_my_data_v1_")
    assert not set(name) & set(" ()/.")
    register_user_datasets(cfg)
    assert cfg.DATASETS.TRAIN == (name,)
    check_num_classes(cfg)


def test_only_the_wanted_split_is_looked_at(json_file: Path, image_root: Path, cfg: CfgNode) -> None:
    cfg.DATASETS.TRAIN_JSON, cfg.DATASETS.TRAIN_IMAGES = "/absent.json", "/absent"
    cfg.DATASETS.TRAIN = ("test_absent",)
    cfg.DATASETS.TEST_JSON, cfg.DATASETS.TEST_IMAGES = str(json_file), str(image_root)
    register_user_datasets(cfg, ("TEST",))
    check_num_classes(cfg, ("TEST",))
    assert cfg.DATASETS.TRAIN == ("test_absent",)
    with pytest.raises(ValueError, match="There is no data set 'test_absent'"):
        check_num_classes(cfg)


def test_wrong_paths_name_their_key(json_file: Path, image_root: Path, cfg: CfgNode) -> None:
    cfg.DATASETS.TEST_JSON = str(json_file)
    with pytest.raises(ValueError, match="DATASETS.TEST_JSON is set and DATASETS.TEST_IMAGES is not"):
        register_user_datasets(cfg)
    cfg.DATASETS.TEST_IMAGES = str(image_root / "absent")
    with pytest.raises(ValueError, match=f"DATASETS.TEST_IMAGES: there is no folder {image_root}/absent"):
        register_user_datasets(cfg)
    cfg.DATASETS.TEST_IMAGES, cfg.DATASETS.TEST_JSON = str(image_root), str(json_file) + "x"
    with pytest.raises(ValueError, match="DATASETS.TEST_JSON: there is no file .*jsonx"):
        register_user_datasets(cfg)
    cfg.DATASETS.TEST_JSON = ""
    with pytest.raises(ValueError, match="DATASETS.TEST_IMAGES is set and DATASETS.TEST_JSON is not"):
        register_user_datasets(cfg)


def test_wrong_number_of_classes_names_the_key_to_set(json_file: Path, image_root: Path, cfg: CfgNode) -> None:
    cfg.DATASETS.TRAIN_JSON, cfg.DATASETS.TRAIN_IMAGES = str(json_file), str(image_root)
    cfg.MODEL.SPARSE_INST.DECODER.NUM_CLASSES = 80
    register_user_datasets(cfg)
    message = (
        r"DATASETS.TRAIN 'user_my_data_v1_\w+' has 3 classes \(cross, bar, disc\), but "
        "MODEL.SPARSE_INST.DECODER.NUM_CLASSES is 80: set MODEL.SPARSE_INST.DECODER.NUM_CLASSES 3"
    )
    with pytest.raises(ValueError, match=message):
        check_num_classes(cfg)


def test_train_and_test_need_the_same_classes(json_file: Path, image_root: Path, tmp_path: Path, cfg: CfgNode) -> None:
    content = copy.deepcopy(CONTENT)
    content["categories"][1]["name"] = "plus"
    other_file = tmp_path / "other.json"
    other_file.write_text(json.dumps(content))
    cfg.DATASETS.TRAIN_JSON, cfg.DATASETS.TRAIN_IMAGES = str(json_file), str(image_root)
    cfg.DATASETS.TEST_JSON, cfg.DATASETS.TEST_IMAGES = str(other_file), str(image_root)
    register_user_datasets(cfg)
    with pytest.raises(ValueError, match=r"DATASETS.TEST .* \(plus, bar, disc\), but DATASETS.TRAIN .* \(cross, bar"):
        check_num_classes(cfg)
    cfg.DATASETS.TEST = ("coco_2017_val",)
    with pytest.raises(ValueError, match=r"80 classes \(person, bicycle, car, \.\.\.\), but DATASETS.TRAIN"):
        check_num_classes(cfg)


def test_builtin_and_lazy_data_sets_have_classes(json_file: Path, image_root: Path, cfg: CfgNode) -> None:
    coco = class_info("coco_2017_train")
    assert (coco.names[0], coco.category_ids[0]) == ("person", 1)
    assert (coco.names[79], coco.category_ids[79]) == ("toothbrush", 90)
    assert class_info("lvis_v1_val").category_ids[:2] == [1, 2]
    register_coco_instances("test_lazy", {}, str(json_file), str(image_root))
    assert class_info("test_lazy") == ClassInfo(["cross", "bar", "disc"], [3, 17, 90])
    DatasetCatalog.register("test_plain", lambda: [])
    with pytest.raises(ValueError, match="'test_plain' has no class names"):
        class_info("test_plain")
    MetadataCatalog.get("test_plain").thing_classes = ["a", "b"]
    assert class_info("test_plain") == ClassInfo(["a", "b"], [0, 1])
    register_coco_instances("test_gone", {}, "/absent.json", "/absent")
    with pytest.raises(ValueError, match="'test_gone' cannot be read.*absent.json"):
        class_info("test_gone")
    cfg.MODEL.SPARSE_INST.DECODER.NUM_CLASSES = 80
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("coco_2017_train",), ("coco_2017_val",)
    check_num_classes(cfg)


def test_class_info_survives_its_file(tmp_path: Path) -> None:
    info = ClassInfo(["Äpfel", "b"], [3, 90])
    info.save(tmp_path / "classes.json")
    assert ClassInfo.load(tmp_path / "classes.json") == info
    assert json.loads((tmp_path / "classes.json").read_text()) == {"names": ["Äpfel", "b"], "category_ids": [3, 90]}
    for text in (
        '{"names": []}', "[]", '{"names": ["a"], "category_ids": []}', '{"names": 1, "category_ids": 2}', "{",
        '{"names": [1], "category_ids": [2]}', '{"names": ["a"], "category_ids": ["2"]}',
    ):  # fmt: skip
        (tmp_path / "classes.json").write_text(text)
        with pytest.raises(ValueError, match="classes.json"):
            ClassInfo.load(tmp_path / "classes.json")
    with pytest.raises(ValueError, match="There is no file"):
        ClassInfo.load(tmp_path / "absent.json")


def test_evaluation_asks_for_what_it_reads(
    json_file: Path, image_root: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A command that another test ran may have kept the messages from pytest.
    monkeypatch.setattr(logging.getLogger("sparseinst"), "propagate", True)
    content = copy.deepcopy(CONTENT)
    del content["annotations"][3]["area"], content["annotations"][3]["iscrowd"]
    json_file.write_text(json.dumps(content))
    register_coco_json("test_train_only", json_file, image_root)
    with pytest.raises(ValueError, match="entry 3 of 'annotations' has no 'area', 'iscrowd'"):
        register_coco_json("test_train_only", json_file, image_root, for_evaluation=True)
    content = copy.deepcopy(CONTENT)
    content["annotations"][0]["id"] = 0
    json_file.write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING):
        register_coco_json("test_train_only", json_file, image_root, for_evaluation=True)
    assert "number the annotations from 1" in caplog.text


def _ground_truth_as_predictions(name: str) -> list[tuple[dict, dict]]:
    mapper = SparseInstDatasetMapper(True, augmentations=[], image_format="RGB")
    pairs = []
    for dataset_dict in DatasetCatalog.get(name):
        truth = mapper(dataset_dict)["instances"]
        predictions = Instances(truth.image_size)
        predictions.pred_boxes = truth.gt_boxes
        predictions.pred_masks = truth.gt_masks.tensor
        predictions.pred_classes = truth.gt_classes
        predictions.scores = torch.linspace(1, 0.5, len(truth))
        pairs.append((dataset_dict, {"instances": predictions}))
    return pairs


def test_perfect_predictions_have_ap_100(json_file: Path, image_root: Path, tmp_path: Path, cfg: CfgNode) -> None:
    cfg.DATASETS.TEST_JSON, cfg.DATASETS.TEST_IMAGES = str(json_file), str(image_root)
    register_user_datasets(cfg)
    (name,) = cfg.DATASETS.TEST
    evaluator = COCOEvaluator(name, distributed=False, output_dir=str(tmp_path / "out"))
    evaluator.reset()
    for dataset_dict, output in _ground_truth_as_predictions(name):
        evaluator.process([dataset_dict], [output])
    results = evaluator.evaluate()
    assert results["segm"]["AP"] == pytest.approx(100)
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert results["segm"]["AP-disc"] == pytest.approx(100)
    written = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert {result["category_id"] for result in written} == {3, 17, 90}


def test_json_without_annotations_is_for_predictions_only(
    json_file: Path, image_root: Path, tmp_path: Path, cfg: CfgNode
) -> None:
    json_file.write_text(json.dumps({key: CONTENT[key] for key in ("images", "categories")}))
    cfg.DATASETS.TEST_JSON, cfg.DATASETS.TEST_IMAGES = str(json_file), str(image_root)
    register_user_datasets(cfg)
    check_num_classes(cfg)
    (name,) = cfg.DATASETS.TEST
    evaluator = COCOEvaluator(name, tasks=("segm",), distributed=False, output_dir=str(tmp_path))
    evaluator.reset()
    for dataset_dict, output in _ground_truth_as_predictions(name):
        evaluator.process([dataset_dict], [output])
    assert evaluator.evaluate() == {}
    assert json.loads((tmp_path / "coco_instances_results.json").read_text()) == []

    cfg.DATASETS.TRAIN_JSON, cfg.DATASETS.TRAIN_IMAGES = str(json_file), str(image_root)
    with pytest.raises(ValueError, match="DATASETS.TRAIN_JSON: .* has no annotations to train on"):
        register_user_datasets(cfg)


def test_trains_from_the_config_keys(json_file: Path, image_root: Path, cfg: CfgNode) -> None:
    cfg.DATASETS.TRAIN_JSON, cfg.DATASETS.TRAIN_IMAGES = str(json_file), str(image_root)
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    register_user_datasets(cfg)
    loader = build_detection_train_loader(cfg, mapper=SparseInstDatasetMapper(cfg, True))
    batch = next(iter(loader))
    assert sorted(item["image_id"] for item in batch) == [11, 12]
    assert all(len(item["instances"]) == 2 for item in batch)


def test_dataset_dicts_are_those_of_detectron2(json_file: Path, image_root: Path) -> None:
    content = copy.deepcopy(CONTENT)
    content["annotations"][0]["segmentation"].append([1, 1, 5, 5])  # two points: left out
    content["annotations"][3]["segmentation"] = [[1, 1, 5, 5]]
    json_file.write_text(json.dumps(content))
    register_coco_json("test_dicts", json_file, image_root)
    register_coco_instances("test_stock_dicts", {}, str(json_file), str(image_root))
    stock = DatasetCatalog.get("test_stock_dicts")
    ours = DatasetCatalog.get("test_dicts")
    assert [annotation.pop("id") for image in ours for annotation in image["annotations"]] == [1, 2, 3, 5]
    assert ours == stock

"""Test registration and classes of a COCO json, and the evaluation of perfect predictions. Flaws: test_flaws.py."""

import copy
import json
import logging

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_train_loader
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Instances

from sparseinst.data.coco_json import (
    ClassInfo,
    check_num_classes,
    class_info,
    register_coco_json,
    register_user_datasets,
)
from sparseinst.data.dataset_mapper import SparseInstDatasetMapper
from tests.data.flawed_json import CONTENT, flawed, write
from tests.tiny_model import tiny_cfg

CLASSES = ClassInfo(["cross", "bar", "disc"], [3, 17, 90])


@pytest.fixture(autouse=True)
def _clean_catalogs():
    """Remove the data sets and metadata that a test registered."""
    before = {id(catalog): set(catalog) for catalog in (DatasetCatalog, MetadataCatalog)}
    yield
    for catalog in (DatasetCatalog, MetadataCatalog):
        for name in set(catalog) - before[id(catalog)]:
            catalog.remove(name)


@pytest.fixture
def files(tmp_path):
    json_file, images = write(tmp_path)
    return json_file.rename(tmp_path / "my data (v1).json"), images


def changed(json_file, change):
    content = copy.deepcopy(CONTENT)
    change(content)
    json_file.write_text(json.dumps(content))


def user_cfg(files, *splits):
    values = [(f"DATASETS.{s}_{kind}", str(path)) for s in splits for kind, path in zip(("JSON", "IMAGES"), files)]
    return tiny_cfg(*(value for pair in values for value in pair))


def test_metadata_is_there_at_once(files):
    register_coco_json("test_gaps", *files)
    metadata = MetadataCatalog.get("test_gaps")
    assert metadata.thing_classes == CLASSES.names
    assert metadata.thing_dataset_id_to_contiguous_id == {3: 0, 17: 1, 90: 2}
    assert metadata.evaluator_type == "coco"
    assert (metadata.json_file, metadata.image_root) == tuple(map(str, files))
    dicts = DatasetCatalog.get("test_gaps")
    assert [[x["category_id"] for x in image["annotations"]] for image in dicts] == [[2, 0], [1], [1], []]
    assert class_info("test_gaps") == CLASSES


def test_registering_again_reads_the_file_again(files):
    for _ in range(2):
        register_coco_json("test_again", *files)
    changed(files[0], lambda content: content["categories"][0].update(name="ring"))
    register_coco_json("test_again", *files)
    assert MetadataCatalog.get("test_again").thing_classes == ["cross", "bar", "ring"]


def test_refused_data_are_not_registered(files):
    changed(files[0], lambda content: content.pop("images"))
    with pytest.raises(ValueError, match="has no 'images'"):
        register_coco_json("test_broken", *files)
    assert "test_broken" not in DatasetCatalog
    with pytest.raises(ValueError, match="'coco_2017_val' is already that of another data set"):
        register_coco_json("coco_2017_val", *files)
    assert len(class_info("coco_2017_val").names) == 80


def test_config_keys_become_data_sets(files):
    cfg = tiny_cfg()
    before = cfg.DATASETS.clone()
    register_user_datasets(cfg)
    assert cfg.DATASETS == before  # nothing set, nothing changed
    cfg = user_cfg(files, "TRAIN", "TEST")
    for _ in range(2):
        register_user_datasets(cfg)
        (name,) = cfg.DATASETS.TRAIN
        assert cfg.DATASETS.TEST == (name,)
        assert name.startswith("user_my_data_v1_") and not set(name) & set(" ()/.")
    check_num_classes(cfg)


def test_only_the_wanted_split_is_looked_at(files):
    cfg = user_cfg(files, "TEST")
    cfg.DATASETS.TRAIN_JSON, cfg.DATASETS.TRAIN_IMAGES = "/absent.json", "/absent"
    cfg.DATASETS.TRAIN = ("test_absent",)
    register_user_datasets(cfg, ("TEST",))
    check_num_classes(cfg, ("TEST",))
    assert cfg.DATASETS.TRAIN == ("test_absent",)
    with pytest.raises(ValueError, match="The data set 'test_absent' .* is not registered"):
        check_num_classes(cfg)


@pytest.mark.parametrize(
    ("json_end", "images_end", "message"),
    [
        ("", None, "DATASETS.TEST_JSON is set and DATASETS.TEST_IMAGES is not"),
        (None, "", "DATASETS.TEST_IMAGES is set and DATASETS.TEST_JSON is not"),
        ("", "/absent", "DATASETS.TEST_IMAGES: the folder .*/absent does not exist"),
        ("x", "", "DATASETS.TEST_JSON: the file .*jsonx does not exist"),
    ],
)
def test_wrong_paths_name_their_key(json_end, images_end, message, files):
    paths = ["" if end is None else f"{path}{end}" for path, end in zip(files, (json_end, images_end))]
    with pytest.raises(ValueError, match=message):
        register_user_datasets(user_cfg(paths, "TEST"))


def test_wrong_number_of_classes_names_the_key_to_set(files):
    cfg = user_cfg(files, "TRAIN")
    cfg.MODEL.SPARSE_INST.DECODER.NUM_CLASSES = 80
    register_user_datasets(cfg, ("TRAIN",))
    message = (
        r"DATASETS.TRAIN 'user_my_data_v1_\w+' \(.*my data \(v1\).json\) has 3 classes \(cross, bar, disc\), but "
        "MODEL.SPARSE_INST.DECODER.NUM_CLASSES is 80: set MODEL.SPARSE_INST.DECODER.NUM_CLASSES 3"
    )
    with pytest.raises(ValueError, match=message):
        check_num_classes(cfg, ("TRAIN",))


def test_train_and_test_need_the_same_classes(files, tmp_path):
    cfg = user_cfg(files, "TRAIN")
    other = tmp_path / "other.json"
    changed(other, lambda content: content["categories"][1].update(name="plus"))
    cfg.DATASETS.TEST_JSON, cfg.DATASETS.TEST_IMAGES = str(other), str(files[1])
    register_user_datasets(cfg)
    with pytest.raises(ValueError, match=r"DATASETS.TEST .* \(plus, bar, disc\), but DATASETS.TRAIN .* \(cross, bar"):
        check_num_classes(cfg)
    cfg.DATASETS.TEST = ("coco_2017_val",)
    with pytest.raises(ValueError, match=r"80 classes \(person, bicycle, car, \.\.\.\), but DATASETS.TRAIN"):
        check_num_classes(cfg)


def test_builtin_and_lazy_data_sets_have_classes(files):
    coco = class_info("coco_2017_train")
    assert (coco.names[0], coco.category_ids[0]) == ("person", 1)
    assert (coco.names[79], coco.category_ids[79]) == ("toothbrush", 90)
    assert class_info("lvis_v1_val").category_ids[:2] == [1, 2]
    register_coco_instances("test_lazy", {}, *map(str, files))
    assert class_info("test_lazy") == CLASSES
    DatasetCatalog.register("test_plain", lambda: [])
    with pytest.raises(ValueError, match="'test_plain' has no class names"):
        class_info("test_plain")
    MetadataCatalog.get("test_plain").thing_classes = ["a", "b"]
    assert class_info("test_plain") == ClassInfo(["a", "b"], [0, 1])
    register_coco_instances("test_gone", {}, "/absent.json", "/absent")
    with pytest.raises(ValueError, match="'test_gone' cannot be read.*absent.json"):
        class_info("test_gone")


def test_class_info_survives_its_file(tmp_path):
    info = ClassInfo(["Äpfel", "b"], [3, 90])
    path = tmp_path / "classes.json"
    info.save(path)
    assert ClassInfo.load(path) == info
    assert json.loads(path.read_text()) == {"names": ["Äpfel", "b"], "category_ids": [3, 90]}
    for text in (
        '{"names": []}', "[]", '{"names": ["a"], "category_ids": []}', '{"names": 1, "category_ids": 2}', "{",
        '{"names": [1], "category_ids": [2]}', '{"names": ["a"], "category_ids": ["2"]}',
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(ValueError, match="classes.json"):
            ClassInfo.load(path)
    with pytest.raises(ValueError, match="The file .* does not exist"):
        ClassInfo.load(tmp_path / "absent.json")


def test_evaluation_asks_for_what_it_reads(files, caplog, monkeypatch):
    # A command in another test may have turned propagation off.
    monkeypatch.setattr(logging.getLogger("sparseinst"), "propagate", True)
    changed(files[0], lambda content: [content["annotations"][3].pop(key) for key in ("area", "iscrowd")])
    register_coco_json("test_train_only", *files)
    with pytest.raises(ValueError, match="entry 3 of 'annotations' has no 'area', 'iscrowd'"):
        register_coco_json("test_train_only", *files, for_evaluation=True)
    changed(files[0], lambda content: content["annotations"][0].update(id=0))
    with caplog.at_level(logging.WARNING):
        register_coco_json("test_train_only", *files, for_evaluation=True)
    assert "number the annotations from 1" in caplog.text


def evaluate_ground_truth(name, tasks, folder):
    """Evaluate predictions that equal the ground truth; return COCO's results and the written json."""
    mapper = SparseInstDatasetMapper(True, augmentations=[], image_format="RGB")
    evaluator = COCOEvaluator(name, tasks=tasks, distributed=False, output_dir=str(folder))
    evaluator.reset()
    for image in DatasetCatalog.get(name):
        truth = mapper(image)["instances"]
        found = Instances(truth.image_size, pred_boxes=truth.gt_boxes, pred_masks=truth.gt_masks.tensor)
        found.pred_classes, found.scores = truth.gt_classes, torch.linspace(1, 0.5, len(truth))
        evaluator.process([image], [{"instances": found}])
    return evaluator.evaluate(), json.loads((folder / "coco_instances_results.json").read_text())


def test_perfect_predictions_have_ap_100(files, tmp_path):
    cfg = user_cfg(files, "TEST")
    register_user_datasets(cfg, ("TEST",))
    results, written = evaluate_ground_truth(cfg.DATASETS.TEST[0], None, tmp_path / "out")
    figures = [results["segm"]["AP"], results["bbox"]["AP"], results["segm"]["AP-disc"]]
    assert figures == pytest.approx([100, 100, 100])
    assert {result["category_id"] for result in written} == {3, 17, 90}


def test_json_without_annotations_is_for_predictions_only(files, tmp_path):
    changed(files[0], lambda content: content.pop("annotations"))
    cfg = user_cfg(files, "TEST")
    register_user_datasets(cfg, ("TEST",))
    check_num_classes(cfg, ("TEST",))
    assert evaluate_ground_truth(cfg.DATASETS.TEST[0], ("segm",), tmp_path) == ({}, [])


def test_detectron2s_loader_trains_from_the_config_keys(files):
    cfg = user_cfg(files, "TRAIN")
    register_user_datasets(cfg, ("TRAIN",))
    cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS = 2, 0
    batch = next(iter(build_detection_train_loader(cfg, mapper=SparseInstDatasetMapper(cfg, True))))
    assert sorted((x["image_id"], len(x["instances"])) for x in batch) == [(1, 2), (2, 1)]


def test_dataset_dicts_are_those_of_detectron2(files):
    content = flawed("two points beside a polygon")
    content["annotations"][2]["segmentation"] = [[1, 1, 5, 5]]
    files[0].write_text(json.dumps(content))
    register_coco_json("test_dicts", *files)
    register_coco_instances("test_stock_dicts", {}, *map(str, files))
    stock = DatasetCatalog.get("test_stock_dicts")
    ours = DatasetCatalog.get("test_dicts")
    assert [annotation.pop("id") for image in ours for annotation in image["annotations"]] == [1, 2, 4]
    assert ours == stock

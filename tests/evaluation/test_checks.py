"""What an evaluation needs is checked before it; classes are matched by name."""

import json

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from sparseinst.data.coco_json import ClassInfo, check_num_classes, register_coco_json
from sparseinst.engine.trainer import Trainer
from sparseinst.evaluation import build_evaluator, check_evaluation, evaluate
from tests.shapes_data import CLASS_NAMES, register_shapes, write_shapes
from tests.tiny_model import tiny_cfg, tiny_model

NUM_CLASSES = ("MODEL.SPARSE_INST.DECODER.NUM_CLASSES", 4)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return register_shapes(tmp_path_factory.mktemp("source"), "checks_source", 3)


@pytest.fixture
def registered(source, tmp_path):
    """A function that registers the dicts of a data set, edited, as a tutorial does; returns its config."""

    def register(edit=lambda dicts: dicts, **metadata):
        DatasetCatalog.pop("checks_mine", None)
        MetadataCatalog.pop("checks_mine", None)
        DatasetCatalog.register("checks_mine", lambda: edit(DatasetCatalog.get(source)))
        MetadataCatalog.get("checks_mine").set(**{"thing_classes": CLASS_NAMES, "evaluator_type": "coco", **metadata})
        return tiny_cfg(
            "DATASETS.TRAIN", (source,), "DATASETS.TEST", ("checks_mine",), "OUTPUT_DIR", str(tmp_path / "out"),
            *NUM_CLASSES,
        )  # fmt: skip

    return register


def without(key):
    return lambda dicts: [{name: value for name, value in image.items() if name != key} for image in dicts]


def annotated(change):
    return lambda dicts: [
        {**image, "annotations": [change(dict(entry)) for entry in image["annotations"]]} for image in dicts
    ]


@pytest.mark.parametrize(
    ("edit", "metadata", "message"),
    [
        (None, {"evaluator_type": None}, "'checks_mine' has evaluator_type None.*evaluator_type = .coco."),
        (None, {"evaluator_type": "cityscapes_instance"}, "evaluator_type 'cityscapes_instance'"),
        (without("image_id"), {}, "3 of the 3 images of the data set 'checks_mine' have no 'image_id'"),
        (lambda dicts: [{**image, "image_id": 1} for image in dicts], {}, "the same 'image_id'"),
        (without("height"), {}, "'checks_mine' of DATASETS.TEST cannot be evaluated .KeyError: 'height'"),
        (annotated(lambda entry: entry.pop("bbox") and entry), {}, "cannot be evaluated .KeyError: 'bbox'.*needs bbox"),
        (lambda dicts: [], {}, "'checks_mine' of DATASETS.TEST has no images"),
        (
            None,
            {"thing_classes": ["a", "b", "c", "d"]},
            r"trained on the 4 classes \[disc, .*bar\], but .* \[a, b, c, d\]",
        ),
    ],
)
def test_before_iteration_0(registered, edit, metadata, message):
    cfg = registered(*[edit] if edit else [], **metadata)
    with pytest.raises(ValueError, match=message) as caught:
        Trainer(cfg)
    assert "\n" not in str(caught.value)


def test_an_evaluation_from_python_names_image_id(registered):
    with pytest.raises(ValueError, match="'checks_mine' have no 'image_id'"):
        evaluate(registered(without("image_id")), tiny_model(*NUM_CLASSES))


def test_a_registered_data_set_that_is_whole_passes(registered):
    check_evaluation(registered(), CLASS_NAMES)


def test_classes_are_matched_by_name():
    info = ClassInfo(["cat", "dog", "cow"], [3, 7, 9])
    assert info.category_ids_of(["cow", "cat", "dog"], "x") == [9, 3, 7]
    assert info.category_ids_of(info.names, "x") == [3, 7, 9]
    for names in (["cat", "dog"], ["cat", "dog", "Cow"], ["cat", "dog", "cow", "emu"]):
        with pytest.raises(
            ValueError, match=r"\[cat, dog.*\], but the data set 'x' has the 3 classes \[cat, dog, cow\]"
        ):
            info.category_ids_of(names, "x")
    # Two of one name cannot be told apart where the order differs.
    double = ClassInfo(["cat", "cat", "dog"], [1, 2, 3])
    assert double.category_ids_of(["cat", "cat", "dog"], "x") == [1, 2, 3]
    with pytest.raises(ValueError, match=r"\[dog, cat, cat\]"):
        double.category_ids_of(["dog", "cat", "cat"], "x")


@pytest.fixture(scope="module")
def reordered(tmp_path_factory):
    """The shapes, and the same with their categories numbered the other way round."""
    tmp_path = tmp_path_factory.mktemp("reordered")
    json_file, images = write_shapes(tmp_path, 4)
    content = json.loads(open(json_file).read())
    names = [category["name"] for category in content["categories"]]
    for category, name in zip(content["categories"], reversed(names)):
        category["name"] = name
    for annotation in content["annotations"]:
        annotation["category_id"] = 5 - annotation["category_id"]
    (tmp_path / "reordered.json").write_text(json.dumps(content))
    register_coco_json("checks_order", json_file, images, for_evaluation=True)
    register_coco_json("checks_reordered", tmp_path / "reordered.json", images, for_evaluation=True)
    return tmp_path


class FirstObjects(torch.nn.Module):
    """Find each image's objects, with the class indices of "checks_order"."""

    def __init__(self, class_names):
        super().__init__()
        self.class_names = class_names

    def forward(self, batched_inputs):
        from sparseinst.data.dataset_mapper import SparseInstDatasetMapper

        mapper = SparseInstDatasetMapper(True, augmentations=[], image_format="RGB")
        dicts = {image["image_id"]: image for image in DatasetCatalog.get("checks_order")}
        results = []
        for x in batched_inputs:
            found = mapper(dicts[x["image_id"]])["instances"]
            found.pred_boxes, found.pred_masks, found.pred_classes = (
                found.gt_boxes,
                found.gt_masks.tensor,
                found.gt_classes,
            )
            found.scores = torch.ones(len(found))
            results.append({"instances": found})
        return results


def test_another_order_of_the_classes_has_the_same_ap(reordered):
    outcomes = []

    def figures(name, class_names):
        cfg = tiny_cfg("DATASETS.TEST", (name,), "OUTPUT_DIR", str(reordered / "out"), *NUM_CLASSES)
        return evaluate(cfg, FirstObjects(class_names), lambda _, outcome: outcomes.append(outcome))["segm"]

    expected = figures("checks_order", CLASS_NAMES)
    assert expected["AP"] > 90
    found = figures("checks_reordered", CLASS_NAMES)
    assert found["AP"] == expected["AP"] and found["AP-disc"] == expected["AP-disc"]
    # The plots have each class's own name, and the data set's order, as the captions of the images.
    for outcome in outcomes:
        assert outcome.class_names == [outcome.truth.cats[id]["name"] for id in outcome.category_ids]
    assert outcomes[1].class_names == CLASS_NAMES[::-1] == MetadataCatalog.get("checks_reordered").thing_classes
    # Without names nothing is known, and nothing is said.
    assert figures("checks_reordered", None)["AP"] < 50
    # A training with the two json.
    cfg = tiny_cfg("DATASETS.TRAIN", ("checks_order",), "DATASETS.TEST", ("checks_reordered",), *NUM_CLASSES)
    check_num_classes(cfg)


def test_each_class_has_its_ap_where_two_have_one_name(reordered):
    content = json.loads((reordered / "reordered.json").read_text())
    for category in content["categories"][:2]:
        category["name"] = "thing"
    (reordered / "double.json").write_text(json.dumps(content))
    register_coco_json("checks_double", reordered / "double.json", reordered / "train", for_evaluation=True)
    cfg = tiny_cfg("DATASETS.TEST", ("checks_double",), "OUTPUT_DIR", str(reordered / "out"), *NUM_CLASSES)
    results = evaluate(cfg, FirstObjects(None))["segm"]
    assert {name for name in results if name.startswith("AP-")} == {
        "AP-thing (category 1)", "AP-thing (category 2)", "AP-triangle", "AP-disc",
    }  # fmt: skip


def test_lvis_needs_the_models_order(reordered):
    MetadataCatalog.get("checks_lvis").set(thing_classes=["b", "a"], evaluator_type="lvis")
    DatasetCatalog.register("checks_lvis", list)
    try:
        with pytest.raises(ValueError, match="'checks_lvis' are not those of the model"):
            build_evaluator(tiny_cfg(), "checks_lvis", class_names=["a", "b"])
    finally:
        DatasetCatalog.remove("checks_lvis")

"""Evaluate data sets without annotations, which have no AP, and with each flaw that does not stop an evaluation."""

import json
import math

import pytest

from sparseinst.data.coco_json import check_num_classes, register_user_datasets
from sparseinst.evaluation import evaluate
from sparseinst.evaluation.coco_evaluation import FIGURES
from tests.data.flawed_json import FLAWS, flawed, write
from tests.tiny_model import tiny_cfg, tiny_model

WITHOUT = ("no annotations", "empty annotations")


def figures(with_classes=True):
    """The names of the figures of each task."""
    names = {*FIGURES, *(("AP-cross", "AP-bar", "AP-disc") if with_classes else ())}
    return {"bbox": names, "segm": names}


@pytest.mark.parametrize("name", WITHOUT)
@pytest.mark.parametrize("threshold", [0.005, 1.0])  # Something is found, and nothing.
def test_results_without_ap(name, threshold, tmp_path):
    json_file, images = write(tmp_path, flawed(name))
    cfg = tiny_cfg(
        "DATASETS.TEST_JSON", str(json_file), "DATASETS.TEST_IMAGES", str(images), "OUTPUT_DIR", str(tmp_path / "out"),
        "MODEL.SPARSE_INST.CLS_THRESHOLD", threshold,
    )  # fmt: skip
    register_user_datasets(cfg, ("TEST",))
    check_num_classes(cfg, ("TEST",))
    model = tiny_model("MODEL.SPARSE_INST.CLS_THRESHOLD", threshold)
    results = evaluate(cfg, model)
    expected = {} if name == "no annotations" else figures(with_classes=threshold < 1)
    assert {task: values.keys() for task, values in results.items()} == expected
    assert all(math.isnan(value) for task in results.values() for value in task.values())
    written = json.loads((tmp_path / "out" / "inference" / "coco_instances_results.json").read_text())
    assert {result["image_id"] for result in written} == ({1, 2, 3, 4} if threshold < 1 else set())
    assert {result["category_id"] for result in written} <= {3, 17, 90}
    assert (tmp_path / "out" / "results.json").is_file()


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize(
    "name", [name for name, flaw in FLAWS.items() if flaw.evaluation is None and name not in WITHOUT]
)
def test_what_does_not_stop_an_evaluation_is_evaluated(name, model, tmp_path):
    json_file, images = write(tmp_path, flawed(name))
    cfg = tiny_cfg(
        "DATASETS.TEST_JSON", str(json_file), "DATASETS.TEST_IMAGES", str(images), "OUTPUT_DIR", str(tmp_path / "out")
    )
    register_user_datasets(cfg, ("TEST",))
    results = evaluate(cfg, model)
    assert {task: values.keys() for task, values in results.items()} == figures()
    written = json.loads((tmp_path / "out" / "inference" / "coco_instances_results.json").read_text())
    assert {result["image_id"] for result in written} == {1, 2, 3, 4}

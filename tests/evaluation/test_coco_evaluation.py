"""AP of boxes and masks: against Detectron2's COCOEvaluator, and both ways to compute it against each other."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from pycocotools import mask as mask_api
from pycocotools.coco import COCO

from sparseinst.checkpoint import OutputError
from sparseinst.data.coco_json import register_coco_json
from sparseinst.data.coco_results import to_coco_results
from sparseinst.evaluation.checks import check_test_config
from sparseinst.evaluation.coco_evaluation import RESULTS_FILE, EncodedMaskEvaluator, check_coco_eval, run_coco_eval
from sparseinst.structures.rle_masks import RLEMasks
from tests.shapes_data import write_shapes
from tests.tiny_model import tiny_cfg

SIZE = (96, 128)
# With gaps, as COCO's own.
CATEGORIES = [1, 2, 5, 7, 11, 90]


def rectangle(rng):
    """A mask; mostly small, since AP has areas of its own for those."""
    height, width = (rng.integers(1, size // 2) for size in SIZE)
    y, x = rng.integers(0, SIZE[0] - height), rng.integers(0, SIZE[1] - width)
    mask = np.zeros(SIZE, np.uint8)
    mask[y : y + height, x : x + width] = 1
    # Less than its box, so that their areas are not of the same kind.
    mask[y : y + height // 2, x : x + width // 2] = 0
    return mask


def make_truth(rng, num_images, first_id=1):
    """A COCO json: crowds, polygons, images without objects and classes that are nowhere among them."""
    annotations = []
    for image_id in range(1, num_images + 1):
        for _ in range(rng.choice([0, 1, 3, 8])):
            mask = rectangle(rng)
            ys, xs = mask.nonzero()
            if len(ys) == 0:
                continue
            x0, y0, x1, y1 = (int(value) for value in (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
            is_crowd = int(rng.random() < 0.1)
            counts = mask_api.encode(np.asfortranarray(mask))
            encoded = {"size": list(SIZE), "counts": counts["counts"].decode()}
            polygon = [[x0, y0, x1, y0, x1, y1 - 0.5, x0, y1]]
            annotations.append(
                {
                    "id": len(annotations) + first_id,
                    "image_id": image_id,
                    "category_id": int(rng.choice(CATEGORIES[:-1])),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": float(rng.choice([mask.sum(), 32**2, 96**2, 1e5])),
                    "iscrowd": is_crowd,
                    "segmentation": encoded if is_crowd or rng.random() < 0.5 else polygon,
                }
            )
    return {
        "images": [{"id": i, "height": SIZE[0], "width": SIZE[1]} for i in range(1, num_images + 1)],
        "categories": [{"id": i, "name": f"class {i}"} for i in CATEGORIES],
        "annotations": annotations,
    }


def make_predictions(rng, truth, most=25, scores=(0.1, 0.5, 0.5, 0.9)):
    """By image: objects that are found, moved a little, some of another class, some invented; scores are often equal.

    Some images have none, some have many of one class.
    """
    coco = COCO()
    coco.dataset = truth
    coco.createIndex()
    predictions = {}
    for image in truth["images"]:
        found = coco.imgToAnns[image["id"]]
        masks = []
        for annotation in found:
            moved = np.roll(coco.annToMask(annotation), rng.integers(-1, 2, 2), (0, 1))
            masks += [(moved, CATEGORIES.index(annotation["category_id"]))] * rng.integers(0, 3)
        masks += [(rectangle(rng), int(rng.integers(len(CATEGORIES)))) for _ in range(rng.choice([0, 0, 4, most]))]
        masks = [(mask, index) for mask, index in masks if mask.any()]
        array = np.array([mask for mask, _ in masks], dtype=bool).reshape(-1, *SIZE)
        boxes = [[x.min(), y.min(), x.max() + 1, y.max() + 1] for y, x in (mask.nonzero() for mask in array)]
        predictions[image["id"]] = Instances(
            SIZE,
            pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4) + 0.3),
            pred_masks=torch.from_numpy(array),
            scores=torch.tensor(rng.choice(scores, len(masks)), dtype=torch.float32),
            pred_classes=torch.tensor([index for _, index in masks], dtype=torch.int64),
        )
    return predictions


def register(name, path, truth):
    path.write_text(json.dumps(truth))
    MetadataCatalog.pop(name, None)
    MetadataCatalog.get(name).set(
        json_file=str(path),
        thing_classes=[category["name"] for category in truth["categories"]],
        thing_dataset_id_to_contiguous_id={category_id: index for index, category_id in enumerate(CATEGORIES)},
    )
    return name


def run(evaluator, predictions):
    evaluator.reset()
    for image_id, instances in predictions.items():
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    return evaluator.evaluate()


def encoded(instances):
    fields = {**instances.get_fields(), "pred_masks": RLEMasks.encode(instances.pred_masks)}
    return Instances(instances.image_size, **fields)


@pytest.fixture(scope="module")
def scene():
    rng = np.random.default_rng(0)
    truth = make_truth(rng, 40)
    return truth, make_predictions(rng, truth)


@pytest.mark.parametrize("limit", [100, 110])
def test_figures_and_json_are_those_of_detectron2(scene, limit, tmp_path):
    truth, predictions = scene
    name = register("coco_evaluation_stock", tmp_path / "truth.json", truth)
    stock = COCOEvaluator(
        name, tasks=("bbox", "segm"), output_dir=str(tmp_path / "stock"),
        max_dets_per_image=None if limit == 100 else limit,
    )  # fmt: skip
    expected = run(stock, predictions)
    assert expected["segm"]["AP"] > 5 and expected["bbox"]["APs"] > 5
    text = (tmp_path / "stock" / RESULTS_FILE).read_text()
    for kind in ("boolean", "encoded"):
        given = predictions if kind == "boolean" else {key: encoded(value) for key, value in predictions.items()}
        evaluator = EncodedMaskEvaluator(name, tmp_path / kind, max_detections=limit)
        # Twice: what was taken is forgotten.
        for _ in range(2):
            figures = run(evaluator, given)
        # As text: NaN is NaN, and every digit counts.
        assert repr(figures) == repr(dict(expected))
        assert (tmp_path / kind / RESULTS_FILE).read_text() == text


def test_a_model_that_finds_nothing(scene, tmp_path):
    truth, predictions = scene
    name = register("coco_evaluation_nothing", tmp_path / "truth.json", truth)
    evaluator = EncodedMaskEvaluator(name, tmp_path / "out")
    figures = run(evaluator, {key: instances[:0] for key, instances in predictions.items()})
    assert all(np.isnan(value) for task in figures.values() for value in task.values()) and len(figures) == 2
    assert (tmp_path / "out" / RESULTS_FILE).read_text() == "[]"
    assert run(evaluator, {}) == {}


def test_results_that_cannot_be_written_leave_earlier_ones(scene, tmp_path, monkeypatch):
    truth, predictions = scene
    name = register("coco_evaluation_disk", tmp_path / "truth.json", truth)
    evaluator = EncodedMaskEvaluator(name, tmp_path)
    (tmp_path / RESULTS_FILE).write_text("earlier")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        run(evaluator, predictions)
    assert (tmp_path / RESULTS_FILE).read_text() == "earlier" and len(list(tmp_path.iterdir())) == 2


def test_an_unknown_computation_is_refused():
    with pytest.raises(ValueError, match="TEST.COCO_EVAL is 'cocoapi'; it must be one of pycocotools"):
        check_coco_eval("cocoapi")
    # Before anything is read or trained.
    with pytest.raises(ValueError, match="TEST.COCO_EVAL"):
        check_test_config(tiny_cfg("TEST.COCO_EVAL", "cocoapi"))


def test_a_class_that_the_data_set_has_not(scene):
    instances = max(scene[1].values(), key=len)
    instances = Instances(SIZE, **{**instances.get_fields(), "pred_classes": instances.pred_classes + 6})
    with pytest.raises(ValueError, match="has classes 0 to 5: set MODEL.X.NUM_CLASSES"):
        to_coco_results(instances, 1, CATEGORIES, num_classes_key="MODEL.X.NUM_CLASSES")


def test_a_missing_package_is_named(monkeypatch):
    # None in sys.modules is Python's own way to make an import fail.
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(ValueError, match=r"pip install 'sparseinst\[fast-eval\]'") as error:
        check_coco_eval("faster-coco-eval")
    assert "\n" not in str(error.value)


def all_figures(truth, predictions, task, coco_eval, limit=100):
    """The 12 figures; precision and recall at every threshold, of every class and area."""
    results = []
    for image_id, instances in predictions.items():
        results += to_coco_results(instances, image_id, CATEGORIES)
    coco = COCO()
    coco.dataset = json.loads(json.dumps(truth))
    coco.createIndex()
    evaluated = run_coco_eval(coco, results, task, coco_eval, limit)
    return np.asarray(evaluated.stats), evaluated.eval["precision"], evaluated.eval["recall"]


CASES = {
    # scores, most invented objects in an image, limit, first id of an annotation
    "ties": ((0.1, 0.5, 0.5, 0.9), 25, 100, 1),
    "all equal": ((0.5,), 25, 100, 1),
    "distinct": (tuple(np.linspace(0.01, 0.99, 997)), 25, 100, 1),
    "more than the limit": ((0.3, 0.6, 0.7), 160, 100, 1),
    "a limit of 150": ((0.3, 0.6, 0.7), 160, 150, 1),
    "ids from 0": ((0.1, 0.5, 0.9), 25, 100, 0),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_the_faster_computation_has_the_same_figures(case, seed):
    pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed (extra fast-eval)")
    scores, most, limit, first_id = CASES[case]
    rng = np.random.default_rng([seed, len(case)])
    truth = make_truth(rng, 100, first_id)
    predictions = make_predictions(rng, truth, most, scores)
    for task in ("bbox", "segm"):
        plain, fast = (
            all_figures(truth, predictions, task, name, limit) for name in ("pycocotools", "faster-coco-eval")
        )
        assert len(plain[0]) == 12 and plain[0].max() > 0.1
        np.testing.assert_allclose(plain[0], fast[0], rtol=0, atol=1e-15, err_msg=task)
        # The one case of the docstring.
        almost_1 = plain[1] == 1 - 2**-52
        assert np.array_equal(np.where(almost_1, 1, plain[1]), fast[1]), task
        assert np.array_equal(plain[2], fast[2]), task


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_json_with_a_byte_order_mark(encoding, tmp_path):
    json_file, images = write_shapes(tmp_path, 2)
    path = Path(json_file)
    path.write_text(path.read_text(), encoding=encoding)
    name = f"shapes_{encoding}"
    register_coco_json(name, json_file, images, for_evaluation=True)
    assert len(EncodedMaskEvaluator(name, tmp_path / "out")._coco_api.imgs) == 2
    assert MetadataCatalog.get(name).json_file == json_file

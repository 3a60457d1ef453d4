"""Matches of predictions and objects, worked by hand on masks that are stripes of a 10 x 10 image."""

import numpy as np
import pytest
from pycocotools import mask as mask_api
from pycocotools.coco import COCO

from sparseinst.evaluation.coco_evaluation import run_coco_eval
from sparseinst.evaluation.mask_matches import (
    ON_CROWD,
    UNMATCHED,
    Outcome,
    best_score,
    confusion_matrix,
    match_masks,
    precision_and_recall,
)

IDS = [3, 7]


def rle(first, last):
    """Rows first to last - 1 of the image."""
    mask = np.zeros((10, 10), np.uint8, order="F")
    mask[first:last] = 1
    encoded = mask_api.encode(mask)
    return {"size": [10, 10], "counts": encoded["counts"].decode()}


def annotation(id, first, last, category_id, image_id=1, iscrowd=0):
    return {
        "id": id, "image_id": image_id, "category_id": category_id, "iscrowd": iscrowd, "area": 10 * (last - first),
        "bbox": [0, first, 10, last - first], "segmentation": rle(first, last),
    }  # fmt: skip


def result(first, last, category_id, score, image_id=1):
    return {
        "image_id": image_id, "category_id": category_id, "score": score, "bbox": [0, first, 10, last - first],
        "segmentation": rle(first, last),
    }  # fmt: skip


def outcome_of(annotations, results, num_images=2):
    truth = COCO()
    truth.dataset = {
        "images": [{"id": 1 + index, "height": 10, "width": 10} for index in range(num_images)],
        "categories": [{"id": id, "name": f"class {id}"} for id in IDS],
        "annotations": annotations,
    }
    truth.createIndex()
    evaluation = run_coco_eval(truth, results, "segm") if results else None
    return Outcome(truth, results, evaluation, IDS, ["a", "b"])


def test_each_object_is_found_once_by_the_best_prediction():
    # Rows 0-3 and 3-5 are objects, rows 6-9 are a crowd.
    annotations = [annotation(1, 0, 3, 3), annotation(2, 3, 5, 7), annotation(3, 6, 10, 3, iscrowd=1)]
    results = [
        result(0, 4, 3, 0.5),  # IoU 3/4 with the first, which a better one has found
        result(0, 2, 7, 0.9),  # IoU 2/3 with the first, of another class
        result(4, 5, 7, 0.8),  # IoU 1/2 with the second
        result(7, 8, 3, 0.7),  # inside the crowd
        result(5, 6, 7, 0.1),  # below the score
        result(5, 6, 7, 0.6, image_id=2),  # an image without objects
    ]
    first, second = match_masks(outcome_of(annotations, results), 0.2)
    assert [prediction["score"] for prediction in first.predictions] == [0.9, 0.8, 0.7, 0.5]
    assert first.object_matches.tolist() == [0, 1]
    assert first.prediction_matches.tolist() == [0, 1, ON_CROWD, UNMATCHED]
    assert [first.is_right(index) for index in range(4)] == [False, True, False, False] and first.num_right() == 1
    assert second.prediction_matches.tolist() == [UNMATCHED] and not second.objects
    # Rows: a, b, no object. Columns: a, b, missed.
    assert confusion_matrix([first, second], IDS).tolist() == [[0, 1, 0], [0, 1, 0], [1, 1, 0]]


def test_without_predictions_all_are_missed():
    outcome = outcome_of([annotation(1, 0, 3, 3), annotation(2, 3, 5, 7), annotation(3, 5, 6, 7)], [])
    assert best_score(outcome) == 0.5
    assert confusion_matrix(match_masks(outcome, 0.5), IDS).tolist() == [[0, 0, 1], [0, 0, 2], [0, 0, 0]]


def test_images_without_objects_and_predictions():
    assert confusion_matrix(match_masks(outcome_of([], []), 0.5), IDS).sum() == 0


@pytest.mark.parametrize(
    ("wrong_score", "expected"),
    [
        (0.3, (0.3, 0.6)),  # 4 of 4 found above 0.3, without a wrong one
        (0.7, (0.0, 0.6)),  # the wrong one is above all right ones: with all, F1 is 8/9
    ],
)
def test_the_best_score_separates_right_from_wrong(wrong_score, expected):
    annotations = [annotation(1 + index, 2 * index, 2 * index + 2, 3) for index in range(4)]
    results = [result(2 * index, 2 * index + 2, 3, 0.6) for index in range(4)] + [result(8, 10, 3, wrong_score)]
    outcome = outcome_of(annotations, results)
    assert expected[0] < best_score(outcome) <= expected[1]
    precision = precision_and_recall(outcome.evaluation)
    assert precision.shape == (101, 2) and np.isnan(precision[:, 1]).all()
    assert precision[0, 0] == pytest.approx(1.0 if wrong_score < 0.6 else 0.8)


def test_a_part_of_the_json_leaves_out_the_other_images():
    outcome = outcome_of(
        [annotation(1, 0, 3, 3), annotation(2, 0, 3, 3, image_id=2)], [result(0, 3, 3, 0.9, image_id=2)]
    )
    assert [len(match_masks(outcome._replace(image_ids=ids), 0.5)) for ids in (None, [2])] == [2, 1]
    (match,) = match_masks(outcome._replace(image_ids=[2]), 0.5)
    assert match.image_id == 2 and confusion_matrix([match], IDS).sum() == 1


def test_the_best_score_ignores_objects_of_other_images():
    # One object is found at 0.9, the other at 0.2 after three wrong predictions: F1 is 2/3 from 0.9 and 4/7 from 0.2.
    # Four more objects of the second class would raise the weight of its recall: 2/7 and 12/27.
    annotations = [annotation(1, 0, 2, 3), annotation(2, 4, 6, 7)]
    others = [annotation(3 + index, 2 * index, 2 * index + 2, 7, image_id=2) for index in range(4)]
    results = [result(0, 2, 3, 0.9), result(4, 6, 7, 0.2), *[result(8, 10, 7, 0.3)] * 3]
    alone = outcome_of(annotations, results)
    both = outcome_of([*annotations, *others], results)
    part = both._replace(image_ids=[1], evaluation=run_coco_eval(both.truth, results, "segm", img_ids=[1]))
    assert best_score(part) == best_score(alone) == 0.9

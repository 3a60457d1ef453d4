"""Match predictions with objects one to one: what a model finds, confuses, misses and invents."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

MIN_IOU = 0.5
UNMATCHED = -1
# A prediction on a crowd is neither right nor wrong.
ON_CROWD = -2


class Outcome(NamedTuple):
    """Hold the inputs of an evaluation of masks.

    Attributes:
        truth: the annotations.
        results: all predictions in COCO's results format, with ``segmentation``.
        evaluation: COCO's evaluation of the masks; None without predictions.
        category_ids: COCO's category id of each class.
        class_names: of each class.
        image_ids: of the images that were evaluated, where they are a part of the json; None: all.
    """

    truth: COCO
    results: list[dict]
    evaluation: COCOeval | None
    category_ids: list[int]
    class_names: list[str]
    image_ids: Sequence[int] | None = None


class ImageMatches(NamedTuple):
    """The objects and predictions of one image.

    Attributes:
        image_id: COCO's image id.
        objects: annotations that are not crowds.
        predictions: results, best first.
        object_matches: (G,) index of the prediction that found each object, or UNMATCHED.
        prediction_matches: (D,) index of the object that each prediction found, UNMATCHED or ON_CROWD.
    """

    image_id: int
    objects: list[dict]
    predictions: list[dict]
    object_matches: np.ndarray
    prediction_matches: np.ndarray

    def is_right(self, prediction: int) -> bool:
        """Return whether a prediction found an object of its own class."""
        found = self.prediction_matches[prediction]
        return found >= 0 and self.objects[found]["category_id"] == self.predictions[prediction]["category_id"]

    def num_right(self) -> int:
        """Return the number of objects that were found with the right class."""
        return sum(map(self.is_right, range(len(self.predictions))))


def match_masks(outcome: Outcome, min_score: float) -> list[ImageMatches]:
    """Match the predictions of each image with its objects, of any class.

    The best prediction comes first, and takes the free object with the highest IoU, of at least 0.5.

    Args:
        outcome: of an evaluation.
        min_score: predictions below it are left out.
    """
    predictions: dict[int, list[dict]] = {}
    for result in outcome.results:
        if result["score"] >= min_score:
            predictions.setdefault(result["image_id"], []).append(result)
    image_ids = outcome.truth.getImgIds() if outcome.image_ids is None else outcome.image_ids
    return [_match_image(outcome.truth, image_id, predictions.get(image_id, [])) for image_id in image_ids]


def _match_image(truth: COCO, image_id: int, predictions: list[dict]) -> ImageMatches:
    annotations = truth.imgToAnns[image_id]
    # Crowds last, so that the index of an object is that of its column.
    crowds = [annotation for annotation in annotations if annotation.get("iscrowd")]
    objects = [annotation for annotation in annotations if not annotation.get("iscrowd")]
    predictions = sorted(predictions, key=lambda result: -result["score"])
    object_matches = np.full(len(objects), UNMATCHED)
    prediction_matches = np.full(len(predictions), UNMATCHED)
    if annotations and predictions:
        ious = mask_api.iou(
            [result["segmentation"] for result in predictions],
            [truth.annToRLE(annotation) for annotation in (*objects, *crowds)],
            [0] * len(objects) + [1] * len(crowds),
        )
        for index, row in enumerate(ious):
            free = np.where(object_matches == UNMATCHED, row[: len(objects)], 0)
            if free.size and free.max() >= MIN_IOU:
                object_matches[free.argmax()] = index
                prediction_matches[index] = free.argmax()
            elif (row[len(objects) :] >= MIN_IOU).any():
                prediction_matches[index] = ON_CROWD
    return ImageMatches(image_id, objects, predictions, object_matches, prediction_matches)


def confusion_matrix(matches: Sequence[ImageMatches], category_ids: Sequence[int]) -> np.ndarray:
    """Count the objects of each class by the class that was predicted.

    Args:
        matches: of `match_masks`.
        category_ids: of the K classes.

    Returns:
        (K + 1, K + 1) int64. Rows: class of the object; the last row counts predictions without an object. Columns:
        class of the prediction; the last column counts objects that were missed.
    """
    index_of = {category_id: index for index, category_id in enumerate(category_ids)}
    background = len(category_ids)
    matrix = np.zeros((background + 1, background + 1), dtype=np.int64)
    for image in matches:
        for annotation, match in zip(image.objects, image.object_matches):
            predicted = background if match < 0 else index_of[image.predictions[match]["category_id"]]
            matrix[index_of[annotation["category_id"]], predicted] += 1
        for result, match in zip(image.predictions, image.prediction_matches):
            if match == UNMATCHED:
                matrix[background, index_of[result["category_id"]]] += 1
    return matrix


def precision_and_recall(evaluation: COCOeval, min_iou: float = MIN_IOU) -> np.ndarray:
    """Return COCO's interpolated precision of masks, (101, K), at recalls 0, 0.01, ..., 1; NaN for absent classes."""
    index = int(np.argmin(np.abs(np.asarray(evaluation.params.iouThrs) - min_iou)))
    precision = np.asarray(evaluation.eval["precision"])[index, :, :, 0, -1]
    return np.where(precision < 0, np.nan, precision)


def best_score(outcome: Outcome) -> float:
    """Return the score above which all predictions together have the best F1 at IoU 0.5; 0.5 without a right one.

    The score is computed from the precision-recall curves of the classes, which takes a fraction of the time of
    matching all predictions.
    """
    if outcome.evaluation is None:
        return 0.5
    precision = precision_and_recall(outcome.evaluation)
    scores = np.asarray(outcome.evaluation.eval["scores"])[0, :, :, 0, -1]
    params = outcome.evaluation.params
    annotations = (a for image_id in params.imgIds for a in outcome.truth.imgToAnns[image_id])
    num_objects = Counter(a["category_id"] for a in annotations if not a.get("iscrowd"))
    objects = np.array([num_objects[category_id] for category_id in params.catIds])
    # Highest first: the curves count wrong predictions down to the last right one only, so the first maximum is right.
    candidates = np.arange(1, 100)[::-1] / 100
    # (recalls, K, candidates): scores fall with the recall, and are 0 beyond the largest recall.
    reached = (scores[:, :, None] >= candidates).sum(0) - 1
    found = np.maximum(reached, 0) / (len(precision) - 1) * objects[:, None]
    precise = np.take_along_axis(np.nan_to_num(precision).T, np.maximum(reached, 0), axis=1)
    num_predictions = (found / np.maximum(precise, 1e-9)).sum(0)
    f1 = 2 * found.sum(0) / np.maximum(objects.sum() + num_predictions, 1e-9)
    return float(candidates[f1.argmax()]) if f1.max() > 0 else 0.5

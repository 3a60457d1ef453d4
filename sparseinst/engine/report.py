"""Draw the plots of a run into OUTPUT_DIR. A plot that fails costs one WARNING and nothing else."""

import functools
import io
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from detectron2.structures import Boxes, Instances
from PIL import Image
from pycocotools import mask as mask_api

from sparseinst.checkpoint.atomic_write import write_atomically
from sparseinst.data.images import DataError, read_image
from sparseinst.engine.metrics_file import METRICS_FILE, read_metrics
from sparseinst.evaluation.mask_matches import (
    ON_CROWD,
    UNMATCHED,
    ImageMatches,
    Outcome,
    best_score,
    confusion_matrix,
    match_masks,
    precision_and_recall,
)
from sparseinst.structures.rle_masks import RLEMasks
from sparseinst.visualization.comparison import RIGHT, WRONG, WRONG_CLASS, Comparison, draw_comparisons
from sparseinst.visualization.plots import draw_confusion_matrix, draw_curves, draw_precision_recall

logger = logging.getLogger(__name__)

NUM_IMAGES = 8
IOUS = (0.5, 0.75, 0.9)


class CurvesHook(HookBase):
    """Draw curves.png from metrics.json at the end of a training. Register it after the writers, on rank 0.

    Args:
        output_dir: holds metrics.json and gets the plot.
        iterations_per_epoch: None: without an axis in epochs.
    """

    def __init__(self, output_dir: str, iterations_per_epoch: float | None = None) -> None:
        self._output_dir = Path(output_dir)
        self._iterations_per_epoch = iterations_per_epoch

    def after_train(self) -> None:
        """Draw the curves of a training that reached its last step."""
        if self.trainer.iter >= self.trainer.max_iter:
            metrics = read_metrics(self._output_dir / METRICS_FILE)
            write_plot(self._output_dir / "curves.png", lambda: draw_curves(metrics, self._iterations_per_epoch))


def evaluation_report(cfg: CfgNode) -> Callable[[str, Outcome], None] | None:
    """Return a function that draws the plots of an evaluation, as `evaluate` takes it; None without TEST.PLOTS.

    Args:
        cfg: OUTPUT_DIR, DATASETS.TEST, INPUT.MAX_IMAGE_PIXELS and TEST.PLOTS are read.
    """
    return functools.partial(_report, cfg) if cfg.TEST.PLOTS else None


def _report(cfg: CfgNode, dataset_name: str, outcome: Outcome) -> None:
    """Write val_predictions.jpg, pr_curve.png and confusion_matrix.png; with several data sets named after them."""
    suffix = f"_{dataset_name.replace('/', '_')}" if len(cfg.DATASETS.TEST) > 1 else ""
    folder = Path(cfg.OUTPUT_DIR)
    try:
        score = best_score(outcome)
        matches = match_masks(outcome, score)
    # A defect of the plots must not end a training.
    except Exception as error:
        _warn("The plots of the evaluation", error)
        return

    def precision_recall() -> bytes:
        precision = {iou: precision_and_recall(outcome.evaluation, iou) for iou in IOUS}
        right, objects = sum(image.num_right() for image in matches), sum(len(image.objects) for image in matches)
        predictions = sum(int((image.prediction_matches != ON_CROWD).sum()) for image in matches)
        point = (right / max(objects, 1), right / max(predictions, 1))
        return draw_precision_recall(precision, outcome.class_names, score, point)

    def confusion() -> bytes:
        return draw_confusion_matrix(confusion_matrix(matches, outcome.category_ids), outcome.class_names, score)

    write_plot(folder / f"confusion_matrix{suffix}.png", confusion)
    write_plot(
        folder / f"val_predictions{suffix}.jpg", lambda: _val_predictions(cfg, dataset_name, outcome, matches, score)
    )
    if outcome.evaluation is not None:
        write_plot(folder / f"pr_curve{suffix}.png", precision_recall)
    logger.info("Plots of the evaluation are in %s", folder)


def write_plot(path: Path, draw: Callable[[], bytes]) -> None:
    """Write an image file atomically; log one WARNING where it cannot be drawn or written."""
    try:
        with warnings.catch_warnings():
            # Matplotlib warns about letters that its font does not have.
            warnings.simplefilter("ignore")
            content = draw()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(content))
    # A defect of a plot must not end a training.
    except Exception as error:
        _warn(str(path), error)


def _warn(name: str, error: Exception) -> None:
    logger.warning("%s: not drawn: %s: %s", name, type(error).__name__, " ".join(str(error).split())[:300])


def _val_predictions(
    cfg: CfgNode, dataset_name: str, outcome: Outcome, matches: Sequence[ImageMatches], score: float
) -> bytes:
    """Draw images from the worst to the best, evenly spaced in this order, as a JPEG file."""
    candidates = [image for image in matches if image.objects or image.predictions]
    if not candidates:
        raise ValueError("no image has an object or a prediction")
    candidates.sort(
        key=lambda image: image.num_right() / (len(image.objects) + len(image.predictions) - image.num_right())
    )
    chosen = np.unique(np.linspace(0, len(candidates) - 1, NUM_IMAGES).round().astype(int))
    files = {image["image_id"]: image["file_name"] for image in DatasetCatalog.get(dataset_name)}
    class_of = {category_id: index for index, category_id in enumerate(outcome.category_ids)}
    comparisons = []
    for index in chosen:
        try:
            comparisons.append(_comparison(candidates[index], outcome, class_of, files, cfg.INPUT.MAX_IMAGE_PIXELS))
        except DataError:
            # The evaluation has logged it.
            continue
    title = (
        f"{len(comparisons)} of {len(matches)} images, from the worst to the best; predictions with a score of at "
        f"least {score:.2f}"
    )
    sheet = draw_comparisons(comparisons, MetadataCatalog.get(dataset_name), title)
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()


def _comparison(
    image: ImageMatches, outcome: Outcome, class_of: dict[int, int], files: dict[int, str], max_pixels: int
) -> Comparison:
    pixels = read_image(files[image.image_id], "RGB", max_pixels)
    size = pixels.shape[:2]
    objects = _instances([outcome.truth.annToRLE(a) for a in image.objects], image.objects, class_of, size)
    rles = [
        {"size": result["segmentation"]["size"], "counts": result["segmentation"]["counts"].encode()}
        for result in image.predictions
    ]
    predictions = _instances(rles, image.predictions, class_of, size)
    predictions.scores = torch.tensor([result["score"] for result in image.predictions])
    is_right = [image.is_right(index) for index in range(len(image.predictions))]
    prediction_colors = [
        RIGHT if right or match == ON_CROWD else WRONG if match == UNMATCHED else WRONG_CLASS
        for right, match in zip(is_right, image.prediction_matches)
    ]
    object_colors = [
        WRONG if match < 0 else RIGHT if is_right[match] else WRONG_CLASS for match in image.object_matches
    ]
    return Comparison(pixels, objects, predictions, object_colors, prediction_colors, Path(files[image.image_id]).name)


def _instances(rles: list[dict], entries: list[dict], class_of: dict[int, int], size: tuple[int, int]) -> Instances:
    boxes = (
        torch.from_numpy(np.asarray(mask_api.toBbox(rles), dtype=np.float32).reshape(-1, 4))
        if rles
        else torch.zeros(0, 4)
    )
    boxes[:, 2:] += boxes[:, :2]
    return Instances(
        size,
        pred_boxes=Boxes(boxes),
        pred_masks=RLEMasks(rles, size),
        pred_classes=torch.tensor([class_of[entry["category_id"]] for entry in entries], dtype=torch.int64),
    )

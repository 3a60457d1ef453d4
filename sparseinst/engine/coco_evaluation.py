"""AP of boxes and masks as COCO defines it, from predictions that stay encoded."""

import contextlib
import importlib
import io
import itertools
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import convert_to_coco_json
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.coco_evaluation import COCOevalMaxDets
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.logger import create_small_table
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate

from sparseinst.engine.stopwatch import Stopwatch
from sparseinst.structures.rle_masks import RLEMasks

logger = logging.getLogger(__name__)

COCO_EVALS = ("pycocotools", "faster-coco-eval")
TASKS = ("bbox", "segm")
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
# COCO's own limit of detections in an image.
MAX_DETECTIONS = 100
RESULTS_FILE = "coco_instances_results.json"


def check_coco_eval(name: str) -> None:
    """Refuse a TEST.COCO_EVAL that is unknown or not installed. Raises ValueError."""
    if name not in COCO_EVALS:
        raise ValueError(f"TEST.COCO_EVAL is {name!r}; it must be one of {', '.join(COCO_EVALS)}")
    if name == "faster-coco-eval":
        try:
            importlib.import_module("faster_coco_eval")
        except ImportError as error:
            raise ValueError(
                "TEST.COCO_EVAL faster-coco-eval needs the package faster-coco-eval, which cannot be imported "
                f"({error}). Install it: pip install 'sparseinst[fast-eval]', or set TEST.COCO_EVAL pycocotools"
            ) from error


class InstanceSegmentationEvaluator(DatasetEvaluator):
    """AP of boxes and masks: the figures, the tables and the json of Detectron2's COCOEvaluator, sooner there.

    Encoded masks go into the results as they are, where COCOEvaluator decodes and encodes them again; and results are
    not copied for each task. The predictions are written once, as json, not as a file for torch.load besides.

    "faster-coco-eval" matches and accumulates in C++, with the recalls and precisions of pycocotools but for one case:
    where the best detection of a class is right and the second one wrong, the precision before that is 1, and with
    pycocotools 1 - 2.2e-16, since it adds 2.2e-16 to what it divides by. So AP may differ in its 15th digit.

    Args:
        dataset_name: a registered one, with a ``json_file`` in its metadata or in Detectron2's own format.
        output_dir: gets ``coco_instances_results.json``.
        max_detections: most detections of an image that count.
        coco_eval: "pycocotools" or "faster-coco-eval".
        stopwatch: counts the parts of :meth:`evaluate`.

    Raises:
        ValueError: ``coco_eval`` is unknown or not installed.
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | Path,
        *,
        max_detections: int = MAX_DETECTIONS,
        coco_eval: str = "pycocotools",
        stopwatch: Stopwatch | None = None,
    ) -> None:
        check_coco_eval(coco_eval)
        self.max_detections = max_detections
        self.coco_eval = coco_eval
        self._output_dir = Path(output_dir)
        self._watch = stopwatch or Stopwatch()
        self._metadata = MetadataCatalog.get(dataset_name)
        if not hasattr(self._metadata, "json_file"):
            json_file = self._output_dir / f"{dataset_name}_coco_format.json"
            convert_to_coco_json(dataset_name, str(json_file), allow_cached=False)
            self._metadata.json_file = str(json_file)
        # It prints what it does.
        with contextlib.redirect_stdout(io.StringIO()):
            self._truth = COCO(self._metadata.json_file)
        to_contiguous = self._metadata.get("thing_dataset_id_to_contiguous_id")
        self._category_ids = None if to_contiguous is None else {new: old for old, new in to_contiguous.items()}
        self._results: list[list[dict]] = []

    def reset(self) -> None:
        """Forget all predictions."""
        self._results = []

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        """Take the predictions of a batch.

        Args:
            inputs: ``image_id`` of each image.
            outputs: ``instances`` of each, with boxes, scores, classes and masks, boolean or RLEMasks.
        """
        with self._watch("results"):
            for x, output in zip(inputs, outputs):
                self._results.append(coco_results(output["instances"], x["image_id"], self._category_ids))

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Write the results of all processes, and compute the figures.

        Returns:
            For "bbox" and "segm": AP in percent, over all classes and of each; NaN where there is none. Empty where
            nothing can be computed, and on ranks other than 0.
        """
        with self._watch("gathering"):
            comm.synchronize()
            gathered = list(itertools.chain.from_iterable(comm.gather(self._results)))
        if not comm.is_main_process():
            return {}
        if not gathered:
            logger.warning("No image was evaluated")
            return {}
        results = list(itertools.chain.from_iterable(gathered))
        with self._watch("writing"):
            self._output_dir.mkdir(parents=True, exist_ok=True)
            path = self._output_dir / RESULTS_FILE
            logger.info("Writing %d results to %s", len(results), path)
            path.write_text(json.dumps(results))
        if "annotations" not in self._truth.dataset:
            logger.info("The data set has no annotations, so there is no AP")
            return {}
        figures = {}
        for task in TASKS:
            with self._watch(f"AP of {task}"):
                figures[task] = self._figures(results, task)
        return figures

    def _figures(self, results: list[dict], task: str) -> dict[str, float]:
        if not results:
            logger.warning("The model has found nothing: no AP for %s", task)
            return dict.fromkeys(METRICS, float("nan"))
        evaluated = run_coco_eval(self._truth, results, task, self.coco_eval, self.max_detections)
        figures = {
            name: float(100 * value) if value >= 0 else float("nan") for name, value in zip(METRICS, evaluated.stats)
        }
        logger.info("Evaluation results for %s:\n%s", task, create_small_table(figures))
        names = self._metadata.get("thing_classes") or []
        if len(names) > 1:
            # IoU thresholds, recalls, classes; all areas, the largest number of detections.
            precisions = evaluated.eval["precision"][:, :, :, 0, -1]
            by_class = {name: _mean_of_known(precisions[:, :, index]) for index, name in enumerate(names)}
            logger.info("Per-category %s AP:\n%s", task, _class_table(by_class))
            figures |= {f"AP-{name}": value for name, value in by_class.items()}
        return figures


def coco_results(instances: Instances, image_id: int, category_ids: dict[int, int] | None = None) -> list[dict]:
    """The predictions of an image as COCO's results: the very entries that COCOEvaluator makes.

    Args:
        instances: on any device; ``pred_masks`` boolean (n, height, width), RLEMasks, or absent.
        image_id: the data set's.
        category_ids: the data set's category of each class; None: the class itself.

    Raises:
        ValueError: a class that is not among them.
    """
    if len(instances) == 0:
        return []
    instances = instances.to("cpu")
    boxes = instances.pred_boxes.tensor
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()
    classes = instances.pred_classes.tolist()
    if category_ids is not None:
        if max(classes) >= len(category_ids):
            raise ValueError(
                f"A prediction has class {max(classes)}, and the data set has classes 0 to {len(category_ids) - 1}: "
                "set MODEL.SPARSE_INST.DECODER.NUM_CLASSES to their number"
            )
        classes = [category_ids[index] for index in classes]
    results = [
        {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}
        for category_id, box, score in zip(classes, boxes, instances.scores.tolist())
    ]
    if instances.has("pred_masks"):
        masks = instances.pred_masks
        encoded = masks if isinstance(masks, RLEMasks) else RLEMasks.encode(masks)
        for result, rle in zip(results, encoded.as_json()):
            result["segmentation"] = rle
    return results


def run_coco_eval(
    truth: COCO,
    results: Sequence[dict],
    task: str,
    coco_eval: str = "pycocotools",
    max_detections: int = MAX_DETECTIONS,
) -> COCOeval:
    """COCO's evaluation of results, which are left as they are.

    Args:
        truth: the annotations.
        results: see :func:`coco_results`, at least one.
        task: "bbox" or "segm".
        coco_eval: see :class:`InstanceSegmentationEvaluator`.
        max_detections: most detections of an image that count.

    Returns:
        Evaluated, accumulated and summarised: its ``stats`` are COCO's 12 figures.
    """
    # With a box, its area would count as the mask's.
    other = "segmentation" if task == "bbox" else "bbox"
    predictions = truth.loadRes([{key: value for key, value in result.items() if key != other} for result in results])
    if coco_eval == "faster-coco-eval":
        from faster_coco_eval import COCOeval_faster

        evaluation = COCOeval_faster(truth, predictions, task, print_function=print)
    else:
        # COCOeval's own summary is of 100 detections, whatever the limit.
        evaluation_class = COCOeval if max_detections == MAX_DETECTIONS else COCOevalMaxDets
        evaluation = evaluation_class(truth, predictions, task)
    evaluation.params.maxDets = [1, 10, max_detections]
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


def _mean_of_known(precisions: np.ndarray) -> float:
    """In percent; NaN where there is no object of the class."""
    known = precisions[precisions > -1]
    return float(100 * np.mean(known)) if known.size else float("nan")


def _class_table(by_class: dict[str, float]) -> str:
    cells = list(itertools.chain.from_iterable(by_class.items()))
    num_columns = min(6, len(cells))
    rows = [cells[start : start + num_columns] for start in range(0, len(cells), num_columns)]
    headers = ["class", "AP"] * (num_columns // 2)
    return tabulate(rows, headers=headers, tablefmt="pipe", floatfmt=".3f", numalign="left")

"""Compute COCO's AP of boxes and masks from encoded masks."""

import contextlib
import importlib
import io
import itertools
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.evaluation.coco_evaluation import COCOevalMaxDets
from detectron2.utils import comm
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sparseinst.checkpoint.atomic_write import write_text_atomically
from sparseinst.data.coco_json import class_info
from sparseinst.data.coco_results import to_coco_results
from sparseinst.data.json_file import read_json
from sparseinst.evaluation.mask_matches import Outcome
from sparseinst.evaluation.stage_timer import StageTimer

logger = logging.getLogger(__name__)

COCO_EVALS = ("pycocotools", "faster-coco-eval")
TASKS = ("bbox", "segm")
# COCO's own limit of detections in an image.
MAX_DETECTIONS = 100
# COCO's first six figures; small, medium and large objects have areas below 32^2, below 96^2 and above.
FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
RESULTS_FILE = "coco_instances_results.json"


def check_coco_eval(name: str) -> None:
    """Raise ValueError where a TEST.COCO_EVAL is unknown or not installed."""
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


@contextlib.contextmanager
def _utf8_json(dataset_name: str) -> Iterator[None]:
    """Let COCOEvaluator, which opens the json itself, read UTF-8 where the file has another encoding or a BOM."""
    entries = vars(MetadataCatalog.get(dataset_name))
    path = Path(entries.get("json_file", ""))
    with open(path, "rb") if path.is_file() else contextlib.nullcontext(io.BytesIO()) as file:
        is_utf8 = json.detect_encoding(file.read(4)) == "utf-8"
    if is_utf8:
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, path.name)
        copy.write_text(json.dumps(read_json(path)))
        entries["json_file"] = str(copy)
        try:
            yield
        finally:
            entries["json_file"] = str(path)


class EncodedMaskEvaluator(COCOEvaluator):
    """COCOEvaluator for encoded masks, with the same figures and json.

    ``process`` is overridden because COCOEvaluator decodes RLEMasks and encodes them again: 7.7 s for 20,600 masks,
    0.04 s here. ``evaluate`` is overridden because COCOEvaluator offers no choice of COCOeval (2.5 s for the AP of
    masks with pycocotools, 0.7 s with faster-coco-eval), prints 39 lines for 12 figures, and on a full disk damages an
    earlier json.

    The AP of "faster-coco-eval" can differ from that of pycocotools in the 15th digit, because pycocotools adds
    2.2e-16 to the divisor of a precision.

    Args:
        dataset_name: a registered data set, with a ``json_file`` in its metadata or in Detectron2's own format.
        output_dir: gets ``coco_instances_results.json``.
        max_detections: most detections of an image that count.
        coco_eval: "pycocotools" or "faster-coco-eval".
        num_classes_key: the config key that the error about an unknown class names.
        timer: counts the stages of `evaluate`.
        class_names: of the model's classes; matched with those of the data set by name. None: the same, in order.

    Attributes:
        outcome: what the figures of the masks were computed from, after `evaluate` on rank 0; None without figures.

    Raises:
        ValueError: ``coco_eval`` is unknown or not installed, or the data set has other classes.
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | Path,
        *,
        max_detections: int = MAX_DETECTIONS,
        coco_eval: str = "pycocotools",
        num_classes_key: str = "NUM_CLASSES",
        timer: StageTimer | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        check_coco_eval(coco_eval)
        with _utf8_json(dataset_name):
            super().__init__(
                dataset_name, TASKS, output_dir=str(output_dir), use_fast_impl=False, allow_cached_coco=False
            )
        self.max_detections = max_detections
        self.coco_eval = coco_eval
        self._num_classes_key = num_classes_key
        self._timer = timer or StageTimer()
        classes = self._metadata.get("thing_dataset_id_to_contiguous_id")
        self.outcome: Outcome | None = None
        # In the order of the data set's classes, and in that of the model's.
        self._dataset_ids = None if classes is None else sorted(classes, key=classes.get)
        self._category_ids = self._dataset_ids
        if class_names is not None:
            self._category_ids = class_info(dataset_name).category_ids_of(class_names, dataset_name)

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        """Collect the predictions of a batch.

        Args:
            inputs: ``image_id`` of each image.
            outputs: ``instances`` of each image, with boxes, scores, classes and masks, boolean or RLEMasks.

        Raises:
            ValueError: a class that the data set does not have, or an image without ``image_id``.
        """
        if any("image_id" not in x for x in inputs):
            raise ValueError(
                f"The images of the data set {self._metadata.name!r} have no 'image_id', by which predictions are "
                "matched: add it to the dicts that the registered function returns"
            )
        with self._timer.stage("results"):
            self._predictions += [
                to_coco_results(
                    output["instances"], x["image_id"], self._category_ids, num_classes_key=self._num_classes_key
                )
                for x, output in zip(inputs, outputs)
            ]

    def evaluate(self, img_ids: Sequence[int] | None = None) -> dict[str, dict[str, float]]:
        """Write the results of all processes, and compute the figures.

        Args:
            img_ids: the images to evaluate on; None: those of the data set.

        Returns:
            For "bbox" and "segm": AP in percent, over all classes and of each; NaN where it is undefined. Empty where
            no image was evaluated or the data set has no annotations, and on ranks other than 0.

        Raises:
            OutputError: the results cannot be written; earlier ones are unchanged.
        """
        with self._timer.stage("gathering"):
            comm.synchronize()
            gathered = list(itertools.chain.from_iterable(comm.gather(self._predictions)))
        if not comm.is_main_process():
            return {}
        if not gathered:
            logger.warning("No image was evaluated")
            return {}
        results = list(itertools.chain.from_iterable(gathered))
        with self._timer.stage("writing"):
            path = Path(self._output_dir) / RESULTS_FILE
            path.parent.mkdir(parents=True, exist_ok=True)
            logger.info("Writing %d results to %s", len(results), path)
            write_text_atomically(path, json.dumps(results))
        if not self._do_evaluation:
            logger.info("The data set has no annotations, so AP is not computed")
            return {}
        figures = {}
        names = self._distinct_names() or []
        # A data set can be a part of its json.
        img_ids = self._metadata.get("image_ids") if img_ids is None else img_ids
        for task in TASKS:
            with self._timer.stage(f"AP of {task}"):
                evaluated = None
                if results:  # loadRes refuses an empty list.
                    evaluated = run_coco_eval(
                        self._coco_api, results, task, self.coco_eval, self.max_detections, img_ids
                    )
                figures[task] = coco_figures(evaluated, names)
        # TASKS ends with the masks.
        ids = sorted(self._coco_api.getCatIds()) if self._dataset_ids is None else self._dataset_ids
        self.outcome = Outcome(self._coco_api, results, evaluated, ids, list(names or map(str, ids)), img_ids)
        return figures

    def _distinct_names(self) -> list[str] | None:
        """Return the names of the data set's classes; names that several classes have get the category id."""
        names = self._metadata.get("thing_classes")
        if names is None or len(set(names)) == len(names):
            return names
        ids = class_info(self._metadata.name).category_ids
        return [f"{name} (category {i})" if names.count(name) > 1 else name for name, i in zip(names, ids)]


def coco_figures(evaluation: COCOeval | None, class_names: Sequence[str]) -> dict[str, float]:
    """Return COCO's figures in percent: FIGURES, and with several classes "AP-name" of each; NaN where undefined.

    Args:
        evaluation: None without predictions, where the classes have no figure.
        class_names: in the order of the category ids.
    """
    if evaluation is None:
        return dict.fromkeys(FIGURES, float("nan"))
    figures = {name: _percent(value) for name, value in zip(FIGURES, evaluation.stats)}
    if len(class_names) > 1:
        # (IoUs, recalls, classes, areas, limits): all areas, the largest limit.
        precision = np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]
        for index, name in enumerate(class_names):
            defined = precision[:, :, index][precision[:, :, index] > -1]
            figures[f"AP-{name}"] = _percent(defined.mean() if defined.size else -1)
    return figures


def _percent(value: float) -> float:
    return 100 * float(value) if value >= 0 else float("nan")


def run_coco_eval(
    truth: COCO,
    results: Sequence[dict],
    task: str,
    coco_eval: str = "pycocotools",
    max_detections: int = MAX_DETECTIONS,
    img_ids: Sequence[int] | None = None,
) -> COCOeval:
    """Run COCO's evaluation; its ``stats`` are COCO's 12 figures.

    Args:
        truth: the annotations.
        results: of `to_coco_results`, at least one; not changed.
        task: "bbox" or "segm".
        coco_eval, max_detections: as those of `EncodedMaskEvaluator`.
        img_ids: the images to evaluate on; None: all.
    """
    # COCO would use the area of the box instead of the mask's.
    other = "segmentation" if task == "bbox" else "bbox"
    results = [{key: value for key, value in result.items() if key != other} for result in results]
    # Both libraries print their progress and a summary, which a table of the figures repeats.
    with contextlib.redirect_stdout(io.StringIO()):
        predictions = truth.loadRes(results)
        if coco_eval == "faster-coco-eval":
            from faster_coco_eval import COCOeval_faster

            evaluation = COCOeval_faster(truth, predictions, task, print_function=print)
        else:
            # The summary of COCOeval assumes 100 detections.
            evaluation_class = COCOeval if max_detections == MAX_DETECTIONS else COCOevalMaxDets
            evaluation = evaluation_class(truth, predictions, task)
        evaluation.params.maxDets = [1, 10, max_detections]
        if img_ids is not None:
            evaluation.params.imgIds = list(img_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation

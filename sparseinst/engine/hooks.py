"""Training hooks in addition to Detectron2's."""

import contextlib
import logging
import math
from collections.abc import Callable

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase
from detectron2.evaluation import inference_context
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.structures import Instances
from detectron2.utils import comm
from torch import nn

from sparseinst.visualization import draw_iams, draw_instances, ground_truth_instances, iam_normalization

MAX_DRAWN = 20
# The score that the best model maximizes, as "task/name".
BEST_METRIC = "segm/AP"

logger = logging.getLogger(__name__)


class EvaluationHook(HookBase):
    """Evaluate every ``period`` iterations and at the end, and save the best model as model_best.pth.

    Replaces Detectron2's EvalHook and BestCheckpointer, which forget the best score on --resume, so that a worse model
    overwrites model_best.pth, and skip an evaluation during which the run was killed. Here checkpoints hold the best
    score, and a resumed run repeats an interrupted evaluation. The hook also ends a training that no longer improves.

    Args:
        period: iterations; 0: evaluate only at the end, and save no best model.
        evaluate: returns results as Detectron2's evaluators do; called on all ranks.
        checkpointer: saves the best model.
        patience: the training ends after so many evaluations without a better score, by setting the trainer's
            ``ends_early``; 0: never.
    """

    def __init__(
        self, period: int, evaluate: Callable[[], dict], checkpointer: DetectionCheckpointer, patience: int = 0
    ) -> None:
        self._period = period
        self._evaluate = evaluate
        self._checkpointer = checkpointer
        self._best = -math.inf
        self._best_iteration = -1
        self._patience = patience
        # Evaluations since the best one, and the iteration of the last that counted.
        self._num_worse, self._last_iteration = 0, -1
        self._has_ended = False

    def before_train(self) -> None:
        """Repeat the evaluation of the last step, which may have been interrupted."""
        start = self.trainer.start_iter
        if self._period and 0 < start < self.trainer.max_iter and start % self._period == 0:
            self.trainer.storage.iter = start - 1
            self._run(start - 1)

    def after_step(self) -> None:
        """Evaluate every ``period`` steps; :meth:`after_train` evaluates after the last step."""
        done = self.trainer.iter + 1
        if self._period and done % self._period == 0 and done != self.trainer.max_iter:
            self._run(self.trainer.iter)

    def after_train(self) -> None:
        """Evaluate the final model of a training that reached its last step, unless it ended after an evaluation."""
        if self.trainer.iter >= self.trainer.max_iter and not self._has_ended:
            self._run(self.trainer.max_iter - 1)

    def state_dict(self) -> dict:
        """Return the best score so far, its iteration, the evaluations since then, and the last one's iteration."""
        return {
            "best": self._best,
            "best_iteration": self._best_iteration,
            "num_worse": self._num_worse,
            "last_iteration": self._last_iteration,
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore the values of :meth:`state_dict`."""
        self._best, self._best_iteration = state_dict["best"], state_dict["best_iteration"]
        self._num_worse = state_dict.get("num_worse", 0)
        self._last_iteration = state_dict.get("last_iteration", self._best_iteration)

    def _run(self, iteration: int) -> None:
        results = self._evaluate()
        if results:
            scores = flatten_results_dict(results)
            self.trainer.storage.put_scalars(**scores, smoothing_hint=False)
            if self._period and comm.is_main_process():
                self._keep_best(scores.get(BEST_METRIC), iteration)
        # Only rank 0 computes the score.
        self._num_worse = comm.all_gather(self._num_worse)[0]
        if self._period and 0 < self._patience <= self._num_worse:
            self._has_ended = self.trainer.ends_early = True
            logger.info(
                "No better %s in %d evaluations (TEST.PATIENCE): the training ends. model_best.pth has %.4f, of "
                "iteration %d",
                BEST_METRIC, self._num_worse, self._best, self._best_iteration,
            )  # fmt: skip

    def _keep_best(self, score: float | None, iteration: int) -> None:
        # Before the best model is saved with this hook's state.
        is_repeated, self._last_iteration = iteration == self._last_iteration, iteration
        if score is None:
            logger.warning("The evaluation has no %s, so no best model is saved", BEST_METRIC)
        elif score > self._best:  # False for NaN
            logger.info("%s %.4f is the best so far: saving model_best", BEST_METRIC, score)
            self._best, self._best_iteration, self._num_worse = float(score), iteration, 0
            self._checkpointer.save("model_best", iteration=iteration)
        else:
            # A resumed run repeats the last evaluation, and a model that has found nothing yet (AP 0) may still learn.
            self._num_worse += not is_repeated and self._best > 0
            logger.info(
                "%s %.4f; the best is %.4f, of iteration %d", BEST_METRIC, score, self._best, self._best_iteration
            )


class VisualizationHook(HookBase):
    """Draw a training image for TensorBoard every ``period`` iterations.

    Draws the ground truth, the predictions, and the activation maps of the best predictions into the event storage.

    Args:
        period: iterations.
        model: any Detectron2 model, without DistributedDataParallel. A model with ``output_as`` also returns its
            activation maps.
        image_format: channel order of the batch's images, "RGB" or "BGR".
        dataset_name: the data set with the class names.
    """

    def __init__(self, period: int, model: nn.Module, image_format: str, dataset_name: str) -> None:
        self.period = period
        self.model = model
        self.image_format = image_format
        self.metadata = MetadataCatalog.get(dataset_name)

    def after_step(self) -> None:
        """Draw the first image of the step's first batch, every ``period`` steps."""
        if (self.trainer.iter + 1) % self.period == 0:
            for name, drawing in self.draw(self.trainer.batches[0][0]).items():
                self.trainer.storage.put_image(f"train/{name}", drawing.transpose(2, 0, 1))

    def draw(self, x: dict) -> dict[str, np.ndarray]:
        """Draw one image of a training batch.

        Args:
            x: an image of the mapper, with ``image`` and ``instances``.

        Returns:
            "ground_truth", "predictions" and, where the predictions have ``pred_iams``, "activation_maps"; each
            (h, w, 3) uint8 RGB.
        """
        image = x["image"].permute(1, 2, 0).to("cpu", torch.uint8).numpy()
        if self.image_format == "BGR":
            image = np.ascontiguousarray(image[:, :, ::-1])
        predictions = self._predict({"image": x["image"]})[:MAX_DRAWN]
        drawings = {
            "ground_truth": draw_instances(image, ground_truth_instances(x["instances"]), self.metadata),
            "predictions": draw_instances(image, predictions, self.metadata),
        }
        if predictions.has("pred_iams"):
            normalization = iam_normalization(self.model)
            drawings["activation_maps"] = draw_iams(image, predictions, self.metadata, normalization=normalization)
        return drawings

    def _predict(self, x: dict) -> Instances:
        has_options = hasattr(self.model, "output_as")
        with_maps = self.model.output_as(with_maps=True) if has_options else contextlib.nullcontext()
        with with_maps, inference_context(self.model), torch.no_grad():
            return self.model([x])[0]["instances"].to("cpu")

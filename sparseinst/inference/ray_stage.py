"""Predict images as a stage of Ray Data, with one model in each actor (extra "ray").

import ray
from sparseinst.inference.prediction_lines import list_images
from sparseinst.inference.ray_stage import PredictStage

files = ray.data.read_binary_files(list_images(["photos"]), include_paths=True)
lines = files.map_batches(PredictStage, fn_constructor_args=(cfg,), concurrency=2, batch_size=8)
for row in lines.iter_rows():
    print(row["line"])
"""

import io

import numpy as np
from detectron2.config import CfgNode

from sparseinst.config import choose_device, register_models
from sparseinst.inference.pipeline import image_or_error
from sparseinst.inference.prediction_lines import check_weights_given, error_line, prediction_line
from sparseinst.inference.predictor import Predictor
from sparseinst.inference.timed_predictor import TimedPredictor


class PredictStage:
    """A callable class for ``map_batches`` of a data set that ``read_binary_files(..., include_paths=True)`` made.

    Makes the same lines as ``sparseinst predict``. This module does not import Ray.

    Args:
        cfg: with MODEL.WEIGHTS, a path that each machine can read. A MODEL.DEVICE of CUDA, the default, holds where
            Ray gives the actor a GPU; other actors run on the CPU. Masks are encoded with every MASK_FORMAT.

    Raises:
        ValueError: MODEL.WEIGHTS is empty, or as `Predictor`.
    """

    def __init__(self, cfg: CfgNode) -> None:
        check_weights_given(cfg)
        register_models(cfg)
        cfg = cfg.clone()
        cfg.defrost()
        # The driver that loaded the config may have a GPU where actors have none, or the reverse.
        choose_device(cfg)
        cfg.MODEL.OUTPUT.MASK_FORMAT = "rle"
        self._predictor = Predictor(cfg)
        self._timed = TimedPredictor(self._predictor, cfg.MODEL.OUTPUT.SCORE_THRESHOLD)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Predict one batch.

        Args:
            batch: ``bytes``, the content of image files, and ``path``, their names; both (n,).

        Returns:
            ``path`` as given, and ``line``, the JSON of `prediction_line` or `error_line` of each image; both (n,).
        """
        lines = [self._line(str(path), content) for path, content in zip(batch["path"], batch["bytes"])]
        return {"path": batch["path"], "line": np.array(lines, dtype=object)}

    def _line(self, path: str, content: bytes) -> str:
        file = io.BytesIO(content)
        # For the text of errors.
        file.name = path
        result = self._timed.predict_or_error(image_or_error(file, self._predictor.max_image_pixels))
        if isinstance(result, Exception):
            return error_line(path, result)
        return prediction_line(path, result, self._predictor.classes.category_ids)

"""Predict with a predictor, and sum up its time."""

import time

import numpy as np
import torch
from detectron2.structures import Instances

from sparseinst.data.images import ImageReadError
from sparseinst.inference.predictor import Predictor
from sparseinst.ops.mask_output import MaskMemoryError

_GRAY_IMAGE = np.full((64, 64, 3), 128, np.uint8)


class TimedPredictor:
    """Predict with a predictor, and sum up its time.

    Args:
        predictor: the predictor.
        threshold: lowest score of the instances that are returned.
    """

    def __init__(self, predictor: Predictor, threshold: float) -> None:
        self._predictor = predictor
        self._threshold = threshold
        self._num_images = 0
        self._model_seconds = 0.0
        self._start = time.perf_counter()

    def predict(self, image_rgb: np.ndarray) -> Instances:
        """Return the instances of one image, (height, width, 3) uint8, RGB, whose score is high enough."""
        start = time.perf_counter()
        instances = self._predictor([image_rgb], "RGB")[0]
        self._model_seconds += time.perf_counter() - start
        self._num_images += 1
        kept = instances.scores >= self._threshold
        # The best usually come first, and a slice does not copy their masks.
        num_kept = int(kept.sum())
        return instances[:num_kept] if kept[:num_kept].all() else instances[kept]

    def predict_or_error(self, image_rgb: np.ndarray | ImageReadError) -> Instances | Exception:
        """Return the instances as `predict`; or the error where the image is one, or the model fails on it.

        Raises:
            ValueError: the model fails on a small gray image too, so the error is not the image's.
        """
        if isinstance(image_rgb, ImageReadError):
            return image_rgb
        try:
            return self.predict(image_rgb)
        except (MaskMemoryError, torch.cuda.OutOfMemoryError) as error:
            # The frames of its traceback hold tensors.
            return error.with_traceback(None)
        # Of an allocation, or of an engine.
        except (RuntimeError, MemoryError) as error:
            failure = error.with_traceback(None)
            self._check_model()
            return failure

    def _check_model(self) -> None:
        try:
            self._predictor([_GRAY_IMAGE], "RGB")
        except (RuntimeError, MemoryError) as error:
            raise ValueError(
                f"The model fails on every image, also on a gray one of 64 x 64: {type(error).__name__}: {error}. "
                "Check MODEL.WEIGHTS, MODEL.DEVICE and the keys of RUNTIME"
            ) from error

    def speed(self, num_done: int, unit: str) -> str:
        """Return one line: the number of images or frames done since this object was made, and their rate."""
        seconds = time.perf_counter() - self._start
        speed, alone = num_done / seconds, self._num_images / max(self._model_seconds, 1e-9)
        return f"{num_done} {unit} in {seconds:.1f} s: {speed:.2f} images/s (model {alone:.2f} images/s alone)"

"""The COCO files of the demo's ``--json``, and the time that the model took."""

import json
import time
from pathlib import Path

import numpy as np
from detectron2.structures import Instances

from sparseinst.data.coco_json import ClassInfo
from sparseinst.data.coco_results import to_coco_results
from sparseinst.inference import Predictor
from sparseinst.inference.output_files import write_file


class CocoResults:
    """Collect the predictions for ``--json``."""

    def __init__(self, classes: ClassInfo) -> None:
        self._classes = classes
        self._images: list[dict] = []
        self._results: list[dict] = []

    def add(self, file_name: str, instances: Instances, **extra: int) -> None:
        """Append the instances of one image; image ids count from 1."""
        height, width = instances.image_size
        image_id = len(self._images) + 1
        self._images.append({"id": image_id, "file_name": file_name, "height": height, "width": width, **extra})
        self._results += to_coco_results(instances, image_id, self._classes.category_ids)

    def write(self, path: Path) -> None:
        """Write the results list to ``path``, and beside it STEM_images.json, a COCO data set without annotations."""
        categories = [{"id": id, "name": name} for name, id in zip(*self._classes, strict=True)]
        images = {"images": self._images, "annotations": [], "categories": categories}
        write_file(path, json.dumps(self._results).encode())
        write_file(images_file(path), json.dumps(images).encode())


def images_file(results: Path) -> Path:
    """Return the file that says which image an image id of the results is."""
    return results.with_name(f"{results.stem}_images.json")


class TimedPredictor:
    """Sum up the time of a predictor.

    Args:
        predictor: the predictor.
        threshold: least score of what is kept.
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
        # Usually the best come first; a slice does not copy their masks.
        num_kept = int(kept.sum())
        return instances[:num_kept] if kept[:num_kept].all() else instances[kept]

    def speed(self, num_done: int, unit: str) -> str:
        """Return one line: how many were done since this was made, and how fast."""
        seconds = time.perf_counter() - self._start
        speed, alone = num_done / seconds, self._num_images / max(self._model_seconds, 1e-9)
        return f"{num_done} {unit} in {seconds:.1f} s: {speed:.2f} images/s (model {alone:.2f} images/s alone)"

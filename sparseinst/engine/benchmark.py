"""How long a model takes, stage by stage, with several ways to run it side by side."""

import contextlib
import math
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn

from sparseinst.modeling.mask_resize import masks_to_boxes, resize_masks
from sparseinst.modeling.postprocessing import class_scores
from sparseinst.modeling.sparse_inst import SparseInst

STAGES = ("preprocessing", "network", "post-processing", "copy to host")
PARTS = ("backbone", "encoder", "decoder")
# Standard deviation of the logarithm of the drawn objects' areas.
AREA_SPREAD = 1.0
# Logits of drawn masks fall from this inside to minus this outside, over about a cell.
MASK_LOGIT = 6.0


class Measurement(NamedTuple):
    """Seconds of one way to run a model.

    Attributes:
        stages: (repetitions, len(STAGES)), each for a whole batch.
        parts: median seconds of the network's parts, by PARTS; empty where they do not run one by one.
        batch_size: images in a batch.
        peak_bytes: of the device's memory; on the CPU of the process so far.
    """

    stages: np.ndarray
    parts: dict[str, float]
    batch_size: int
    peak_bytes: int

    def total(self) -> np.ndarray:
        """Seconds end to end, from decoded pictures to masks on the host: (repetitions,)."""
        return self.stages.sum(1)

    def published(self) -> np.ndarray:
        """Seconds as the paper counts them, network and post-processing: (repetitions,)."""
        return self.stages[:, 1:3].sum(1)


class PlainSparseInst(nn.Module):
    """A SparseInst whose post-processing is the published one as it is written: every mask is resized whole, twice.

    What other ways are compared with.

    Args:
        model: in eval mode; everything else is its own.
    """

    def __init__(self, model: SparseInst) -> None:
        super().__init__()
        self.model = model

    @property
    def device(self) -> torch.device:
        """As SparseInst's."""
        return self.model.device

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """As SparseInst's."""
        return self.model.preprocess_image(batched_inputs)

    def network(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """As SparseInst's."""
        return self.model.network(images)

    def postprocess(
        self, outputs: dict[str, torch.Tensor], batched_inputs: list[dict], images: ImageList
    ) -> list[dict]:
        """Score, threshold, rescore, resize, threshold; then what our results add: sorted, none empty, boxes."""
        results = []
        for index, (x, image_size) in enumerate(zip(batched_inputs, images.image_sizes)):
            output_size = (x["height"], x["width"])
            scores, classes = class_scores(outputs["pred_logits"][index], outputs["pred_scores"][index, :, 0])
            kept = scores > self.model.cls_threshold
            scores, classes = scores[kept], classes[kept]
            probs = outputs["pred_masks"][index][kept].sigmoid()
            above = probs > self.model.mask_threshold
            scores = scores * (probs * above).sum((1, 2)) / (above.sum((1, 2)) + 1e-6)
            sizes = (tuple(images.tensor.shape[-2:]), image_size, output_size)
            masks = resize_masks(probs, *sizes, self.model.mask_threshold)
            scores, order = scores.sort(descending=True, stable=True)
            order = order[: self.model.max_detections][masks[order[: self.model.max_detections]].flatten(1).any(1)]
            masks = masks[order]
            instances = Instances(output_size, pred_boxes=Boxes(masks_to_boxes(masks)), pred_masks=masks)
            instances.scores, instances.pred_classes = scores[: len(order)], classes[order]
            results.append({"instances": instances})
        return results


def drawn_outputs(
    outputs: dict[str, torch.Tensor], num_detections: int, median_area: float = 0.05, seed: int = 0
) -> dict[str, torch.Tensor]:
    """What a trained model's decoder could return: so many objects with ellipses for masks, and nothing else.

    Random weights let every prediction pass and give it a mask of noise, which says little about post-processing.

    Args:
        outputs: a decoder's dict, for shapes, type and device.
        num_detections: objects in each image.
        median_area: the share of the picture that half of them are smaller than; 1: each fills the picture.
        seed: of their places and sizes.
    """
    logits, masks = outputs["pred_logits"], outputs["pred_masks"]
    num_images, num_masks, height, width = masks.shape
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    drawn = np.full((num_images, num_masks, height, width), -MASK_LOGIT, np.float32)
    for image_masks in drawn:
        for mask in image_masks[:num_detections]:
            if median_area >= 1:
                mask[:] = MASK_LOGIT
                continue
            area = height * width * median_area * math.exp(AREA_SPREAD * rng.standard_normal())
            aspect = math.exp(0.4 * rng.standard_normal())
            half_y, half_x = math.sqrt(area / math.pi * aspect), math.sqrt(area / math.pi / aspect)
            centre_y, centre_x = rng.uniform(0, height), rng.uniform(0, width)
            radius = np.hypot((y - centre_y) / half_y, (x - centre_x) / half_x)
            distance = (1 - radius) * min(half_y, half_x)
            mask[:] = np.clip(distance, -1, 1) * MASK_LOGIT
    passes = torch.full_like(logits, -20.0)
    passes[:, :num_detections, 0] = 5.0
    return {
        "pred_logits": passes,
        "pred_scores": torch.full_like(outputs["pred_scores"], 5.0),
        "pred_masks": torch.from_numpy(drawn).to(masks),
    }


def measure(
    models: dict[str, nn.Module],
    pictures: Sequence[np.ndarray],
    augmentations: Sequence[T.Augmentation | T.Transform],
    *,
    num_detections: int,
    repetitions: int,
    warmup: int = 1,
    median_area: float = 0.05,
) -> dict[str, Measurement]:
    """Run each model on one batch again and again, all of them in turn within each repetition.

    Args:
        models: by name; SparseInst or what has its four methods, in eval mode.
        pictures: the batch, each (height, width, 3) uint8.
        augmentations: what resizes a picture.
        num_detections, median_area: of the objects that post-processing gets, see :func:`drawn_outputs`.
        repetitions: that are kept.
        warmup: repetitions before.
    """
    seconds: dict[str, list[list[float]]] = {name: [] for name in models}
    scenes: dict[str, dict[str, torch.Tensor]] = {}
    peaks = dict.fromkeys(models, 0)
    for repetition in range(warmup + repetitions):
        for name, model in models.items():
            if model.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(model.device)
            times = _run_once(model, name, pictures, augmentations, num_detections, median_area, scenes)
            peaks[name] = max(peaks[name], _peak_bytes(model.device))
            if repetition >= warmup:
                seconds[name].append(times)
    return {
        name: Measurement(
            np.array(seconds[name]), _measure_parts(model, pictures, augmentations), len(pictures), peaks[name]
        )
        for name, model in models.items()
    }


def summarize(values: np.ndarray) -> dict[str, float]:
    """Median, 5th and 95th percentile in milliseconds."""
    low, median, high = 1e3 * np.percentile(values, [5, 50, 95])
    return {"median_ms": float(median), "p5_ms": float(low), "p95_ms": float(high)}


def ratio(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """How many times as long the first took as the second, repetition by repetition: median and percentiles."""
    low, median, high = np.percentile(first / second, [5, 50, 95])
    return {"median": float(median), "p5": float(low), "p95": float(high)}


def _run_once(
    model: nn.Module,
    name: str,
    pictures: Sequence[np.ndarray],
    augmentations: Sequence[T.Augmentation | T.Transform],
    num_detections: int,
    median_area: float,
    scenes: dict[str, dict[str, torch.Tensor]],
) -> list[float]:
    with torch.inference_mode():
        times = [now(model.device)]
        inputs, images = _preprocess(model, pictures, augmentations)
        times.append(now(model.device))
        outputs = model.network(images.tensor)
        times.append(now(model.device))
        if name not in scenes:
            scenes[name] = drawn_outputs(outputs, num_detections, median_area)
        del outputs
        restart = now(model.device)
        results = model.postprocess(scenes[name], inputs, images)
        times.append(now(model.device))
        for result in results:
            result["instances"].to("cpu")
        times.append(now(model.device))
    drawing = restart - times[2]
    steps = [end - start for start, end in zip(times, times[1:])]
    steps[2] -= drawing
    return steps


def _preprocess(
    model: nn.Module, pictures: Sequence[np.ndarray], augmentations: Sequence[T.Augmentation | T.Transform]
) -> tuple[list[dict], ImageList]:
    inputs = []
    for picture in pictures:
        augmentation_input = T.AugInput(picture)
        T.AugmentationList(list(augmentations))(augmentation_input)
        image = torch.from_numpy(np.ascontiguousarray(augmentation_input.image.transpose(2, 0, 1)))
        inputs.append({"image": image, "height": picture.shape[0], "width": picture.shape[1]})
    return inputs, model.preprocess_image(inputs)


def _measure_parts(
    model: nn.Module, pictures: Sequence[np.ndarray], augmentations: Sequence[T.Augmentation | T.Transform]
) -> dict[str, float]:
    """Median seconds of backbone, encoder and decoder, three times more: waiting between them costs time."""
    inner = getattr(model, "model", model)
    seconds: dict[str, list[float]] = {part: [] for part in PARTS}
    with contextlib.ExitStack() as stack, torch.inference_mode():
        for part in PARTS:
            stack.enter_context(_timed(getattr(inner, part), seconds[part], model.device))
        _, images = _preprocess(model, pictures, augmentations)
        for _ in range(3):
            model.network(images.tensor)
    return {part: float(np.median(values)) for part, values in seconds.items() if values}


@contextlib.contextmanager
def _timed(module: nn.Module, seconds: list[float], device: torch.device) -> Iterator[None]:
    starts: list[float] = []
    handles = [
        module.register_forward_pre_hook(lambda *_: starts.append(now(device))),
        module.register_forward_hook(lambda *_: seconds.append(now(device) - starts[-1])),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def now(device: torch.device) -> float:
    """Seconds of a clock, after the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Kilobytes on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

"""Time models stage by stage, several settings in turn."""

import contextlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.structures import ImageList
from torch import nn

from sparseinst.benchmarks.settings import Measurement
from sparseinst.data.augmentations import model_input
from sparseinst.evaluation.stage_timer import StageTimer, now, peak_bytes

PREPROCESSING, NETWORK, POSTPROCESSING, COPY = "preprocessing", "network", "post-processing", "copy to host"
INFERENCE_STAGES = (PREPROCESSING, NETWORK, POSTPROCESSING, COPY)
AS_PUBLISHED, END_TO_END = "as published", "end to end"
# Median share of the image that a drawn object covers.
MEDIAN_AREA = 0.05
# Runs of the network whose parts are timed.
_PART_RUNS = 3


def measure_models(
    models: dict[str, nn.Module],
    images: Sequence[np.ndarray],
    augmentations: Mapping[str, T.AugmentationList],
    *,
    num_detections: int,
    repetitions: int,
    warmup: int = 1,
    median_area: float = MEDIAN_AREA,
) -> dict[str, Measurement]:
    """Run each model on one batch repeatedly, all models in turn within each repetition.

    Args:
        models: by name, in eval mode, each an InstanceSegmenter or an optimized copy of one.
        images: the batch, each (height, width, 3) uint8.
        augmentations: by name; each resizes an image for its model.
        num_detections, median_area: of the objects that post-processing gets, see `InstanceSegmenter.example_outputs`.
        repetitions: counted repetitions.
        warmup: repetitions before them.

    Returns:
        Measurements by name, with INFERENCE_STAGES, "as published" and "end to end". ``more`` has the median
        milliseconds of the network's parts as "parts_ms", empty where the network runs as one program.

    Raises:
        ValueError: a model cannot have so many objects.
    """
    timers = {name: StageTimer(model.device) for name, model in models.items()}
    peaks = dict.fromkeys(models, 0)
    examples = {}
    with torch.inference_mode():
        for name, model in models.items():
            examples[name] = draw_examples(model, images, augmentations[name], [num_detections], median_area)
        for _ in range(warmup + repetitions):
            for name, model in models.items():
                if model.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(model.device)
                time_stages(model, images, augmentations[name], examples[name], timers[name])
                peaks[name] = max(peaks[name], peak_bytes(model.device))
    measurements = {}
    for name, model in models.items():
        stages = {stage: np.array(timers[name].seconds[stage][warmup:]) for stage in INFERENCE_STAGES}
        stages |= protocols(stages)
        more = {"parts_ms": _time_parts(model, _preprocess(model, images, augmentations[name])[1])}
        measurements[name] = Measurement(stages, stages[END_TO_END], len(images), peaks[name], more)
    return measurements


def batched_inputs(images: Sequence[np.ndarray], augmentation: T.AugmentationList) -> list[dict]:
    """Return images as a dataset mapper gives them to a model: resized, with the size that results have."""
    return [model_input(image, augmentation) for image in images]


def draw_examples(
    model: nn.Module,
    images: Sequence[np.ndarray],
    augmentation: T.AugmentationList,
    counts: Sequence[int],
    median_area: float = MEDIAN_AREA,
) -> list[dict[str, torch.Tensor]]:
    """Run the network once, and return `InstanceSegmenter.example_outputs` for each count of objects."""
    outputs = model.network(_preprocess(model, images, augmentation)[1].tensor)
    return [model.example_outputs(outputs, count, median_area) for count in counts]


def time_stages(
    model: nn.Module,
    images: Sequence[np.ndarray],
    augmentation: T.AugmentationList,
    examples: Sequence[dict[str, torch.Tensor]],
    timer: StageTimer,
) -> None:
    """Run and time a batch stage by stage; post-processing and copy once for each of the examples."""
    with timer.stage(PREPROCESSING):
        inputs, padded = _preprocess(model, images, augmentation)
    with timer.stage(NETWORK):
        outputs = model.network(padded.tensor)
    del outputs
    for example in examples:
        with timer.stage(POSTPROCESSING):
            results = model.postprocess(example, inputs, padded)
        with timer.stage(COPY):
            for result in results:
                result["instances"].to("cpu")


def protocols(stages: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the seconds of both protocols from those of the stages.

    The paper's time excludes preprocessing and the copy to the host. A model whose network makes the masks as well has
    no post-processing of its own.
    """
    return {AS_PUBLISHED: stages[NETWORK] + stages.get(POSTPROCESSING, 0.0), END_TO_END: sum(stages.values())}


def _preprocess(
    model: nn.Module, images: Sequence[np.ndarray], augmentation: T.AugmentationList
) -> tuple[list[dict], ImageList]:
    inputs = batched_inputs(images, augmentation)
    return inputs, model.preprocess(inputs)


def _time_parts(model: nn.Module, padded: ImageList) -> dict[str, float]:
    """Return the median milliseconds of the outermost modules that the network calls.

    Synchronizing between the parts costs time, so these runs are not counted among the repetitions.
    """
    names = {module: name.rpartition(".")[2] for name, module in model.named_modules() if name}
    seconds: dict[str, list[float]] = {}
    running: list[float] = []

    def start(module: nn.Module, *_) -> None:
        # Inner modules are not timed, so that nothing is synchronized inside a part.
        running.append(0.0 if running else now(model.device))

    def stop(module: nn.Module, *_) -> None:
        since = running.pop()
        if not running:
            seconds.setdefault(names[module], []).append(now(model.device) - since)

    with contextlib.ExitStack() as stack, torch.inference_mode():
        for module in names:
            stack.callback(module.register_forward_pre_hook(start).remove)
            stack.callback(module.register_forward_hook(stop).remove)
        for _ in range(_PART_RUNS):
            model.network(padded.tensor)
    return {name: 1e3 * float(np.median(values)) for name, values in seconds.items()}


class DrawnObjects(nn.Module):
    """Run the network of a model, then postprocess drawn objects instead of its outputs.

    Args:
        model: in eval mode.
        num_detections: objects in each image.
    """

    def __init__(self, model: nn.Module, num_detections: int) -> None:
        super().__init__()
        self.model = model
        self.num_detections = num_detections
        self._examples: dict[tuple, dict[str, torch.Tensor]] = {}

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """Return ``num_detections`` drawn objects for each image."""
        images = self.model.preprocess(batched_inputs)
        outputs = self.model.network(images.tensor)
        key = (self.num_detections, images.tensor.shape)
        if key not in self._examples:
            self._examples[key] = self.model.example_outputs(outputs, self.num_detections, MEDIAN_AREA)
        return self.model.postprocess(self._examples[key], batched_inputs, images)

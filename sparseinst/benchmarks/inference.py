"""Time of a model stage by stage, with several settings side by side."""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.structures import ImageList
from torch import nn

from sparseinst.benchmarks.settings import Measurement, resident_bytes
from sparseinst.evaluation.stage_timer import now

STAGES = ("preprocessing", "network", "post-processing", "copy to host")
# Runs of the network whose parts are timed.
_PART_RUNS = 3


def measure(
    models: dict[str, nn.Module],
    images: Sequence[np.ndarray],
    augmentations: Sequence[T.Augmentation | T.Transform],
    *,
    num_detections: int,
    repetitions: int,
    warmup: int = 1,
    median_area: float = 0.05,
) -> dict[str, Measurement]:
    """Run each model on one batch repeatedly, all models in turn within each repetition.

    Args:
        models: by name, in eval mode, each an InstanceSegmenter or an optimized copy of one.
        images: the batch, each (height, width, 3) uint8.
        augmentations: resize an image.
        num_detections, median_area: of the objects that post-processing gets, see :func:`example_outputs`.
        repetitions: counted ones.
        warmup: repetitions before them.

    Returns:
        Measurements by name, with STAGES, "as published" and "end to end". ``more`` has the median milliseconds of the
        network's parts as "parts_ms", empty where the network runs as one program.

    Raises:
        ValueError: a model cannot have so many objects.
    """
    augmentation = T.AugmentationList(list(augmentations))
    seconds: dict[str, list[list[float]]] = {name: [] for name in models}
    peaks = dict.fromkeys(models, 0)
    examples = {}
    for name, model in models.items():
        with torch.inference_mode():
            _, padded = _preprocess(model, images, augmentation)
            examples[name] = example_outputs(model, model.network(padded.tensor), num_detections, median_area)
    for repetition in range(warmup + repetitions):
        for name, model in models.items():
            if model.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(model.device)
            stages = _run_once(model, images, augmentation, examples[name])
            peaks[name] = max(peaks[name], _peak_bytes(model.device))
            if repetition >= warmup:
                seconds[name].append(stages)
    measurements = {}
    for name, model in models.items():
        by_stage = np.array(seconds[name]).T
        # As the paper counts time, without preprocessing and the copy; from decoded images to masks on the host.
        stages = dict(zip(STAGES, by_stage)) | {"as published": by_stage[1:3].sum(0), "end to end": by_stage.sum(0)}
        more = {"parts_ms": _time_parts(model, images, augmentation)}
        measurements[name] = Measurement(stages, stages["end to end"], len(images), peaks[name], more)
    return measurements


def example_outputs(
    model: nn.Module, outputs: dict[str, torch.Tensor], num_detections: int, median_area: float = 0.05
) -> dict[str, torch.Tensor]:
    """Return outputs with drawn objects, the same ones in each call; see `InstanceSegmenter.example_outputs`.

    Args:
        model: any.
        outputs: of its network.
        num_detections: objects in each image.
        median_area: median of their areas over the image's; from 1 on each fills the image.
    """
    return model.example_outputs(outputs, num_detections, median_area, torch.Generator().manual_seed(0))


def _run_once(
    model: nn.Module, images: Sequence[np.ndarray], augmentation: T.AugmentationList, example: dict[str, torch.Tensor]
) -> list[float]:
    """Return the seconds of each stage. Each begins after the device has finished the one before."""
    with torch.inference_mode():
        times = [now(model.device)]
        inputs, padded = _preprocess(model, images, augmentation)
        times.append(now(model.device))
        outputs = model.network(padded.tensor)
        times.append(now(model.device))
        del outputs
        results = model.postprocess(example, inputs, padded)
        times.append(now(model.device))
        for result in results:
            result["instances"].to("cpu")
        times.append(now(model.device))
    return np.diff(times).tolist()


def _preprocess(
    model: nn.Module, images: Sequence[np.ndarray], augmentation: T.AugmentationList
) -> tuple[list[dict], ImageList]:
    inputs = batched_inputs(images, augmentation)
    return inputs, model.preprocess(inputs)


def batched_inputs(images: Sequence[np.ndarray], augmentation: T.AugmentationList) -> list[dict]:
    """Return images as a dataset mapper gives them to a model: resized, with the size that results have."""
    inputs = []
    for image in images:
        augmentation_input = T.AugInput(image)
        augmentation(augmentation_input)
        resized = torch.from_numpy(np.ascontiguousarray(augmentation_input.image.transpose(2, 0, 1)))
        inputs.append({"image": resized, "height": image.shape[0], "width": image.shape[1]})
    return inputs


def _time_parts(model: nn.Module, images: Sequence[np.ndarray], augmentation: T.AugmentationList) -> dict[str, float]:
    """Return the median milliseconds of the outermost modules that the network calls, in runs of their own.

    Synchronising between the parts costs time, so that these runs are not counted among the repetitions.
    """
    seconds: dict[str, list[float]] = {}
    running: list[tuple[str, float]] = []
    with contextlib.ExitStack() as stack, torch.inference_mode():
        for name, module in model.named_modules():
            if name:
                stack.enter_context(_timed(module, name.rpartition(".")[2], seconds, running, model.device))
        _, padded = _preprocess(model, images, augmentation)
        for _ in range(_PART_RUNS):
            model.network(padded.tensor)
    return {name: 1e3 * float(np.median(values)) for name, values in seconds.items()}


@contextlib.contextmanager
def _timed(
    module: nn.Module,
    name: str,
    seconds: dict[str, list[float]],
    running: list[tuple[str, float]],
    device: torch.device,
) -> Iterator[None]:
    def start(*_) -> None:
        # Inside another module nothing is timed, so that nothing is synchronised.
        running.append((name, 0.0 if running else now(device)))

    def stop(*_) -> None:
        _, since = running.pop()
        if not running:
            seconds.setdefault(name, []).append(now(device) - since)

    handles = [module.register_forward_pre_hook(start), module.register_forward_hook(stop)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _peak_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_bytes()

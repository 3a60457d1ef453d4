"""Evaluation with Detectron2's evaluators, and how long each stage of it takes."""

import contextlib
import json
import logging
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, LVISEvaluator, inference_on_dataset, print_csv_format
from detectron2.utils import comm
from tabulate import tabulate
from torch import nn

from sparseinst import config
from sparseinst.data.loader import build_test_loader
from sparseinst.engine.coco_evaluation import MAX_DETECTIONS, InstanceSegmentationEvaluator
from sparseinst.engine.processes import share_buffers
from sparseinst.engine.stopwatch import Stopwatch
from sparseinst.modeling.sparse_inst import SparseInst

logger = logging.getLogger(__name__)

STAGES = ("preprocessing", "network", "post-processing")
WARMUP_BATCHES = 5


def build_evaluator(cfg: CfgNode, dataset_name: str, stopwatch: Stopwatch | None = None) -> DatasetEvaluator:
    """The evaluator for a data set's ``evaluator_type``: ours for COCO's, or Detectron2's for LVIS's.

    LVIS's own code stops at its AP step on numpy 1.24 and newer; the results file is written before.

    Args:
        cfg: OUTPUT_DIR, TEST.COCO_EVAL and MAX_DETECTIONS are read.
        dataset_name: a registered one.
        stopwatch: counts the parts of the evaluator's own work, where it has some.

    Raises:
        ValueError: another type.
    """
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type", None)
    output_dir = str(Path(cfg.OUTPUT_DIR) / "inference")
    _, max_detections = config.max_detections(cfg) or (None, MAX_DETECTIONS)
    if evaluator_type == "coco":
        return InstanceSegmentationEvaluator(
            dataset_name,
            output_dir,
            # A smaller limit would only rename COCO's columns.
            max_detections=max(max_detections, MAX_DETECTIONS),
            coco_eval=cfg.TEST.COCO_EVAL,
            stopwatch=stopwatch,
        )
    if evaluator_type == "lvis":
        limit = max_detections if max_detections > MAX_DETECTIONS else None
        return LVISEvaluator(dataset_name, output_dir=output_dir, max_dets_per_image=limit)
    raise ValueError(
        f'The data set {dataset_name!r} has evaluator_type {evaluator_type!r}; "coco" and "lvis" are known. '
        "Set it in MetadataCatalog, or evaluate with Detectron2's inference_on_dataset and an evaluator of your own"
    )


def evaluate(cfg: CfgNode, model: nn.Module, stopwatch: Stopwatch | None = None) -> dict:
    """Evaluate on every data set of DATASETS.TEST, and log where the time went.

    Args:
        cfg: DATASETS.TEST, OUTPUT_DIR, DATALOADER, INPUT and TEST are read.
        model: a Detectron2 model; on several ranks its buffers become those of rank 0. A SparseInst gives encoded masks
            meanwhile, since that is what the results need.
        stopwatch: counts the parts: of this process, as the line in the log.

    Returns:
        The evaluator's results; by data set where there are several. Empty on ranks other than 0.
    """
    share_buffers(model)
    watch = stopwatch or Stopwatch()
    results = {}
    for dataset_name in cfg.DATASETS.TEST:
        with watch("preparing"):
            loader = build_test_loader(cfg, dataset_name)
            evaluator = build_evaluator(cfg, dataset_name, watch)
        is_ours = isinstance(evaluator, InstanceSegmentationEvaluator)
        with watch("the rest"), encoded_masks(model) if is_ours else contextlib.nullcontext():
            watched = _WatchedModel(model, watch), _WatchedLoader(loader, watch)
            results[dataset_name] = inference_on_dataset(*watched, evaluator) or {}
        if comm.is_main_process():
            logger.info("Results on %s, to be copied:", dataset_name)
            print_csv_format(results[dataset_name])
    logger.info("Evaluation took %s", watch)
    return results[cfg.DATASETS.TEST[0]] if len(results) == 1 else results


@contextlib.contextmanager
def encoded_masks(model: nn.Module) -> Iterator[None]:
    """Have every SparseInst in a model encode its masks."""
    before = {module: module.output_mask_format for module in model.modules() if isinstance(module, SparseInst)}
    try:
        for module in before:
            module.output_mask_format = "rle"
        yield
    finally:
        for module, mask_format in before.items():
            module.output_mask_format = mask_format


class _WatchedModel(nn.Module):
    """A model, with its time counted as "model"."""

    def __init__(self, model: nn.Module, watch: Stopwatch) -> None:
        super().__init__()
        self.model = model
        self._watch = watch

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        with self._watch("model"):
            return self.model(batched_inputs)


class _WatchedLoader:
    """A loader, with the time that is spent waiting for its batches counted as "waiting for data"."""

    def __init__(self, loader: Iterable[list[dict]], watch: Stopwatch) -> None:
        self._loader = loader
        self._watch = watch

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[list[dict]]:
        batches = iter(self._loader)
        while True:
            with self._watch("waiting for data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


class StageTimer(nn.Module):
    """Runs a SparseInst stage by stage, and keeps the time of each.

    Args:
        model: its ``preprocess_image``, ``network`` and ``postprocess`` are called, as its forward does.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.seconds: list[tuple[float, ...]] = []
        self.batch_sizes: list[int] = []

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """What ``model(batched_inputs)`` returns in eval mode."""
        times = [self._now()]
        images = self.model.preprocess_image(batched_inputs)
        times.append(self._now())
        outputs = self.model.network(images.tensor)
        times.append(self._now())
        results = self.model.postprocess(outputs, batched_inputs, images)
        times.append(self._now())
        self.seconds.append(tuple(end - start for start, end in zip(times, times[1:])))
        self.batch_sizes.append(len(batched_inputs))
        return results

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()

    def summary(self) -> dict:
        """Median and 95th percentile of each stage and of their sum, without each process's first batches.

        To be called in all processes at once.

        Returns:
            ``stages``: name to ``median_ms`` and ``p95_ms`` per batch; ``images_per_second``, from the sum of all
            stages, of all processes together; ``peak_memory_mb`` of the device (on the CPU of the process), the
            largest; ``batch_size``, ``num_batches``, ``warmup_batches``, ``num_processes``, ``device``, ``precision``.
            Empty where no process has timed anything, and on ranks other than 0.
        """
        device = self.model.device
        if device.type == "cuda":
            device_name = torch.cuda.get_device_name(device)
            peak_bytes = torch.cuda.max_memory_allocated(device)
        else:
            device_name = f"cpu, {torch.get_num_threads()} threads"
            # Kilobytes on Linux, bytes on macOS.
            unit = 1 if sys.platform == "darwin" else 1024
            peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        gathered = comm.gather((self.seconds, self.batch_sizes, peak_bytes))
        # There may be fewer images than processes.
        used = [(seconds, batch_sizes) for seconds, batch_sizes, _ in gathered if seconds]
        if not used:
            return {}
        warmups = [min(WARMUP_BATCHES, len(seconds) - 1) for seconds, _ in used]
        stage_seconds = np.concatenate([seconds[warmup:] for (seconds, _), warmup in zip(used, warmups)])
        columns = {**dict(zip(STAGES, stage_seconds.T)), "total": stage_seconds.sum(1)}
        return {
            "stages": {
                name: {
                    "median_ms": 1e3 * float(np.median(values)),
                    "p95_ms": 1e3 * float(np.percentile(values, 95)),
                }
                for name, values in columns.items()
            },
            "images_per_second": sum(
                sum(batch_sizes[warmup:]) / float(np.sum(seconds[warmup:]))
                for (seconds, batch_sizes), warmup in zip(used, warmups)
            ),
            "peak_memory_mb": max(peak_bytes for _, _, peak_bytes in gathered) / 2**20,
            "batch_size": max(max(batch_sizes) for _, batch_sizes in used),
            "num_batches": len(stage_seconds),
            "warmup_batches": sum(warmups),
            "num_processes": len(gathered),
            "device": device_name,
            "precision": str(next(self.model.parameters()).dtype).removeprefix("torch."),
        }


def speed_table(speed: dict) -> str:
    """A summary of :class:`StageTimer` as text."""
    rows = [[name, values["median_ms"], values["p95_ms"]] for name, values in speed["stages"].items()]
    table = tabulate(rows, headers=["stage", "median ms", "95th percentile ms"], floatfmt=".2f", tablefmt="github")
    processes = f"{speed['num_processes']} processes, each on " if speed["num_processes"] > 1 else ""
    return (
        f"{table}\n{speed['images_per_second']:.2f} images/s, peak memory {speed['peak_memory_mb']:.0f} MB, batch size "
        f"{speed['batch_size']}, {processes}{speed['device']}, {speed['precision']}; {speed['num_batches']} batches "
        f"after {speed['warmup_batches']} of warm-up; reading and resizing the images is not included"
    )


def evaluate_and_time(cfg: CfgNode, model: nn.Module) -> dict:
    """:func:`evaluate`, with the speed of each stage logged, and both written to OUTPUT_DIR/results.json."""
    timer, watch = StageTimer(model), Stopwatch()
    results = evaluate(cfg, timer, watch)
    speed = timer.summary()
    if speed:
        logger.info("Speed:\n%s", speed_table(speed))
        path = Path(cfg.OUTPUT_DIR) / "results.json"
        path.write_text(json.dumps({"results": results, "speed": speed, "seconds": watch.seconds}, indent=2) + "\n")
        logger.info("Results and speed are in %s", path)
    return results

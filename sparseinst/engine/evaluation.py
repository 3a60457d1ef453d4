"""Evaluation with Detectron2's evaluators, and how long each stage of it takes."""

import json
import logging
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    LVISEvaluator,
    inference_on_dataset,
    print_csv_format,
)
from detectron2.utils import comm
from tabulate import tabulate
from torch import nn

from sparseinst.data.loader import build_test_loader

logger = logging.getLogger(__name__)

STAGES = ("preprocessing", "network", "post-processing")
WARMUP_BATCHES = 5


def build_evaluator(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    """The evaluator for a data set's ``evaluator_type``: COCO's, or LVIS's.

    LVIS's own code stops at its AP step on numpy 1.24 and newer; the results file is written before.

    Raises:
        ValueError: another type.
    """
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type", None)
    output_dir = str(Path(cfg.OUTPUT_DIR) / "inference")
    max_detections = cfg.MODEL.SPARSE_INST.MAX_DETECTIONS
    # COCO's own limit is 100; a smaller one would only rename its columns.
    limit = max_detections if max_detections > 100 else None
    if evaluator_type == "coco":
        # Named, since it would look for masks in the predictions, and a model may find nothing.
        tasks = ("bbox", "segm")
        return COCOEvaluator(dataset_name, tasks=tasks, output_dir=output_dir, max_dets_per_image=limit)
    if evaluator_type == "lvis":
        return LVISEvaluator(dataset_name, output_dir=output_dir, max_dets_per_image=limit)
    raise ValueError(
        f'The data set {dataset_name!r} has evaluator_type {evaluator_type!r}; "coco" and "lvis" are known. '
        "Set it in MetadataCatalog, or evaluate with Detectron2's inference_on_dataset and an evaluator of your own"
    )


def evaluate(cfg: CfgNode, model: nn.Module) -> dict:
    """Evaluate on every data set of DATASETS.TEST.

    Args:
        cfg: DATASETS.TEST, OUTPUT_DIR, DATALOADER and INPUT are read.
        model: a Detectron2 model.

    Returns:
        The evaluator's results; by data set where there are several. Empty on ranks other than 0.
    """
    results = {}
    for dataset_name in cfg.DATASETS.TEST:
        loader = build_test_loader(cfg, dataset_name)
        results[dataset_name] = inference_on_dataset(model, loader, build_evaluator(cfg, dataset_name)) or {}
        if comm.is_main_process():
            logger.info("Results on %s, to be copied:", dataset_name)
            print_csv_format(results[dataset_name])
    return results[cfg.DATASETS.TEST[0]] if len(results) == 1 else results


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
        """Median and 95th percentile of each stage and of their sum, without the first batches.

        Returns:
            ``stages``: name to ``median_ms`` and ``p95_ms`` per batch; ``images_per_second``, from the sum of all
            stages; ``peak_memory_mb`` of the device (on the CPU of the process); ``batch_size``, ``num_batches``,
            ``warmup_batches``, ``device``, ``precision``.
        """
        warmup = min(WARMUP_BATCHES, len(self.seconds) - 1)
        stage_seconds = np.array(self.seconds[warmup:])
        columns = {**dict(zip(STAGES, stage_seconds.T)), "total": stage_seconds.sum(1)}
        device = self.model.device
        if device.type == "cuda":
            device_name = torch.cuda.get_device_name(device)
            peak_bytes = torch.cuda.max_memory_allocated(device)
        else:
            device_name = f"cpu, {torch.get_num_threads()} threads"
            # Kilobytes on Linux, bytes on macOS.
            unit = 1 if sys.platform == "darwin" else 1024
            peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return {
            "stages": {
                name: {
                    "median_ms": 1e3 * float(np.median(values)),
                    "p95_ms": 1e3 * float(np.percentile(values, 95)),
                }
                for name, values in columns.items()
            },
            "images_per_second": sum(self.batch_sizes[warmup:]) / float(stage_seconds.sum()),
            "peak_memory_mb": peak_bytes / 2**20,
            "batch_size": max(self.batch_sizes),
            "num_batches": len(stage_seconds),
            "warmup_batches": warmup,
            "device": device_name,
            "precision": str(next(self.model.parameters()).dtype).removeprefix("torch."),
        }


def speed_table(speed: dict) -> str:
    """A summary of :class:`StageTimer` as text."""
    rows = [[name, values["median_ms"], values["p95_ms"]] for name, values in speed["stages"].items()]
    table = tabulate(rows, headers=["stage", "median ms", "95th percentile ms"], floatfmt=".2f", tablefmt="github")
    return (
        f"{table}\n{speed['images_per_second']:.2f} images/s, peak memory {speed['peak_memory_mb']:.0f} MB, batch size "
        f"{speed['batch_size']}, {speed['device']}, {speed['precision']}; {speed['num_batches']} batches after "
        f"{speed['warmup_batches']} of warm-up; reading and resizing the images is not included"
    )


def evaluate_and_time(cfg: CfgNode, model: nn.Module) -> dict:
    """:func:`evaluate`, with the speed of each stage logged, and both written to OUTPUT_DIR/results.json."""
    timer = StageTimer(model)
    results = evaluate(cfg, timer)
    if comm.is_main_process() and timer.seconds:
        speed = timer.summary()
        logger.info("Speed:\n%s", speed_table(speed))
        path = Path(cfg.OUTPUT_DIR) / "results.json"
        path.write_text(json.dumps({"results": results, "speed": speed}, indent=2) + "\n")
        logger.info("Results and speed are in %s", path)
    return results

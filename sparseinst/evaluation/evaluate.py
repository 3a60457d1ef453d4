"""Evaluate with Detectron2's evaluators, and time each stage."""

import contextlib
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, LVISEvaluator, inference_on_dataset
from detectron2.utils import comm
from tabulate import tabulate
from torch import nn

from sparseinst import config
from sparseinst.checkpoint.atomic_write import write_text_atomically
from sparseinst.data.coco_json import class_info
from sparseinst.data.loader import build_test_loader
from sparseinst.evaluation.coco_evaluation import MAX_DETECTIONS, EncodedMaskEvaluator
from sparseinst.evaluation.mask_matches import Outcome
from sparseinst.evaluation.stage_timer import StageTimer, peak_bytes

logger = logging.getLogger(__name__)

WARMUP_BATCHES = 5


def evaluate(cfg: CfgNode, model: nn.Module, report: Callable[[str, Outcome], object] | None = None) -> dict:
    """Evaluate on every data set of DATASETS.TEST, and log AP, speed and the time of each stage.

    Results, speed and seconds are written to OUTPUT_DIR/results.json. All processes must call it together.

    Args:
        cfg: DATASETS.TEST, OUTPUT_DIR, DATALOADER, INPUT and TEST are read.
        model: any Detectron2 model; its mode is restored. On several ranks its buffers become those of rank 0. With a
            method ``output_as`` it returns encoded masks to the evaluator of COCO's format. With ``network`` and
            ``postprocess`` its stages are timed one by one. Its ``precision`` is reported, else that of its parameters.
        report: called on rank 0 with the name of each data set in COCO's format and the inputs of its AP.

    Returns:
        The evaluator's results; by data set if there are several. Empty on ranks other than 0.

    Raises:
        ValueError: the ``evaluator_type`` of a data set has no evaluator.
        OutputError: a file cannot be written; earlier files are unchanged.
    """
    _share_buffers(model)
    timer = StageTimer()
    timed_model = _TimedModel(model, timer)
    results = {}
    for dataset_name in cfg.DATASETS.TEST:
        with timer.stage("preparing"):
            loader = _TimedLoader(build_test_loader(cfg, dataset_name), timer)
            evaluator = build_evaluator(cfg, dataset_name, timer, getattr(model, "class_names", None))
        with timer.stage("the rest"), _encoded_masks(model, evaluator):
            results[dataset_name] = inference_on_dataset(timed_model, loader, evaluator) or {}
        if comm.is_main_process():
            if results[dataset_name]:
                limit = getattr(evaluator, "max_detections", MAX_DETECTIONS)
                of_best = f", of the best {limit} detections of an image (COCO's AP: {MAX_DETECTIONS})"
                note = of_best * (limit > MAX_DETECTIONS)
                table = figures_table(results[dataset_name])
                logger.info("Results on %s, in percent%s:\n%s", dataset_name, note, table)
            outcome = getattr(evaluator, "outcome", None)
            if report is not None and outcome is not None:
                with timer.stage("plots"):
                    report(dataset_name, outcome)
    logger.info("Evaluation took %s", timer)
    if len(results) == 1:
        results = results[cfg.DATASETS.TEST[0]]
    speed = speed_summary(timed_model.stages, timed_model.batch_sizes)
    if speed:
        # The parameters do not tell the precision of an engine or of a file.
        precision = getattr(model, "precision", None)
        dtype = str(_parameter(model).dtype).removeprefix("torch.")
        speed["precision"] = precision if isinstance(precision, str) else dtype
        logger.info("Speed:\n%s", speed_table(speed))
        path = Path(cfg.OUTPUT_DIR) / "results.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"results": results, "speed": speed, "seconds": timer.totals()}
        write_text_atomically(path, json.dumps(content, indent=2) + "\n")
        logger.info("Results and speed are in %s", path)
    return results


def build_evaluator(
    cfg: CfgNode, dataset_name: str, timer: StageTimer | None = None, class_names: Sequence[str] | None = None
) -> DatasetEvaluator:
    """Return the evaluator for a data set's ``evaluator_type``: `EncodedMaskEvaluator` for COCO, Detectron2's for LVIS.

    The code of LVIS fails at its AP step on numpy 1.24 and newer, after it has written the results file.

    Args:
        cfg: OUTPUT_DIR, TEST.COCO_EVAL and the most detections are read.
        dataset_name: a registered data set.
        timer: counts the stages of `EncodedMaskEvaluator`.
        class_names: of the model, in the order of its class logits; None where they are unknown. Where the data set has
            the same classes in another order, predictions are matched by name.

    Raises:
        ValueError: another type, or other classes.
    """
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type", None)
    output_dir = str(Path(cfg.OUTPUT_DIR) / "inference")
    # A smaller limit would only rename COCO's columns.
    _, most = config.max_detections(cfg) or (None, MAX_DETECTIONS)
    max_detections = max(most, MAX_DETECTIONS)
    if evaluator_type == "coco":
        return EncodedMaskEvaluator(
            dataset_name,
            output_dir,
            max_detections=max_detections,
            coco_eval=cfg.TEST.COCO_EVAL,
            num_classes_key=(config.num_classes(cfg) or ("NUM_CLASSES", None))[0],
            timer=timer,
            class_names=class_names,
        )
    if evaluator_type == "lvis":
        if class_names is not None and list(class_names) != class_info(dataset_name).names:
            raise ValueError(
                f"The classes of {dataset_name!r} are not those of the model in the model's order, which LVIS needs"
            )
        limit = max_detections if max_detections > MAX_DETECTIONS else None
        return LVISEvaluator(dataset_name, output_dir=output_dir, max_dets_per_image=limit)
    raise ValueError(
        f'The data set {dataset_name!r} has evaluator_type {evaluator_type!r}; "coco" and "lvis" are known. '
        f'Set it by MetadataCatalog.get({dataset_name!r}).evaluator_type = "coco", set DATASETS.TEST () to train '
        "without an evaluation, or evaluate with Detectron2's inference_on_dataset and an evaluator of your own"
    )


def figures_table(results: Mapping[str, Mapping[str, float]]) -> str:
    """Return the figures of each task as a table, and the AP of each class, "AP-name", as another one below it.

    Args:
        results: task to its figures, as Detectron2's evaluators return them.
    """
    # Masks first.
    tasks = sorted(results, reverse=True)
    classes = list(dict.fromkeys(name for task in tasks for name in results[task] if "-" in name))
    names = list(dict.fromkeys(name for task in tasks for name in results[task] if "-" not in name))
    rows = [[task, *(results[task].get(name) for name in names)] for task in tasks]
    tables = [tabulate(rows, headers=["", *names], floatfmt=".1f", tablefmt="github")]
    if classes:
        cells = [[name.partition("-")[2], *(results[task].get(name) for task in tasks)] for name in classes]
        length = -(-len(cells) // 3)
        num_columns = -(-len(cells) // length)
        cells += [[""] * (1 + len(tasks))] * (length * num_columns - len(cells))
        rows = [list(itertools.chain(*cells[index::length])) for index in range(length)]
        headers = ["AP by class", *tasks] * num_columns
        tables.append(tabulate(rows, headers=headers, floatfmt=".1f", tablefmt="github"))
    return "\n\n".join(tables)


def speed_summary(stages: StageTimer, batch_sizes: list[int]) -> dict:
    """Return median and 95th percentile of each stage and of their sum, without the warm-up batches of each process.

    All processes must call it together.

    Args:
        stages: of this process, one figure for each batch.
        batch_sizes: images in each batch.

    Returns:
        ``stages``: name to ``median_ms`` and ``p95_ms`` per batch; ``images_per_second`` of all processes together;
        ``peak_memory_mb``, the largest of all devices (on the CPU of all processes); ``batch_size``, ``num_batches``,
        ``warmup_batches``, ``num_processes``, ``device``. Empty where no batch was timed, and on ranks other than 0.
    """
    gathered = comm.gather((stages.seconds, batch_sizes, peak_bytes(stages.device)))
    # A process can have no images.
    used = [(seconds, np.array(sizes)) for seconds, sizes, _ in gathered if sizes]
    if not used:
        return {}
    names = list(used[0][0])
    warmups = [min(WARMUP_BATCHES, len(sizes) - 1) for _, sizes in used]
    # (stages, batches) for each process.
    tables = [np.array([seconds[name] for name in names])[:, first:] for (seconds, _), first in zip(used, warmups)]
    columns = np.concatenate(tables, axis=1)
    is_cuda = stages.device.type == "cuda"
    return {
        "stages": {
            name: {"median_ms": 1e3 * float(np.median(values)), "p95_ms": 1e3 * float(np.percentile(values, 95))}
            for name, values in zip([*names, "total"], [*columns, columns.sum(0)])
        },
        "images_per_second": float(
            sum(sizes[first:].sum() / table.sum() for (_, sizes), first, table in zip(used, warmups, tables))
        ),
        "peak_memory_mb": max(peak for _, _, peak in gathered) / 2**20,
        "batch_size": int(max(sizes.max() for _, sizes in used)),
        "num_batches": columns.shape[1],
        "warmup_batches": sum(warmups),
        "num_processes": len(gathered),
        "device": torch.cuda.get_device_name(stages.device) if is_cuda else f"cpu, {torch.get_num_threads()} threads",
    }


def speed_table(speed: dict) -> str:
    """Return `speed_summary` and the network's ``precision`` as text."""
    rows = [[name, values["median_ms"], values["p95_ms"]] for name, values in speed["stages"].items()]
    table = tabulate(rows, headers=["stage", "median ms", "95th percentile ms"], floatfmt=".2f", tablefmt="github")
    processes = f"{speed['num_processes']} processes, each on " if speed["num_processes"] > 1 else ""
    return (
        f"{table}\n{speed['images_per_second']:.2f} images/s, peak memory {speed['peak_memory_mb']:.0f} MB, batch size "
        f"{speed['batch_size']}, {processes}{speed['device']}, {speed['precision']}; {speed['num_batches']} batches "
        f"after {speed['warmup_batches']} of warm-up; without reading and resizing the images"
    )


def _parameter(model: nn.Module) -> torch.Tensor:
    """Return the first parameter, for its device and type; a constant where the model has none."""
    return next(model.parameters(), torch.zeros(()))


def _share_buffers(model: nn.Module) -> None:
    # The running statistics of batch norms differ between ranks after training; checkpoints hold those of rank 0.
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


def _encoded_masks(model: nn.Module, evaluator: DatasetEvaluator) -> contextlib.AbstractContextManager:
    if isinstance(evaluator, EncodedMaskEvaluator) and hasattr(model, "output_as"):
        return model.output_as(mask_format="rle")
    return contextlib.nullcontext()


class _TimedModel(nn.Module):
    """Run a model, stage by stage if it has stages, and count the time of each batch."""

    def __init__(self, model: nn.Module, timer: StageTimer) -> None:
        super().__init__()
        self.model = model
        # inference_on_dataset restores this mode.
        self.training = model.training
        self.stages = StageTimer(_parameter(model).device)
        self.batch_sizes: list[int] = []
        self._timer = timer

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        self.batch_sizes.append(len(batched_inputs))
        with self._timer.stage("model"):
            if not (hasattr(self.model, "network") and hasattr(self.model, "postprocess")):
                with self.stages.stage("model"):
                    return self.model(batched_inputs)
            with self.stages.stage("preprocessing"):
                images = self.model.preprocess(batched_inputs)
            with self.stages.stage("network"):
                outputs = self.model.network(images.tensor)
            with self.stages.stage("post-processing"):
                return self.model.postprocess(outputs, batched_inputs, images)


class _TimedLoader:
    """Iterate over a loader, and count the time spent waiting for its batches."""

    def __init__(self, loader: Iterable[list[dict]], timer: StageTimer) -> None:
        self._loader = loader
        self._timer = timer

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[list[dict]]:
        batches = iter(self._loader)
        while True:
            with self._timer.stage("waiting for data"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

"""Measure time, memory and data wait of the trainer's own steps with PyTorch's profiler."""

import concurrent.futures
import contextlib
import itertools
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage
from torch.profiler import ProfilerActivity, profile, record_function

from sparseinst.benchmarks.settings import Measurement, check_segmenter
from sparseinst.config import register_models
from sparseinst.data.coco_json import register_user_datasets
from sparseinst.data.loader import TrainLoader
from sparseinst.engine.trainer import Trainer
from sparseinst.evaluation.stage_timer import now, peak_bytes, resident_bytes

DATA = "waiting for data"
COPY = "copy and normalize"
NETWORK = "network, forward"
TARGETS = "ground truth"
LOSSES = "losses"
BACKWARD = "backward"
OPTIMIZER = "optimizer"
REST = "unscale, clip, guard, log"
TRAINING_STAGES = (DATA, COPY, NETWORK, TARGETS, LOSSES, BACKWARD, REST, OPTIMIZER)
# PyTorch records this name for each step of an optimizer.
_OPTIMIZER_STEP = "Optimizer.step#"
# Batches that are mapped beforehand where reading is not timed.
_CACHED_BATCHES = 2
# Profiled steps; profiling slows them down, so they are not counted among the repetitions.
_PROFILED_STEPS = 3


class SteppingTrainer:
    """Take the steps of a trainer one by one.

    Args:
        cfg: of a training, see `as_training`.
        folder: for the output of the trainer.
        caches_batches: map a few batches beforehand and use them in turn, so that no step waits for data.

    Raises:
        ValueError: the model does not run in stages, or the trainer refuses the config.
    """

    def __init__(self, cfg: CfgNode, folder: str, caches_batches: bool) -> None:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.OUTPUT_DIR = folder
        self.trainer = Trainer(cfg)
        check_segmenter(self.trainer.model)
        self.batch_size = cfg.SOLVER.IMS_PER_BATCH
        if caches_batches:
            self.trainer.data_loader = _CachedLoader(self.trainer.data_loader)
        self._storage = EventStorage()

    def step(self) -> float:
        """Take a step, and return its seconds."""
        self.trainer.iter = self._storage.iter
        self.trainer.max_iter = self.trainer.iter + 1
        with self._storage:
            start = now(self.trainer.device)
            self.trainer.run_step()
            end = now(self.trainer.device)
            self._storage.step()
        return end - start

    def profile_steps(self, num_steps: int) -> dict[str, np.ndarray]:
        """Take steps in the profiler, synchronized after each stage, and return seconds (num_steps,) by stage."""
        self._record_stages()
        stages = []
        for _ in range(num_steps):
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                total = self.step()
            found = dict.fromkeys(TRAINING_STAGES, 0.0)
            for event in profiler.key_averages():
                name = OPTIMIZER if event.key.startswith(_OPTIMIZER_STEP) else event.key
                if name in found:
                    found[name] += event.cpu_time_total / 1e6
            found[DATA] = self._storage.latest()["data_time"][0]
            found[REST] = total - sum(found.values())
            stages.append([found[stage] for stage in TRAINING_STAGES])
        return dict(zip(TRAINING_STAGES, np.array(stages).T))

    def _record_stages(self) -> None:
        """Name the stages of model and trainer for the profiler."""
        model, device, backward = self.trainer.model, self.trainer.device, contextlib.ExitStack()

        def recorded(function: Callable, stage: str) -> Callable:
            def run(*args, **kwargs):
                with record_function(stage):
                    result = function(*args, **kwargs)
                    now(device)
                return result

            return run

        def end_backward() -> None:
            now(device)
            backward.close()

        forward = model.forward

        def run_forward(*args):
            # Ends the backward pass of the previous part, with SOLVER.ACCUMULATE_STEPS.
            end_backward()
            losses = forward(*args)
            backward.enter_context(record_function(BACKWARD))
            return losses

        model.preprocess = recorded(model.preprocess, COPY)
        # With SOLVER.COMPILE this is the compiled network.
        model.set_training_network(recorded(model.training_network, NETWORK))
        model.prepare_targets = recorded(model.prepare_targets, TARGETS)
        model.losses = recorded(model.losses, LOSSES)
        model.forward = run_forward
        self.trainer.register_hooks([_AfterBackward(end_backward)])


class _AfterBackward(HookBase):
    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def after_backward(self) -> None:
        self._function()


class _CachedLoader:
    """Repeat the first batches of a trainer's loader."""

    def __init__(self, loader: TrainLoader) -> None:
        self.seed = loader.seed
        self._batches = list(itertools.islice(loader.batches(num_workers=0), _CACHED_BATCHES))

    def batches(self, start: int = 0) -> Iterator[list[dict]]:
        return itertools.cycle(self._batches)


def as_training(cfg: CfgNode) -> CfgNode:
    """Return a copy of a config that trains on its own data from random weights, without evaluation and trackers."""
    cfg = cfg.clone()
    cfg.defrost()
    register_user_datasets(cfg, ("TRAIN",))
    cfg.MODEL.WEIGHTS, cfg.DATASETS.TEST, cfg.VIS_PERIOD, cfg.TRACKERS = "", (), 0, []
    cfg.SEED = max(cfg.SEED, 0)
    return cfg


def measure_trainings(
    configs: Mapping[str, CfgNode], *, caches_batches: bool, repetitions: int, warmup: int = 1, with_memory: bool = True
) -> dict[str, Measurement]:
    """Take training steps of each config repeatedly, all configs in turn within each repetition.

    Args:
        configs: by name; of trainings, see `as_training`.
        caches_batches: see `SteppingTrainer`.
        repetitions: counted repetitions.
        warmup: repetitions before them; a config with SOLVER.COMPILE is compiled in the first one.
        with_memory: measure memory too, in a process for each config.

    Returns:
        Measurements by name, with "step", and TRAINING_STAGES from further steps in the profiler. Memory is as in
        `peak_bytes_of_steps`. ``more`` has "share_of_all_but_the_network", the share of the step outside the network's
        forward pass and the backward pass.

    Raises:
        ValueError: a config cannot be trained, or there is too little memory.
    """
    peaks = {name: peak_bytes_of_steps(cfg, caches_batches) if with_memory else None for name, cfg in configs.items()}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: SteppingTrainer(cfg, folder, caches_batches) for name, cfg in configs.items()}
        seconds = [[trainer.step() for trainer in trainers.values()] for _ in range(warmup + repetitions)]
        totals = np.array(seconds[warmup:]).T
        measurements = {}
        for (name, trainer), total in zip(trainers.items(), totals):
            stages = trainer.profile_steps(_PROFILED_STEPS)
            outside = 1 - (stages[NETWORK] + stages[BACKWARD]) / sum(stages.values())
            more = {"share_of_all_but_the_network": float(np.median(outside))}
            measurements[name] = Measurement({**stages, "step": total}, total, trainer.batch_size, peaks[name], more)
        return measurements


def peak_bytes_of_steps(cfg: CfgNode, caches_batches: bool) -> int:
    """Return the peak memory of a training's first two steps: weights, gradients, optimizer, activations.

    The second step is the first one with the state of the optimizer. The steps run in a new process. On CUDA the figure
    is the peak of PyTorch's allocator; on the CPU the largest resident set, minus that before the model, with a C
    library that returns freed memory at once.

    Raises:
        ValueError: the process was killed, usually for its memory.
    """
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    before = {name: os.environ[name] for name in settings if name in os.environ}
    os.environ.update(settings)
    try:
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(_peak_here, cfg, caches_batches, torch.get_num_threads()).result()
    except concurrent.futures.BrokenExecutor as error:
        raise ValueError("The process whose memory was measured was killed, probably because memory ran out") from error
    finally:
        for name in settings:
            del os.environ[name]
        os.environ.update(before)


def _peak_here(cfg: CfgNode, caches_batches: bool, num_threads: int) -> int:
    torch.set_num_threads(num_threads)
    register_models(cfg)
    cfg = as_training(cfg)
    device = torch.device(cfg.MODEL.DEVICE)
    before = 0 if device.type == "cuda" else resident_bytes("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        trainer = SteppingTrainer(cfg, folder, caches_batches)
        trainer.step()
        trainer.step()
    return peak_bytes(device) - before

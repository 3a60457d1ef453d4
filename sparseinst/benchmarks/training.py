"""Measure time, memory and data wait of the trainer's own steps."""

import concurrent.futures
import contextlib
import itertools
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from torch import nn

from sparseinst.benchmarks.settings import Measurement, check_segmenter
from sparseinst.config import meta_architecture, register_models
from sparseinst.data.coco_json import register_user_datasets
from sparseinst.data.loader import TrainLoader
from sparseinst.engine.trainer import Trainer
from sparseinst.evaluation.stage_timer import StageTimer, now, peak_bytes, resident_bytes
from sparseinst.modeling.meta_arch import InstanceSegmenter

DATA = "waiting for data"
COPY = "copy and normalize"
NETWORK = "network, forward"
TARGETS = "ground truth"
LOSSES = "losses"
BACKWARD = "backward"
OPTIMIZER = "optimizer"
REST = "unscale, clip, guard, log"
TRAINING_STAGES = (DATA, COPY, NETWORK, TARGETS, LOSSES, BACKWARD, REST, OPTIMIZER)
# Batches that are mapped beforehand where reading is not timed.
_CACHED_BATCHES = 2
# Steps that are timed by stage; synchronizing slows them down, so they are not counted among the repetitions.
_STAGED_STEPS = 3


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
        self.trainer = _StagedTrainer(cfg)
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

    def time_stages(self, num_steps: int) -> dict[str, np.ndarray]:
        """Take steps, synchronized before and after each stage, and return seconds (num_steps,) by stage."""
        stages = []
        for _ in range(num_steps):
            with self.trainer.timed() as timer:
                total = self.step()
            found = dict.fromkeys(TRAINING_STAGES, 0.0) | timer.totals()
            found[DATA] = self._storage.latest()["data_time"][0]
            found[REST] = total - sum(found.values())
            stages.append(list(found.values()))
        return dict(zip(TRAINING_STAGES, np.array(stages).T))


class _StagedTrainer(Trainer):
    """A trainer whose steps can be timed stage by stage."""

    def __init__(self, cfg: CfgNode) -> None:
        self._timer: StageTimer | None = None
        super().__init__(cfg)
        # With SOLVER.COMPILE this is the compiled network.
        self.model.set_training_network(self._timed(self.model.training_network, NETWORK))
        stages = contextlib.ExitStack()

        def start_optimizer(*_) -> None:
            stages.enter_context(self._stage(OPTIMIZER))

        self.optimizer.register_step_pre_hook(start_optimizer)
        self.optimizer.register_step_post_hook(lambda *_: stages.close())

    @contextlib.contextmanager
    def timed(self) -> Iterator[StageTimer]:
        """Time the stages of the steps in a with statement."""
        self._timer = StageTimer(self.device)
        try:
            yield self._timer
        finally:
            self._timer = None

    def build_model(self, cfg: CfgNode) -> nn.Module:
        """Build the model as an instance of a subclass whose methods are timed."""
        model_class = meta_architecture(cfg)
        if not issubclass(model_class, InstanceSegmenter):
            check_segmenter(super().build_model(cfg))
        stages = {"preprocess": COPY, "prepare_targets": TARGETS, "losses": LOSSES}
        methods = {name: self._timed(getattr(model_class, name), stage) for name, stage in stages.items()}
        return type(model_class.__name__, (model_class,), methods)(cfg).to(cfg.MODEL.DEVICE)

    def backward(self, loss: torch.Tensor) -> None:
        """Time the backward pass."""
        with self._stage(BACKWARD):
            super().backward(loss)

    def _timed(self, function: Callable, stage: str) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self._stage(stage):
                return function(*args, **kwargs)

        return run

    def _stage(self, name: str) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self._timer is None else self._timer.stage(name)


class _CachedLoader:
    """Repeat the first batches of a trainer's loader."""

    def __init__(self, loader: TrainLoader) -> None:
        self.seed = loader.seed
        self._batches = list(itertools.islice(loader.batches(num_workers=0), _CACHED_BATCHES))

    def batches(self, start: int = 0) -> Iterator[list[dict]]:
        return itertools.cycle(self._batches)


def as_training(cfg: CfgNode) -> CfgNode:
    """Return a copy of a config that trains on its own data from random weights, without evaluation and trackers.

    Keys that follow the data in a training, such as the number of levels, keep the config's values.
    """
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
        Measurements by name, with "step", and TRAINING_STAGES of further steps, which are synchronized before and after
        each stage. Memory is as in `peak_bytes_of_steps`. ``more`` has "share_of_all_but_the_network", the share of the
        step outside the network's forward pass and the backward pass.

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
            stages = trainer.time_stages(_STAGED_STEPS)
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

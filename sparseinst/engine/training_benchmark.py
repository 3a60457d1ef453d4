"""How long a training step takes, stage by stage, and how much memory: the trainer's own steps, watched.

A step is divided without a gap: at every moment one stage runs, and the stages' seconds are the step's. The backward
pass is the criterion's until the first gradient reaches an output of the network, and the network's from then on:
autograd computes the gradients of what was computed last first.
"""

import concurrent.futures
import contextlib
import itertools
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage
from torch import nn

from sparseinst.data.coco_json import register_user_datasets
from sparseinst.data.loader import TrainLoader
from sparseinst.engine.benchmark import now
from sparseinst.engine.trainer import Trainer

DATA = "waiting for data"
COPY = "copy and normalise"
NETWORK_FORWARD = "network, forward"
TARGETS = "ground truth"
MATCHER = "matcher"
CRITERION = "rest of the criterion"
CRITERION_BACKWARD = "criterion, backward"
NETWORK_BACKWARD = "network, backward"
LOOP = "unscale, clip, guard, log"
OPTIMIZER = "optimizer"
STAGES = (
    DATA, COPY, NETWORK_FORWARD, TARGETS, MATCHER, CRITERION, CRITERION_BACKWARD, NETWORK_BACKWARD, LOOP, OPTIMIZER
)  # fmt: skip
NETWORK_STAGES = (NETWORK_FORWARD, NETWORK_BACKWARD)

# Batches that are mapped before, and taken in turn where reading is not to be timed.
_KEPT_BATCHES = 2
# Steps in the process whose memory is measured: the second one has the optimizer's state and all gradients.
_MEMORY_STEPS = 2


class Measurement(NamedTuple):
    """Seconds of one way to train.

    Attributes:
        stages: (repetitions, len(STAGES)), each for a whole step.
        totals: (repetitions,), of steps that nothing but their end was waited for in; on a CPU the stages' sums.
        batch_size: images in a step.
        peak_bytes: of the device's memory, above that of the process before it has a model; None: not measured.
    """

    stages: np.ndarray
    totals: np.ndarray
    batch_size: int
    peak_bytes: int | None

    def outside_network(self) -> np.ndarray:
        """Share of everything but the network's own forward and backward pass: (repetitions,)."""
        network = self.stages[:, [STAGES.index(stage) for stage in NETWORK_STAGES]].sum(1)
        return 1 - network / self.stages.sum(1)


class StageClock:
    """Divides time among stages.

    Args:
        device: what is waited for before a look at the clock.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_on = True
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.stage = LOOP
        self._since = 0.0

    def start(self) -> None:
        """Begin a step."""
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.stage, self._since = LOOP, now(self.device)

    def switch(self, stage: str) -> None:
        """End the present stage, and begin another one."""
        if self.is_on:
            time_now = now(self.device)
            self.seconds[self.stage] += time_now - self._since
            self._since = time_now
        self.stage = stage

    @contextlib.contextmanager
    def within(self, stage: str) -> Iterator[None]:
        """A stage inside the present one, which goes on afterwards."""
        outer = self.stage
        self.switch(stage)
        yield
        self.switch(outer)

    def timed(self, function: Callable, stage: str) -> Callable:
        """The function, as a stage."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.within(stage):
                return function(*args, **kwargs)

        return run


class TimedTrainer:
    """A trainer whose steps are taken one by one.

    Args:
        cfg: of a training, see :func:`as_training_of`; its data sets are registered.
        keeps_batches: map a few batches beforehand and take them in turn, so that no step waits for data.
    """

    def __init__(self, cfg: CfgNode, keeps_batches: bool) -> None:
        self.trainer = trainer = Trainer(cfg)
        self.batch_size = cfg.SOLVER.IMS_PER_BATCH
        self.clock = clock = StageClock(trainer.device)
        self._storage = EventStorage()
        self._steps_done = 0
        trainer.data_loader = _TimedLoader(trainer.data_loader, clock, keeps_batches)
        model, scaler = trainer.model, trainer.grad_scaler
        plain_network, scale = clock.timed(model.network, NETWORK_FORWARD), scaler.scale

        def network(images: torch.Tensor) -> dict[str, torch.Tensor]:
            outputs = plain_network(images)
            for output in outputs.values():
                if output.requires_grad:
                    output.register_hook(lambda _: self._reach_network())
            return outputs

        def scale_and_begin_backward(loss: torch.Tensor) -> torch.Tensor:
            scaled = scale(loss)
            clock.switch(CRITERION_BACKWARD)
            return scaled

        model.preprocess_image = clock.timed(model.preprocess_image, COPY)
        model.network = network
        model.prepare_targets = clock.timed(model.prepare_targets, TARGETS)
        _time_calls(model, "criterion", clock, CRITERION)
        if hasattr(model.criterion, "matcher"):
            _time_calls(model.criterion, "matcher", clock, MATCHER)
        scaler.scale = scale_and_begin_backward
        trainer.register_hooks([_EndOfBackward(clock)])
        # After the clipping, which comes before them.
        trainer.optimizer.register_step_pre_hook(lambda *_: clock.switch(OPTIMIZER))
        trainer.optimizer.register_step_post_hook(lambda *_: clock.switch(LOOP))

    def step(self, with_stages: bool = True) -> list[float]:
        """Take a step.

        Args:
            with_stages: wait for the device at the end of each stage; otherwise at the end of the step.

        Returns:
            Seconds, by STAGES; otherwise those of the step alone.
        """
        self.trainer.iter, self.trainer.max_iter = self._steps_done, self._steps_done + 1
        self.clock.is_on = with_stages
        with self._storage:
            self.clock.start()
            start = now(self.clock.device)
            self.trainer.run_step()
            self.clock.switch(LOOP)
            end = now(self.clock.device)
            self._storage.step()
        self._steps_done += 1
        return list(self.clock.seconds.values()) if with_stages else [end - start]

    def _reach_network(self) -> None:
        if self.clock.stage == CRITERION_BACKWARD:
            self.clock.switch(NETWORK_BACKWARD)


class _EndOfBackward(HookBase):
    def __init__(self, clock: StageClock) -> None:
        self.clock = clock

    def after_backward(self) -> None:
        self.clock.switch(LOOP)


class _TimedLoader:
    """What a trainer asks of its loader.

    Args:
        loader: the trainer's own.
        clock: gets the time that is waited.
        keeps_batches: see :class:`TimedTrainer`.
    """

    def __init__(self, loader: TrainLoader, clock: StageClock, keeps_batches: bool) -> None:
        self.seed = loader.seed
        self._loader, self._clock = loader, clock
        first = itertools.islice(loader.batches(num_workers=0), _KEPT_BATCHES if keeps_batches else 0)
        self._kept = list(first)

    def batches(self, start: int) -> Iterator[list[dict]]:
        batches = itertools.cycle(self._kept) if self._kept else self._loader.batches(start)
        while True:
            with self._clock.within(DATA):
                batch = next(batches)
            yield batch


def _time_calls(owner: nn.Module, name: str, clock: StageClock, stage: str) -> None:
    called = getattr(owner, name)
    if isinstance(called, nn.Module):
        called.forward = clock.timed(called.forward, stage)
    else:
        setattr(owner, name, clock.timed(called, stage))


def as_training_of(cfg: CfgNode, json_file: Path, images_dir: Path, size: tuple[int, int] | None = None) -> CfgNode:
    """A copy of a config that trains on such data, from random weights, and evaluates nothing.

    Args:
        cfg: any.
        json_file, images_dir: COCO's; registered here.
        size: (height, width) that images have after they were resized; None: as the config has it.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATASETS.TRAIN_JSON, cfg.DATASETS.TRAIN_IMAGES = str(json_file), str(images_dir)
    if size is not None:
        cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (min(size),), max(size)
        cfg.INPUT.CROP.ENABLED = False
    return as_training(cfg)


def as_training(cfg: CfgNode) -> CfgNode:
    """A copy of a config that trains on its own data, from random weights, and evaluates nothing."""
    cfg = cfg.clone()
    cfg.defrost()
    register_user_datasets(cfg, ("TRAIN",))
    cfg.MODEL.WEIGHTS, cfg.DATASETS.TEST, cfg.VIS_PERIOD = "", (), 0
    cfg.SEED = max(cfg.SEED, 0)
    return cfg


def measure(
    configs: Mapping[str, CfgNode], *, keeps_batches: bool, repetitions: int, warmup: int = 1, with_memory: bool = True
) -> dict[str, Measurement]:
    """Take training steps of each config again and again, all of them in turn within each repetition.

    Args:
        configs: by name; of trainings, see :func:`as_training`.
        keeps_batches: see :class:`TimedTrainer`.
        repetitions: that are kept.
        warmup: repetitions before; a config with SOLVER.COMPILE is compiled in the first one.
        with_memory: measure memory too, in a process for each config.
    """
    peaks = {name: peak_bytes(cfg, keeps_batches) if with_memory else None for name, cfg in configs.items()}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: _timed_trainer(cfg, folder, keeps_batches) for name, cfg in configs.items()}
        stages: dict[str, list[list[float]]] = {name: [] for name in trainers}
        totals: dict[str, list[float]] = {name: [] for name in trainers}
        for repetition in range(warmup + repetitions):
            for name, trainer in trainers.items():
                seconds = trainer.step()
                # A GPU loses time where it is waited for.
                total = sum(seconds) if trainer.clock.device.type == "cpu" else trainer.step(with_stages=False)[0]
                if repetition >= warmup:
                    stages[name].append(seconds)
                    totals[name].append(total)
    return {
        name: Measurement(np.array(stages[name]), np.array(totals[name]), trainer.batch_size, peaks[name])
        for name, trainer in trainers.items()
    }


def _timed_trainer(cfg: CfgNode, folder: str, keeps_batches: bool) -> TimedTrainer:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = folder
    return TimedTrainer(cfg, keeps_batches)


def peak_bytes(cfg: CfgNode, keeps_batches: bool) -> int:
    """Most memory that a training takes in its second step: weights, their gradients, optimizer, activations, batch.

    In a process of its own. On CUDA it is what PyTorch's allocator had given out at once; on the CPU the process's
    largest resident set above that before it had a model. There the C library is told to give each large piece of
    memory back as soon as it is freed, so that what is resident is what is used.

    Raises:
        ValueError: the process was ended, mostly for its memory.
    """
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(_peak_here, cfg, keeps_batches, torch.get_num_threads()).result()
    except concurrent.futures.BrokenExecutor as error:
        raise ValueError("The process whose memory was measured was ended: there may be too little memory") from error
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _peak_here(cfg: CfgNode, keeps_batches: bool, num_threads: int) -> int:
    torch.set_num_threads(num_threads)
    cfg = as_training(cfg)
    is_cuda = cfg.MODEL.DEVICE.startswith("cuda")
    before = 0 if is_cuda else _resident_bytes("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        trainer = _timed_trainer(cfg, folder, keeps_batches)
        for _ in range(_MEMORY_STEPS):
            trainer.step(with_stages=False)
    return torch.cuda.max_memory_allocated() if is_cuda else _resident_bytes("VmHWM") - before


def _resident_bytes(entry: str) -> int:
    """The process's resident set: "VmRSS" now, "VmHWM" at most so far; without Linux's files at most so far."""
    status = Path("/proc/self/status")
    if status.is_file():
        # getrusage would count what the process had before it became another program: a copy of its parent.
        (line,) = (line for line in status.read_text().splitlines() if line.startswith(f"{entry}:"))
        return int(line.split()[1]) * 1024
    # Kilobytes, but for macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def images_per_second(loader: TrainLoader, num_images: int) -> float:
    """How many images one process reads, decodes and augments in a second, as a worker of the loader does.

    Args:
        loader: of a trainer.
        num_images: that are timed, at least; the first batch is not.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        batches = loader.batches(num_workers=0)
        next(batches)
        start, count = time.perf_counter(), 0
        while count < num_images:
            count += len(next(batches))
        return count / (time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)

"""The training loop: mixed precision on any device, gradient accumulation, and resuming bit for bit."""

import contextlib
import functools
import itertools
import logging
import signal
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer, create_ddp_model, hooks
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from fvcore.nn.precise_bn import get_bn_modules
from torch.nn.parallel import DistributedDataParallel

from sparseinst import config
from sparseinst.checkpoint import checkpointer_from_config
from sparseinst.data.coco_json import class_info
from sparseinst.data.loader import WorkerDiedError, build_train_loader, derive_seed, seed_cpu
from sparseinst.engine.checkpointed import CheckpointedClasses, CheckpointedKeys
from sparseinst.engine.console import only_in_log_file
from sparseinst.engine.errors import RUN_ERRORS
from sparseinst.engine.finite import FiniteGuard
from sparseinst.engine.hooks import EvaluationHook, VisualizationHook
from sparseinst.engine.host_memory import keep_freed_memory
from sparseinst.engine.interruption import SaveOnSignal, SignalWatch, TrainingInterrupted
from sparseinst.engine.metrics_file import build_writers
from sparseinst.engine.optimizer import (
    build_optimizer,
    clip_total_norm,
    parameter_names,
    resumed_state,
    scale_to_processes,
)
from sparseinst.engine.output_folder import check_free_space
from sparseinst.engine.progress import Progress
from sparseinst.engine.recompute import prepare_for_training
from sparseinst.engine.report import CurvesHook, evaluation_report
from sparseinst.engine.trackers import build_trackers, check_trackers
from sparseinst.evaluation import check_evaluation, check_test_config, evaluate
from sparseinst.modeling.meta_arch import InstanceSegmenter, TrainingPart

logger = logging.getLogger(__name__)

AMP_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class Trainer(SimpleTrainer):
    """Train the model of a config in one or several processes.

    Replaces Detectron2's DefaultTrainer, whose resumed runs differ: it draws the data anew, and saves neither the order
    of the data nor the random state. Here a step is a function of the config, the seed, the weights and the iteration.
    On the CPU, 71 runs that were killed and resumed ended with the same checkpoints bit for bit as the run that was not
    (docs/reliability.md).

    Args:
        cfg: the whole config; its data sets are registered.

    Raises:
        ValueError: an invalid key.
    """

    def __init__(self, cfg: CfgNode) -> None:
        cfg = scale_to_processes(cfg, comm.get_world_size())
        check_config(cfg)
        classes = class_info(cfg.DATASETS.TRAIN[0])
        check_evaluation(cfg, classes.names)
        model = self.build_model(cfg)
        if cfg.SOLVER.ACCUMULATE_STEPS > 1 and not isinstance(model, InstanceSegmenter):
            raise ValueError(
                f"SOLVER.ACCUMULATE_STEPS is {cfg.SOLVER.ACCUMULATE_STEPS}, and MODEL.META_ARCHITECTURE "
                f"{cfg.MODEL.META_ARCHITECTURE} is not an InstanceSegmenter, so the losses of its parts cannot be "
                "divided by the counts of all: set it to 1"
            )
        for warning in model.training_warnings(cfg) if isinstance(model, InstanceSegmenter) else ():
            logger.warning(warning)
        solver = cfg.SOLVER
        prepare_for_training(
            model, channels_last=solver.CHANNELS_LAST, compile=solver.COMPILE, recompute=solver.RECOMPUTE
        )
        with only_in_log_file("sparseinst"):
            logger.info("Model:\n%s", model)
        self.device = torch.device(cfg.MODEL.DEVICE)
        if self.device.type == "cpu":
            keep_freed_memory()
        optimizer = build_optimizer(cfg, model)
        if 0 < solver.MAX_ITER <= solver.WARMUP_ITERS:
            logger.warning(
                "SOLVER.WARMUP_ITERS %d is not below SOLVER.MAX_ITER %d, so the learning rate never reaches BASE_LR: "
                "set it to a few hundredths of MAX_ITER", solver.WARMUP_ITERS, solver.MAX_ITER,
            )  # fmt: skip
        self._scheduler = build_lr_scheduler(cfg, optimizer)
        self._parameter_names = parameter_names(optimizer, model)
        ddp_model = create_ddp_model(
            model, broadcast_buffers=False, device_ids=[comm.get_local_rank()] if self.device.type == "cuda" else None
        )
        super().__init__(ddp_model, build_train_loader(cfg, _data_seed(cfg)), optimizer)
        self.cfg = cfg
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.accumulate_steps = cfg.SOLVER.ACCUMULATE_STEPS
        amp = cfg.SOLVER.AMP
        self.amp_dtype = AMP_DTYPES[amp.DTYPE] if amp.ENABLED else None
        self.grad_scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype == torch.float16)
        self.batches: list[list[dict]] = []
        self.results: dict = {}
        self._loader_iter = None

        self.checkpointer = checkpointer_from_config(
            cfg,
            model,
            cfg.OUTPUT_DIR,
            is_training=True,
            trainer=weakref.proxy(self),
            classes=CheckpointedClasses(classes),
            model_keys=CheckpointedKeys(config.declared_values(cfg)),
        )
        self.finite_guard = FiniteGuard(cfg, model, self.grad_scaler, self.checkpointer)
        # Steps of the whole training, resumed or not.
        self.steps_done = 0
        # Set by a signal on any rank; SaveOnSignal ends the training after the step.
        self.stop_requested = False
        # Set by EvaluationHook on all ranks: the model no longer improves.
        self.ends_early = False
        self._periodic_checkpointer: hooks.PeriodicCheckpointer | None = None
        self._signals = SignalWatch()
        self._save_on_signal = SaveOnSignal(self._signals, self.checkpointer)
        self.register_hooks([*self.build_hooks(model), self._save_on_signal])

    def build_model(self, cfg: CfgNode) -> torch.nn.Module:
        """Build the model of the config."""
        return build_model(cfg)

    def build_hooks(self, model: torch.nn.Module) -> list:
        """Return Detectron2's hooks in Detectron2's order, and the hooks for evaluation and VIS_PERIOD."""
        cfg = self.cfg
        iterations_per_epoch = self.data_loader.num_images / cfg.SOLVER.IMS_PER_BATCH
        result = [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=self._scheduler),
        ]
        if comm.is_main_process():
            result.append(Progress(model, iterations_per_epoch))
        if cfg.TEST.PRECISE_BN.ENABLED and get_bn_modules(model):
            # Before the checkpointer, so that it saves the statistics.
            batches = self._precise_bn_batches()
            result.append(hooks.PreciseBN(cfg.TEST.EVAL_PERIOD, model, batches, cfg.TEST.PRECISE_BN.NUM_ITER))
        if comm.is_main_process():
            checkpoints = hooks.PeriodicCheckpointer(
                self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD, max_to_keep=cfg.SOLVER.MAX_CHECKPOINTS or None
            )
            self._periodic_checkpointer = checkpoints
            result.append(checkpoints)
        if cfg.DATASETS.TEST:
            # After the checkpointer, because an evaluation takes long and may fail.
            result.append(
                EvaluationHook(
                    cfg.TEST.EVAL_PERIOD, lambda: self.evaluate(model), self.checkpointer, patience=cfg.TEST.PATIENCE
                )
            )
        if comm.is_main_process():
            if cfg.VIS_PERIOD:
                result.append(VisualizationHook(cfg.VIS_PERIOD, model, cfg.INPUT.FORMAT, cfg.DATASETS.TRAIN[0]))
            # Last, so that it writes what the other hooks store.
            result.append(hooks.PeriodicWriter(build_writers(cfg.OUTPUT_DIR), period=20))
            if cfg.TEST.PLOTS:
                result.append(CurvesHook(cfg.OUTPUT_DIR, iterations_per_epoch))
        return result

    def evaluate(self, model: torch.nn.Module) -> dict:
        """Evaluate now, and store the results as ``results``."""
        # The weights do not change, so a signal may stop a long evaluation at once.
        self._signals.raises_at_once = True
        try:
            self.results = evaluate(self.cfg, model, evaluation_report(self.cfg))
        except TrainingInterrupted:
            # After the last step the final checkpoint exists; before the first one, the resumed checkpoint.
            if self.start_iter < self.steps_done < self.max_iter:
                self._save_on_signal.save()
            raise
        finally:
            self._signals.raises_at_once = False
        return self.results

    def resume_or_load(self, resume: bool) -> None:
        """Load MODEL.WEIGHTS, or with ``resume`` the last checkpoint of OUTPUT_DIR where there is one.

        Write the classes to OUTPUT_DIR/classes.json.

        Raises:
            ValueError: the file cannot be read or lacks needed tensors, or OUTPUT_DIR has no room for a
                checkpoint.
        """
        resumed = resume and self.checkpointer.has_checkpoint()
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        self.checkpointer.model.class_names = class_info(self.cfg.DATASETS.TRAIN[0]).names
        if resumed:
            self.start_iter = self.steps_done = self.iter + 1
            if self._periodic_checkpointer is not None:
                # MAX_CHECKPOINTS includes the checkpoints of the interrupted run.
                self._periodic_checkpointer.recent_checkpoints = self.checkpointer.periodic_checkpoints()
        if comm.is_main_process():
            check_free_space(self.cfg.OUTPUT_DIR, self.checkpoint_bytes())
            class_info(self.cfg.DATASETS.TRAIN[0]).save(Path(self.cfg.OUTPUT_DIR) / "classes.json")

    def checkpoint_bytes(self) -> int:
        """Return the estimated size of a checkpoint: each trained tensor and two optimizer tensors of its size."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return sum(tensor.nbytes * (3 if tensor.requires_grad else 1) for tensor in tensors)

    def train(self) -> dict:
        """Train from ``start_iter`` to the end.

        Returns:
            The last evaluation's results; empty without one.

        Raises:
            TrainingInterrupted: by SIGTERM or Ctrl-C; a checkpoint was saved.
            DataError: too many images cannot be used.
            OutputError: a checkpoint cannot be written.
        """
        logger.info("Starting training from iteration %d", self.start_iter)
        self.iter = self.start_iter
        with EventStorage(self.start_iter) as self.storage, self._signals:
            try:
                if comm.is_main_process():
                    # Not before, because weights that are refused or a benchmark must not open runs.
                    is_resumed = self.start_iter > 0
                    trackers = build_trackers(self.cfg.TRACKERS, self.cfg.OUTPUT_DIR, self.cfg.dump(), is_resumed)
                    self.register_hooks([hooks.PeriodicWriter(trackers, period=20)])
                self.before_train()
                for iteration in range(self.start_iter, self.max_iter):
                    if self.ends_early:
                        self.checkpointer.save("model_final", iteration=self.steps_done - 1)
                        self.max_iter = self.steps_done
                        break
                    self.iter = iteration
                    self.before_step()
                    self.run_step()
                    self.steps_done = self.iter + 1
                    self.after_step()
                resumed_from = Path(self.checkpointer.get_checkpoint_file()).name
                if self.start_iter == self.max_iter > 0 and resumed_from != "model_final.pth":
                    # The run was killed between its last checkpoint and the final one.
                    self.checkpointer.save("model_final", iteration=self.max_iter - 1)
                # Hooks read this as the end of the training.
                self.iter = self.max_iter
            except RUN_ERRORS as error:
                logger.error("%s", error)
                raise
            except Exception as error:
                if "DataLoader worker" in str(error) and "by signal: Terminated" in str(error):
                    logger.warning("SIGTERM ended the data workers first: the steps after the last checkpoint are lost")
                    raise TrainingInterrupted(signal.SIGTERM) from error
                logger.exception("Exception during training:")
                raise
            finally:
                self.after_train()
        return self.results

    def _precise_bn_batches(self) -> Iterator[list[dict]]:
        """Yield the batches of PreciseBN, which depend only on the seed and the number of steps done."""
        while True:
            # Workers would idle between two evaluations.
            batches = self.data_loader.batches(self.steps_done, num_workers=0)
            yield from itertools.islice(batches, self.cfg.TEST.PRECISE_BN.NUM_ITER)

    def run_step(self) -> None:
        """Run one optimizer step over SOLVER.ACCUMULATE_STEPS batches."""
        start = time.perf_counter()
        if self._loader_iter is None:
            self._loader_iter = self.data_loader.batches(self.iter * self.accumulate_steps)
        try:
            self.batches = [next(self._loader_iter) for _ in range(self.accumulate_steps)]
        except WorkerDiedError:
            if self._signals.received is None:
                raise
            # The signal reached the data workers, too. This step has changed nothing yet.
            if self.start_iter < self.steps_done:
                self.iter = self.steps_done - 1
                self._save_on_signal.save()
            raise TrainingInterrupted(self._signals.received) from None
        data_time = time.perf_counter() - start

        self.finite_guard.start_step()
        self.optimizer.zero_grad()
        losses: dict[str, torch.Tensor] = {}
        # Parts are prepared together, because each is divided by the counts of all.
        segmenter = self.finite_guard.model
        parts = segmenter.prepare_parts(self.batches) if self.accumulate_steps > 1 else None
        for index in range(self.accumulate_steps):
            # Ranks exchange gradients once per step.
            is_last = index + 1 == self.accumulate_steps
            distributed = isinstance(self.model, DistributedDataParallel)
            with self.model.no_sync() if distributed and not is_last else contextlib.nullcontext():
                batch_losses = self._losses(self.model, index, parts)
                self.backward(sum(batch_losses.values()))
            for name, loss in batch_losses.items():
                losses[name] = losses.get(name, 0) + loss.detach()

        self.after_backward()
        stop = self._signals.received is not None
        repeat = functools.partial(self._losses, segmenter, parts=parts)
        verdict = self.finite_guard.check(losses, self.batches, repeat, self.iter, also=[stop])
        (self.stop_requested,) = verdict.also
        if not verdict.take_step:
            self.optimizer.zero_grad()
            return
        # The guard has copied the losses to the host; each copy synchronizes.
        self.write_metrics(verdict.losses, data_time, self.iter)
        self.grad_scaler.unscale_(self.optimizer)
        max_norm = self.cfg.SOLVER.CLIP_TOTAL_NORM
        if max_norm:
            # With a scaler, the guard's norm is that of scaled gradients.
            norm = None if self.grad_scaler.is_enabled() else verdict.gradient_norm
            clip_total_norm(self.model.parameters(), max_norm, norm)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a loss, scaled by the gradient scaler."""
        self.grad_scaler.scale(loss).backward()

    def _losses(self, model: torch.nn.Module, index: int, parts: list[TrainingPart] | None) -> dict[str, torch.Tensor]:
        """Return the losses of one part of the step; the first part sets the random numbers of the step."""
        if index == 0:
            # Both draw the same numbers on a CPU. Detectron2's function also seeds GPUs, which is slow.
            seed_rng = seed_cpu if self.device.type == "cpu" else seed_all_rng
            seed_rng(derive_seed(self.data_loader.seed, self.iter, comm.get_rank()))
        with torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
            return model(self.batches[index], *([] if parts is None else [parts[index]]))

    def state_dict(self) -> dict:
        """Return SimpleTrainer's state with the gradient scaler, the skipped steps and the state of the loader."""
        return {
            **super().state_dict(),
            "parameter_names": self._parameter_names,
            # SimpleTrainer's counter is one step ahead in the middle of a step and after the last one.
            "iteration": self.steps_done - 1,
            "grad_scaler": self.grad_scaler.state_dict(),
            "nonfinite": self.finite_guard.state_dict(),
            "data": self.data_loader.state_dict(),
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore what `state_dict` returned; take learning rates and weight decay from the config.

        Raises:
            ValueError: see `resumed_state`.
        """
        base_lrs = list(self._scheduler.base_lrs)
        names = state_dict.get("parameter_names")
        optimizer = resumed_state(self.optimizer, state_dict["optimizer"], self._parameter_names, names)
        super().load_state_dict({**state_dict, "optimizer": optimizer})
        self._scheduler.base_lrs = base_lrs
        self.finite_guard.load_state_dict(state_dict.get("nonfinite", {}))
        if state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
        if "data" in state_dict:
            self.data_loader.load_state_dict(state_dict["data"])


def _data_seed(cfg: CfgNode) -> int:
    """Return SEED, or without one a random number that is the same on all ranks."""
    return cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()


def check_config(cfg: CfgNode) -> None:
    """Check keys of the training.

    Raises:
        ValueError: the message names the key.
        ImportError: a package of TRACKERS is not installed.
    """
    solver = cfg.SOLVER
    check_test_config(cfg)
    check_trackers(cfg.TRACKERS)
    if not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN is empty; name a data set, or set DATASETS.TRAIN_JSON and TRAIN_IMAGES")
    config.check_keys(cfg, "SOLVER.AMP.DTYPE", "SOLVER.ACCUMULATE_STEPS")
    if "MultiStep" in solver.LR_SCHEDULER_NAME and solver.MAX_ITER in solver.STEPS:
        raise ValueError(f"SOLVER.STEPS {solver.STEPS} has SOLVER.MAX_ITER {solver.MAX_ITER}: leave that step out")
    parts = solver.ACCUMULATE_STEPS * comm.get_world_size()
    if solver.IMS_PER_BATCH % parts:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} cannot be divided into SOLVER.ACCUMULATE_STEPS "
            f"{solver.ACCUMULATE_STEPS} parts on each of {comm.get_world_size()} processes"
        )

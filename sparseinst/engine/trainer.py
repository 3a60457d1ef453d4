"""The training loop: Detectron2's, with mixed precision on any device, gradient accumulation and exact resuming."""

import contextlib
import itertools
import logging
import time
import weakref
from collections.abc import Iterator

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, SimpleTrainer, create_ddp_model, default_writers, hooks
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from fvcore.nn.precise_bn import get_bn_modules
from torch.nn.parallel import DistributedDataParallel

from sparseinst import config
from sparseinst.checkpoint import OutputError, checkpointer_from_config
from sparseinst.data.coco_json import ClassInfo, class_info
from sparseinst.data.images import DataError
from sparseinst.data.loader import WorkerDiedError, build_train_loader, derive_seed, seed_cpu
from sparseinst.engine.coco_evaluation import check_coco_eval
from sparseinst.engine.evaluation import evaluate
from sparseinst.engine.finite import FiniteGuard, NonFiniteStepError
from sparseinst.engine.hooks import EvaluationHook, VisualizationHook
from sparseinst.engine.host_memory import keep_freed_memory
from sparseinst.engine.interruption import SaveOnSignal, SignalWatch, TrainingInterrupted
from sparseinst.engine.optimizer import build_optimizer, clip_total_norm
from sparseinst.engine.step_record import AMP_DTYPES
from sparseinst.modeling import MaskMemoryError
from sparseinst.modeling.criterion import normalizer_over_ranks
from sparseinst.modeling.structures import LossNormalizer
from sparseinst.modeling.training_network import prepare_as_configured

logger = logging.getLogger(__name__)


# What stops a training that has begun, with a message for the user; anything else is a defect.
RUN_ERRORS = (DataError, MaskMemoryError, NonFiniteStepError, OutputError, WorkerDiedError)


class Trainer(SimpleTrainer):
    """Trains what a config describes, in one process or in each of several.

    What a step computes depends on the config, the seed, the weights and the iteration alone. So a run that was
    interrupted and resumed ends, on the CPU, with the very weights of one that was not.

    Args:
        cfg: the whole config; its data sets are registered.

    Raises:
        ValueError: a key that cannot be used.
    """

    def __init__(self, cfg: CfgNode) -> None:
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        check_config(cfg)
        model = build_model(cfg)
        prepare_as_configured(cfg, model)
        logger.info("Model:\n%s", model)
        self.device = torch.device(cfg.MODEL.DEVICE)
        if self.device.type == "cpu":
            keep_freed_memory()
        optimizer = build_optimizer(cfg, model)
        ddp_model = create_ddp_model(
            model, broadcast_buffers=False, device_ids=[comm.get_local_rank()] if self.device.type == "cuda" else None
        )
        # Another meta-architecture may not have a mask grid.
        loader = build_train_loader(cfg, _data_seed(cfg), getattr(model, "mask_grid", None))
        super().__init__(ddp_model, loader, optimizer)
        self.cfg = cfg
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.accumulate_steps = cfg.SOLVER.ACCUMULATE_STEPS
        _, self.num_masks = config.max_instances(cfg) or (None, None)
        amp = cfg.SOLVER.AMP
        self.amp_dtype = AMP_DTYPES[amp.DTYPE] if amp.ENABLED else None
        self.grad_scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype == torch.float16)
        self.finite_guard = FiniteGuard(cfg, model, self.grad_scaler)
        self.batches: list[list[dict]] = []
        self.results: dict = {}
        self._loader_iter = None

        self.checkpointer = checkpointer_from_config(
            cfg,
            model,
            cfg.OUTPUT_DIR,
            is_training=True,
            trainer=weakref.proxy(self),
            classes=CheckpointedClasses(class_info(cfg.DATASETS.TRAIN[0])),
        )
        # Of the whole training, resumed or not.
        self.steps_done = 0
        # By a signal, on any rank: SaveOnSignal ends the training after the step.
        self.stop_requested = False
        self._periodic_checkpointer: hooks.PeriodicCheckpointer | None = None
        self._signals = SignalWatch()
        self._save_on_signal = SaveOnSignal(self._signals, self.checkpointer)
        self.register_hooks([*self.build_hooks(model), self._save_on_signal])

    def build_hooks(self, model: torch.nn.Module) -> list:
        """Detectron2's hooks in Detectron2's order, and ours for VIS_PERIOD."""
        cfg = self.cfg
        result = [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=build_lr_scheduler(cfg, self.optimizer)),
        ]
        if cfg.TEST.PRECISE_BN.ENABLED and get_bn_modules(model):
            # Before the checkpointer, which saves the statistics.
            batches = self._precise_bn_batches()
            result.append(hooks.PreciseBN(cfg.TEST.EVAL_PERIOD, model, batches, cfg.TEST.PRECISE_BN.NUM_ITER))
        if comm.is_main_process():
            checkpoints = hooks.PeriodicCheckpointer(
                self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD, max_to_keep=cfg.SOLVER.MAX_CHECKPOINTS or None
            )
            self._periodic_checkpointer = checkpoints
            result.append(checkpoints)
        if cfg.DATASETS.TEST:
            # After the checkpointer: an evaluation takes long, and may fail.
            result.append(EvaluationHook(cfg.TEST.EVAL_PERIOD, lambda: self.evaluate(model), self.checkpointer))
        if comm.is_main_process():
            if cfg.VIS_PERIOD:
                result.append(VisualizationHook(cfg.VIS_PERIOD, model, cfg.INPUT.FORMAT, cfg.DATASETS.TRAIN[0]))
            # Last, so that what the others put into the storage is written.
            result.append(hooks.PeriodicWriter(default_writers(cfg.OUTPUT_DIR, self.max_iter), period=20))
        return result

    def evaluate(self, model: torch.nn.Module) -> dict:
        """Evaluate now, and keep the results as ``results``."""
        # It takes long, and the weights do not change in it.
        self._signals.raises_at_once = True
        try:
            self.results = evaluate(self.cfg, model)
        except TrainingInterrupted:
            # After the last step there is the final checkpoint; before the first one, that which was resumed from.
            if self.start_iter < self.steps_done < self.max_iter:
                self._save_on_signal.save()
            raise
        finally:
            self._signals.raises_at_once = False
        return self.results

    def resume_or_load(self, resume: bool) -> None:
        """Load MODEL.WEIGHTS, or with ``resume`` the last checkpoint of OUTPUT_DIR where there is one.

        Raises:
            ValueError: the file cannot be read, or does not fill what it must.
        """
        resumed = resume and self.checkpointer.has_checkpoint()
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if resumed:
            self.start_iter = self.steps_done = self.iter + 1
            if self._periodic_checkpointer is not None:
                # MAX_CHECKPOINTS counts those of the interrupted run too.
                self._periodic_checkpointer.recent_checkpoints = self.checkpointer.periodic_checkpoints()

    def checkpoint_bytes(self) -> int:
        """About the size of a checkpoint: every trained tensor and two of the optimizer's of its size."""
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
                self.before_train()
                for iteration in range(self.start_iter, self.max_iter):
                    self.iter = iteration
                    self.before_step()
                    self.run_step()
                    self.steps_done = self.iter + 1
                    self.after_step()
                # Tells the hooks that the training came to its end.
                self.iter = self.max_iter
            except RUN_ERRORS as error:
                logger.error("%s", error)
                raise
            except Exception:
                logger.exception("Exception during training:")
                raise
            finally:
                self.after_train()
        return self.results

    def _precise_bn_batches(self) -> Iterator[list[dict]]:
        """Those that PreciseBN takes: others after each step, and the same ones where a run is resumed."""
        while True:
            # Without workers, which would wait from one evaluation to the next.
            batches = self.data_loader.batches(self.steps_done, num_workers=0)
            yield from itertools.islice(batches, self.cfg.TEST.PRECISE_BN.NUM_ITER)

    def run_step(self) -> None:
        """One optimizer step over SOLVER.ACCUMULATE_STEPS batches."""
        start = time.perf_counter()
        if self._loader_iter is None:
            self._loader_iter = self.data_loader.batches(self.iter * self.accumulate_steps)
        self.batches = [next(self._loader_iter) for _ in range(self.accumulate_steps)]
        data_time = time.perf_counter() - start

        # Both draw the same numbers on a CPU; without GPUs Detectron2's takes far longer.
        seed_rng = seed_cpu if self.device.type == "cpu" else seed_all_rng
        seed_rng(derive_seed(self.data_loader.seed, self.iter, comm.get_rank()))
        self.finite_guard.start_step()
        self.optimizer.zero_grad()
        losses: dict[str, torch.Tensor] = {}
        # A criterion need not take a normalizer where each step has one batch.
        normalizer = () if self.accumulate_steps == 1 or self.num_masks is None else (self._normalizer(),)
        for index, batch in enumerate(self.batches):
            # Ranks exchange gradients once a step.
            is_last = index + 1 == self.accumulate_steps
            distributed = isinstance(self.model, DistributedDataParallel)
            with self.model.no_sync() if distributed and not is_last else contextlib.nullcontext():
                with torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
                    batch_losses = self.model(batch, *normalizer)
                self.grad_scaler.scale(sum(batch_losses.values())).backward()
            for name, loss in batch_losses.items():
                losses[name] = losses.get(name, 0) + loss.detach()

        self.after_backward()
        stop = self._signals.received is not None
        verdict = self.finite_guard.check(losses, self.batches, normalizer, self.iter, also=[stop])
        (self.stop_requested,) = verdict.also
        if not verdict.take_step:
            self.optimizer.zero_grad()
            return
        # From the host, where the guard has them: each would be waited for otherwise.
        self.write_metrics(verdict.losses, data_time, self.iter)
        self.grad_scaler.unscale_(self.optimizer)
        max_norm = self.cfg.SOLVER.CLIP_TOTAL_NORM
        if max_norm:
            # The guard's norm is that of the scaled gradients.
            norm = None if self.grad_scaler.is_enabled() else verdict.gradient_norm
            clip_total_norm(self.model.parameters(), max_norm, norm)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _normalizer(self) -> LossNormalizer:
        """Counts over all batches of the step, as the criterion counts over one."""
        counts = [len(x["instances"]) for batch in self.batches for x in batch]
        return normalizer_over_ranks(
            sum(counts),
            sum(min(count, self.num_masks) for count in counts),
            self.device,
            self.cfg.MODEL.SPARSE_INST.LOSS.GLOBAL_NORMALIZATION,
        )

    def state_dict(self) -> dict:
        """As SimpleTrainer's, with the gradient scaler, the skipped steps and what the order of the data depends on."""
        return {
            **super().state_dict(),
            "grad_scaler": self.grad_scaler.state_dict(),
            "nonfinite": self.finite_guard.state_dict(),
            "data": self.data_loader.state_dict(),
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Take what :meth:`state_dict` gave."""
        super().load_state_dict(state_dict)
        self.finite_guard.load_state_dict(state_dict.get("nonfinite", {}))
        if state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
        if "data" in state_dict:
            self.data_loader.load_state_dict(state_dict["data"])


def _data_seed(cfg: CfgNode) -> int:
    """SEED, or where there is none a random number that is the same on all ranks."""
    return cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()


class CheckpointedClasses:
    """Puts the classes into every checkpoint, so that it can be used without the data set."""

    def __init__(self, classes: ClassInfo) -> None:
        self.classes = classes

    def state_dict(self) -> dict:
        """The classes as plain types."""
        return self.classes._asdict()

    def load_state_dict(self, state_dict: dict) -> None:
        """Raises ValueError where a run is resumed with other classes."""
        if ClassInfo.from_content(state_dict, "The checkpoint") != self.classes:
            raise ValueError(
                f"The checkpoint that --resume found was trained on the classes {state_dict['names'][:5]}, ..., but "
                f"DATASETS.TRAIN has {self.classes.names[:5]}, ...: choose another OUTPUT_DIR, or leave out --resume"
            )


def check_config(cfg: CfgNode) -> None:
    """Refuse keys that the trainer cannot honour.

    Raises:
        ValueError: the message names the key.
    """
    solver = cfg.SOLVER
    check_test_config(cfg)
    if not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN is empty; name a data set, or set DATASETS.TRAIN_JSON and TRAIN_IMAGES")
    if solver.AMP.DTYPE not in AMP_DTYPES:
        raise ValueError(f"SOLVER.AMP.DTYPE is {solver.AMP.DTYPE!r}; it must be one of {sorted(AMP_DTYPES)}")
    parts = solver.ACCUMULATE_STEPS * comm.get_world_size()
    if solver.ACCUMULATE_STEPS < 1 or solver.IMS_PER_BATCH % parts:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} cannot be divided into SOLVER.ACCUMULATE_STEPS "
            f"{solver.ACCUMULATE_STEPS} parts on each of {comm.get_world_size()} processes"
        )


def check_test_config(cfg: CfgNode) -> None:
    """Refuse keys that the evaluation cannot honour. Raises ValueError."""
    check_coco_eval(cfg.TEST.COCO_EVAL)
    if cfg.TEST.AUG.ENABLED:
        raise ValueError("TEST.AUG.ENABLED is True: test-time augmentation is not available for SparseInst; unset it")

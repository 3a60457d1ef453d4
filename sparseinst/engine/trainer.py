"""The training loop: Detectron2's SimpleTrainer with mixed precision on any device and gradient accumulation."""

import contextlib
import logging
import time
import weakref

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_train_loader
from detectron2.engine import DefaultTrainer, SimpleTrainer, create_ddp_model, default_writers, hooks
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from detectron2.utils import comm
from fvcore.nn.precise_bn import get_bn_modules
from torch.nn.parallel import DistributedDataParallel

from sparseinst.checkpoint import checkpointer_from_config
from sparseinst.data.coco_json import ClassInfo, class_info
from sparseinst.data.dataset_mapper import SparseInstDatasetMapper
from sparseinst.engine.evaluation import evaluate
from sparseinst.engine.finite import FiniteGuard
from sparseinst.engine.hooks import VisualizationHook
from sparseinst.engine.optimizer import build_optimizer
from sparseinst.engine.step_record import AMP_DTYPES
from sparseinst.modeling.criterion import mean_over_ranks
from sparseinst.modeling.structures import LossNormalizer

logger = logging.getLogger(__name__)


class Trainer(SimpleTrainer):
    """Trains what a config describes, in one process or in each of several.

    Args:
        cfg: the whole config; its data sets are registered.

    Raises:
        ValueError: a key that cannot be used.
    """

    def __init__(self, cfg: CfgNode) -> None:
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        check_config(cfg)
        model = build_model(cfg)
        if cfg.SOLVER.CHANNELS_LAST:
            model.to(memory_format=torch.channels_last)
        logger.info("Model:\n%s", model)
        self.device = torch.device(cfg.MODEL.DEVICE)
        optimizer = build_optimizer(cfg, model)
        ddp_model = create_ddp_model(
            model, broadcast_buffers=False, device_ids=[comm.get_local_rank()] if self.device.type == "cuda" else None
        )
        super().__init__(ddp_model, build_train_loader(cfg), optimizer)
        self.cfg = cfg
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.accumulate_steps = cfg.SOLVER.ACCUMULATE_STEPS
        self.num_masks = cfg.MODEL.SPARSE_INST.DECODER.NUM_MASKS
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
        self.register_hooks(self.build_hooks(model))

    def build_hooks(self, model: torch.nn.Module) -> list:
        """Detectron2's hooks in Detectron2's order, and ours for VIS_PERIOD."""
        cfg = self.cfg
        result = [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=build_lr_scheduler(cfg, self.optimizer)),
        ]
        if cfg.TEST.PRECISE_BN.ENABLED and get_bn_modules(model):
            loader_cfg = cfg.clone()
            loader_cfg.defrost()
            loader_cfg.DATALOADER.NUM_WORKERS = 0
            # Before the checkpointer, which saves the statistics.
            result.append(
                hooks.PreciseBN(
                    cfg.TEST.EVAL_PERIOD, model, build_train_loader(loader_cfg), cfg.TEST.PRECISE_BN.NUM_ITER
                )
            )
        if comm.is_main_process():
            result.append(
                hooks.PeriodicCheckpointer(
                    self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD, max_to_keep=cfg.SOLVER.MAX_CHECKPOINTS or None
                )
            )
        if cfg.DATASETS.TEST:
            result.append(hooks.EvalHook(cfg.TEST.EVAL_PERIOD, lambda: self.evaluate(model)))
            if comm.is_main_process() and cfg.TEST.EVAL_PERIOD:
                result.append(hooks.BestCheckpointer(cfg.TEST.EVAL_PERIOD, self.checkpointer, "segm/AP"))
        if comm.is_main_process():
            if cfg.VIS_PERIOD:
                result.append(VisualizationHook(cfg.VIS_PERIOD, model, cfg.INPUT.FORMAT, cfg.DATASETS.TRAIN[0]))
            # Last, so that what the others put into the storage is written.
            result.append(hooks.PeriodicWriter(default_writers(cfg.OUTPUT_DIR, self.max_iter), period=20))
        return result

    def evaluate(self, model: torch.nn.Module) -> dict:
        """Evaluate now, and keep the results as ``results``."""
        self.results = evaluate(self.cfg, model)
        return self.results

    def resume_or_load(self, resume: bool) -> None:
        """Load MODEL.WEIGHTS, or with ``resume`` the last checkpoint of OUTPUT_DIR where there is one.

        Raises:
            ValueError: the file cannot be read, or does not fill what it must.
        """
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if resume and self.checkpointer.has_checkpoint():
            self.start_iter = self.iter + 1

    def train(self) -> dict:
        """Train from ``start_iter`` to the end.

        Returns:
            The last evaluation's results; empty without one.
        """
        super().train(self.start_iter, self.max_iter)
        return self.results

    def run_step(self) -> None:
        """One optimizer step over SOLVER.ACCUMULATE_STEPS batches."""
        start = time.perf_counter()
        if self._loader_iter is None:
            self._loader_iter = iter(self.data_loader)
        self.batches = [next(self._loader_iter) for _ in range(self.accumulate_steps)]
        data_time = time.perf_counter() - start

        self.finite_guard.start_step()
        self.optimizer.zero_grad()
        losses: dict[str, torch.Tensor] = {}
        # A criterion need not take a normalizer where each step has one batch.
        normalizer = () if self.accumulate_steps == 1 else (self._normalizer(),)
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
        if not self.finite_guard.check(losses, self.batches, normalizer, self.iter).take_step:
            self.optimizer.zero_grad()
            return
        self.write_metrics(losses, data_time, self.iter)
        self.grad_scaler.unscale_(self.optimizer)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _normalizer(self) -> LossNormalizer:
        """Counts over all batches of the step, as the criterion counts over one."""
        counts = [len(x["instances"]) for batch in self.batches for x in batch]
        return LossNormalizer(
            mean_over_ranks(sum(counts), self.device), max(1, sum(min(count, self.num_masks) for count in counts))
        )

    def state_dict(self) -> dict:
        """As SimpleTrainer's, with the state of the gradient scaler and the counts of skipped steps."""
        return {
            **super().state_dict(),
            "grad_scaler": self.grad_scaler.state_dict(),
            "nonfinite": self.finite_guard.state_dict(),
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Take what :meth:`state_dict` gave."""
        super().load_state_dict(state_dict)
        self.finite_guard.load_state_dict(state_dict.get("nonfinite", {}))
        if state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


class CheckpointedClasses:
    """Puts the classes into every checkpoint, so that it can be used without the data set."""

    def __init__(self, classes: ClassInfo) -> None:
        self.classes = classes

    def state_dict(self) -> dict:
        """The classes as plain types."""
        return self.classes._asdict()

    def load_state_dict(self, state_dict: dict) -> None:
        """Raises ValueError where a run is resumed with other classes."""
        if ClassInfo(**state_dict) != self.classes:
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
    if cfg.TEST.AUG.ENABLED:
        raise ValueError("TEST.AUG.ENABLED is True: test-time augmentation is not available for SparseInst; unset it")


def build_train_loader(cfg: CfgNode):
    """Batches of IMS_PER_BATCH / ACCUMULATE_STEPS images, mapped as MODEL.SPARSE_INST.DATASET_MAPPER says.

    Raises:
        ValueError: an unknown mapper.
    """
    mappers = {"SparseInstDatasetMapper": SparseInstDatasetMapper, "DatasetMapper": DatasetMapper}
    name = cfg.MODEL.SPARSE_INST.DATASET_MAPPER
    if name not in mappers:
        raise ValueError(f"MODEL.SPARSE_INST.DATASET_MAPPER is {name!r}; it must be one of {sorted(mappers)}")
    return build_detection_train_loader(
        cfg,
        mapper=mappers[name](cfg, is_train=True),
        total_batch_size=cfg.SOLVER.IMS_PER_BATCH // cfg.SOLVER.ACCUMULATE_STEPS,
    )

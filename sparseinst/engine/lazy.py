"""Train and evaluate a LazyConfig, Detectron2's config in Python, with Detectron2's own trainers.

A YAML config trains with `sparseinst.engine.trainer`, which resumes bit for bit, accumulates gradients, skips NaN steps
and saves on SIGTERM. Detectron2's trainers do none of these.
"""

import argparse
import contextlib
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import AMPTrainer, HookBase, SimpleTrainer, create_ddp_model, hooks
from detectron2.evaluation import inference_on_dataset
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf
from torch import nn

from sparseinst.checkpoint import SparseInstCheckpointer
from sparseinst.checkpoint.atomic_write import write_text_atomically
from sparseinst.config import resolve_config_file
from sparseinst.engine.errors import run_errors, setup_errors
from sparseinst.engine.hooks import EvaluationHook
from sparseinst.engine.metrics_file import build_writers
from sparseinst.engine.optimizer import clip_total_norm
from sparseinst.engine.processes import check_device
from sparseinst.engine.progress import Progress
from sparseinst.engine.run_setup import begin_run, save_config
from sparseinst.evaluation import figures_table

logger = logging.getLogger(__name__)

# Entries that a config must have, and their values where they may be left out.
NEEDED = ("model", "dataloader", "optimizer", "lr_multiplier", "train.output_dir", "train.max_iter", "train.device")
DEFAULTS = {"init_checkpoint": "", "min_backbone_coverage": 0.9, "clip_total_norm": 0.0, "eval_period": 0, "seed": -1,
            "log_period": 20, "amp": {"enabled": False}, "ddp": {}, "checkpointer": {"period": 5000}}  # fmt: skip


class ClipTotalNorm(HookBase):
    """Scale all gradients by one factor before each step, so that their norm together is at most ``max_norm``."""

    def __init__(self, max_norm: float) -> None:
        self.max_norm = max_norm

    def after_backward(self) -> None:
        """Unscale the gradients where mixed precision has scaled them, then clip them."""
        if hasattr(self.trainer, "grad_scaler"):
            self.trainer.grad_scaler.unscale_(self.trainer.optimizer)
        clip_total_norm(self.trainer.model.parameters(), self.max_norm)


def main(args: argparse.Namespace) -> dict:
    """Train, or evaluate with ``--eval-only``, in one process. Return the results of the evaluation."""
    results = {}
    with contextlib.ExitStack() as stack:
        with setup_errors():
            if any((args.train_json, args.train_images, args.test_json, args.test_images, args.val_share is not None)):
                raise ValueError(
                    "--train-json, --test-json: a LazyConfig registers its data and names it in dataloader"
                )
            if args.recipe:
                raise ValueError("--recipe and --config-file are both given: leave one out")
            if args.imports:
                raise ValueError("--import: a LazyConfig is Python code and imports its modules itself")
            args.config_file = resolve_config_file(args.config_file)
            cfg = load(args.config_file, args.opts)
            check_device(cfg.train.device)
            benchmark = cfg.train.get("cudnn_benchmark", False)
            text = _as_yaml(cfg)
            begin_run(args, stack, cfg.train.output_dir, text, seed=cfg.train.seed, cudnn_benchmark=benchmark)
            run = (prepare_evaluation if args.eval_only else prepare_training)(cfg, args.resume)
            save_config(cfg.train.output_dir, text, eval_only=args.eval_only)
        with run_errors(cfg.train.output_dir):
            results = run()
    return results


def load(path: str, overrides: list[str]) -> DictConfig:
    """Run a config file's code, and apply KEY=VALUE overrides.

    Raises:
        ValueError: the code fails, an override cannot be applied, or an entry is missing.
    """
    if comm.is_main_process():
        print(f"WARNING: the config file {path} is Python code (a LazyConfig), which runs now", file=sys.stderr)
    wrong = [text for text in overrides if "=" not in text]
    if wrong:
        raise ValueError(
            f"{wrong[0]!r} is not an override of a LazyConfig: write KEY=VALUE, such as train.max_iter=100"
        )
    with _in_one_line(f"The config file {path} cannot be run"):
        cfg = LazyConfig.load(path)
    missing = [key for key in NEEDED if OmegaConf.select(cfg, key) is None]
    if missing:
        raise ValueError(f"The config file {path} has no {', '.join(missing)}")
    cfg.train = OmegaConf.merge(DEFAULTS, cfg.train)
    for text in overrides:
        key = text.split("=")[0]
        if not key.startswith("+") and OmegaConf.select(cfg, key, default=NEEDED) is NEEDED:
            raise ValueError(f"The override {text!r} names no key of the config; write +{text} to add it")
    with _in_one_line(f"The overrides {' '.join(overrides)} cannot be applied"):
        cfg = LazyConfig.apply_overrides(cfg, overrides)
    if str(cfg.train.device).startswith("cuda") and not torch.cuda.is_available():
        print("WARNING: train.device is cuda and PyTorch finds no CUDA device: running on the CPU", file=sys.stderr)
        cfg.train.device = "cpu"
    return cfg


def prepare_evaluation(cfg: DictConfig, resume: bool) -> Callable[[], dict]:
    """Load the model, and return a function that evaluates it."""
    model = _build(cfg, "model").to(cfg.train.device)
    checkpointer = SparseInstCheckpointer(model, cfg.train.output_dir)
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    return lambda: evaluate(cfg, model)


def prepare_training(cfg: DictConfig, resume: bool) -> Callable[[], dict]:
    """Load the model, and return a function that trains it and returns the results of the last evaluation."""
    train = cfg.train
    on_gpu = train.device != "cpu"
    if train.amp.enabled and not on_gpu:
        raise ValueError("train.amp.enabled is True: Detectron2's mixed precision needs a GPU. Set it to False")
    model = _build(cfg, "model").to(train.device)
    cfg.optimizer.params.model = model
    ddp_model = create_ddp_model(model, device_ids=[comm.get_local_rank()] if on_gpu else None, **train.ddp)
    trainer_class = AMPTrainer if train.amp.enabled else SimpleTrainer
    trainer = trainer_class(ddp_model, _build(cfg, "dataloader.train"), _build(cfg, "optimizer"))
    checkpointer = SparseInstCheckpointer(
        model, train.output_dir, min_backbone_coverage=train.min_backbone_coverage, trainer=trainer
    )
    results: dict = {}
    is_main = comm.is_main_process()
    trainer.register_hooks([
        hooks.IterationTimer(),
        hooks.LRScheduler(scheduler=_build(cfg, "lr_multiplier")),
        Progress(model) if is_main else None,
        ClipTotalNorm(train.clip_total_norm) if train.clip_total_norm else None,
        hooks.PeriodicCheckpointer(checkpointer, **train.checkpointer) if is_main else None,
        EvaluationHook(train.eval_period, lambda: evaluate(cfg, model, results), checkpointer),
        hooks.PeriodicWriter(build_writers(train.output_dir), train.log_period) if is_main else None,
    ])  # fmt: skip
    resumed = resume and checkpointer.has_checkpoint()
    checkpointer.resume_or_load(train.init_checkpoint, resume=resume)
    start = trainer.iter + 1 if resumed else 0

    def run() -> dict:
        trainer.train(start, train.max_iter)
        return results

    return run


def evaluate(cfg: DictConfig, model: nn.Module, results: dict | None = None) -> dict:
    """Evaluate on dataloader.test in all processes at once; write results.json to the output folder.

    Returns:
        ``results`` with the new results; empty on ranks other than 0.
    """
    results = {} if results is None else results
    evaluator = _build(cfg, "dataloader.evaluator")
    results.update(inference_on_dataset(model, _build(cfg, "dataloader.test"), evaluator) or {})
    if comm.is_main_process():
        logger.info("Results, in percent:\n%s", figures_table(results))
        path = Path(cfg.train.output_dir) / "results.json"
        write_text_atomically(path, json.dumps({"results": results}, indent=2) + "\n")
    return results


def _as_yaml(cfg: DictConfig) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        LazyConfig.save(cfg, str(path))
        return path.read_text(encoding="utf-8")


def _build(cfg: DictConfig, key: str) -> Any:
    with _in_one_line(f"{key} of the config cannot be built"):
        return instantiate(OmegaConf.select(cfg, key))


@contextlib.contextmanager
def _in_one_line(what: str) -> Iterator[None]:
    # The code of a config can raise anything.
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {' '.join(f'{type(error).__name__}: {error}'.split())[:500]}") from error

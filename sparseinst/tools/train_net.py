"""Train and evaluate a model: ``python train_net.py --config-file configs/sparse_inst_r50_giam.yaml``."""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from sparseinst.config.arguments import add_import_argument
from sparseinst.engine.console import prepare_console

if TYPE_CHECKING:
    from detectron2.config import CfgNode
    from torch import nn

logger = logging.getLogger(__name__)

DATA_FLAGS = {
    "train_json": "COCO json to train on, in place of DATASETS.TRAIN",
    "train_images": "folder of its images",
    "test_json": "COCO json to evaluate on, in place of DATASETS.TEST",
    "test_images": "folder of its images",
}


def build_parser() -> argparse.ArgumentParser:
    """Return a parser with the arguments of Detectron2's default_argument_parser and those of this project.

    Detectron2's own parser cannot be imported without PyTorch, which takes seconds.
    """
    parser = argparse.ArgumentParser(
        description="Train a model. With --eval-only: evaluate MODEL.WEIGHTS.",
        epilog="KEY VALUE pairs at the end override the config file, for example: SOLVER.IMS_PER_BATCH 8; "
        "for a LazyConfig (.py, whose code is run): train.max_iter=100",
    )
    add = parser.add_argument
    add("--config-file", default="", metavar="FILE", help="YAML file, or the name of one that comes with the package")
    add("--recipe", default="", metavar="NAME", help="in place of --config-file: auto, ordinary or crowded")
    add("--resume", action="store_true", help="continue from the last checkpoint of OUTPUT_DIR, where it has one")
    add("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS, without a training")
    add_import_argument(parser)
    for name, meaning in DATA_FLAGS.items():
        add(f"--{name.replace('_', '-')}", default="", metavar="PATH", help=meaning)
    add("--val-share", type=float, metavar="SHARE", help="evaluate on this share of --train-json, such as 0.2")
    add("--num-gpus", type=int, default=1, metavar="N", help="processes on each machine, one for each GPU (default: 1)")
    add("--num-machines", type=int, default=1, metavar="N", help="number of machines (default: 1)")
    add("--machine-rank", type=int, default=0, metavar="N", help="number of this machine, from 0 (default: 0)")
    # Detectron2's rule: each user has a port.
    port = 2**15 + 2**14 + hash(os.getuid() if sys.platform != "win32" else 1) % 2**14
    add(
        "--dist-url",
        default=f"tcp://127.0.0.1:{port}",
        metavar="URL",
        help="several processes: tcp://HOST:PORT of the first machine, or auto on one machine (default: %(default)s)",
    )
    add(
        "--dist-timeout",
        type=float,
        default=30,
        metavar="MINUTES",
        help="several processes: fail after waiting this long for another process (default: 30)",
    )
    add("opts", nargs=argparse.REMAINDER, default=None, metavar="KEY VALUE", help="override the config file; last")
    return parser


def main(args: argparse.Namespace) -> dict:
    """Train, or evaluate with ``--eval-only``, in one process. Return the results of the evaluation."""
    prepare_console()
    from detectron2.evaluation import verify_results
    from detectron2.utils import comm

    from sparseinst.data.coco_json import check_num_classes
    from sparseinst.engine import lazy
    from sparseinst.engine.errors import run_errors, setup_errors
    from sparseinst.engine.report import evaluation_report
    from sparseinst.engine.run_setup import save_config
    from sparseinst.engine.trainer import Trainer
    from sparseinst.evaluation import check_evaluation, evaluate

    if args.config_file.endswith(".py"):
        return lazy.main(args)
    results = {}
    with contextlib.ExitStack() as stack:
        with setup_errors():
            cfg = setup(args, stack)
            if args.eval_only:
                model = load_model(cfg, args.resume)
                check_evaluation(cfg, getattr(model, "class_names", None))
                check_num_classes(cfg, ("TEST",))
                run = partial(evaluate, cfg, model, evaluation_report(cfg))
            else:
                trainer = Trainer(cfg)
                trainer.resume_or_load(args.resume)
                run = trainer.train
            save_config(cfg.OUTPUT_DIR, cfg.dump(), eval_only=args.eval_only)
        with run_errors(cfg.OUTPUT_DIR):
            results = run()
        if comm.is_main_process() and cfg.TEST.EXPECTED_RESULTS:
            verify_results(cfg, results)
    return results


def setup(args: argparse.Namespace, stack: contextlib.ExitStack) -> "CfgNode":
    """Prepare the config, data sets, output folder, loggers and seed of one process.

    Args:
        args: parsed by `build_parser`.
        stack: holds OUTPUT_DIR until it is closed.

    Raises:
        ValueError: the arguments, the config, the data sets or OUTPUT_DIR cannot be used.
        ImportError: a package that the recipe needs is not installed.
    """
    from sparseinst.checkpoint import check_weights_file
    from sparseinst.config import resolve_config_file
    from sparseinst.data.coco_json import check_num_classes, log_data_warnings, register_user_datasets
    from sparseinst.data.evaluation_data import choose_evaluation_data
    from sparseinst.data.recipes import check_recipe_packages, choose_recipe
    from sparseinst.engine.model_keys import set_model_keys
    from sparseinst.engine.processes import check_device
    from sparseinst.engine.run_setup import begin_run
    from sparseinst.evaluation import check_test_config
    from sparseinst.runtime.exported_model import config_of_run

    recipe_notes = []
    if args.recipe:
        args.config_file, note = choose_recipe(args.recipe, args.train_json, args.config_file)
        check_recipe_packages()
        recipe_notes.append(note)
    if args.config_file:
        args.config_file = resolve_config_file(args.config_file)
    elif not args.eval_only:
        raise ValueError(
            "--config-file is missing: a YAML file, or a name such as sparse_inst_r50_giam; or --recipe auto"
        )
    flags = {name: repr(getattr(args, name)) for name in DATA_FLAGS if getattr(args, name)}
    val_share = args.val_share
    if val_share is None and args.eval_only and args.test_json and "DATASETS.VAL_SHARE" not in args.opts[::2]:
        # The config of a training has a share of its own.
        val_share = 0.0
    flags |= {} if val_share is None else {"val_share": repr(val_share)}
    opts = [part for name, value in flags.items() for part in (f"DATASETS.{name.upper()}", value)]
    cfg = config_of_run(args.config_file, [*args.opts, *opts], args.imports)
    check_device(cfg.MODEL.DEVICE)
    warnings = choose_evaluation_data(cfg)
    # In every process, because the processes that launch() spawns do not inherit registered data sets.
    splits = ("TEST",) if args.eval_only else ("TRAIN", "TEST")
    register_user_datasets(cfg, splits)
    if args.eval_only:
        check_test_config(cfg)
        if not cfg.DATASETS.TEST:
            raise ValueError("--eval-only has no data to evaluate on: give --test-json and --test-images")
    if not args.resume:
        check_weights_file(cfg.MODEL.WEIGHTS)
    notes = recipe_notes + set_model_keys(cfg, eval_only=args.eval_only, resume=args.resume)
    if not args.eval_only:
        check_num_classes(cfg, splits)
    cfg.freeze()
    begin_run(args, stack, cfg.OUTPUT_DIR, cfg.dump(), seed=cfg.SEED, cudnn_benchmark=cfg.CUDNN_BENCHMARK)
    for level, lines in ((logging.WARNING, warnings), (logging.INFO, notes)):
        for line in lines:
            logger.log(level, line)
    log_data_warnings(cfg, splits)
    return cfg


def load_model(cfg: "CfgNode", resume: bool) -> "nn.Module":
    """Return the trained model, optimized as RUNTIME says, or the exported file that MODEL.WEIGHTS names."""
    from detectron2.modeling import build_model

    from sparseinst.checkpoint import checkpointer_from_config
    from sparseinst.engine.host_memory import keep_freed_memory_for_inference
    from sparseinst.runtime.exported_file import is_exported
    from sparseinst.runtime.exported_model import load_exported
    from sparseinst.runtime.optimize import optimize_as_configured

    keep_freed_memory_for_inference(cfg)
    if is_exported(cfg.MODEL.WEIGHTS):
        return load_exported(cfg)
    model = build_model(cfg).eval()
    checkpointer_from_config(cfg, model, cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    return optimize_as_configured(cfg, model)


def cli(argv: Sequence[str] | None = None) -> None:
    """Run the command: one process, one for each of ``--num-gpus``, or one of torchrun's."""
    args = build_parser().parse_args(argv)
    prepare_console()
    from sparseinst.engine.processes import run_processes

    run_processes(main, args)


if __name__ == "__main__":
    cli()

"""Train and evaluate a model: ``python train_net.py --config-file configs/sparse_inst_r50_giam.yaml``."""

import argparse
import contextlib
import logging
from collections.abc import Sequence
from functools import partial

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from sparseinst.checkpoint import check_weights_file, checkpointer_from_config
from sparseinst.config import load_config, resolve_config_file
from sparseinst.data.coco_json import check_num_classes, log_data_warnings, register_user_datasets
from sparseinst.data.evaluation_data import choose_evaluation_data
from sparseinst.engine import lazy
from sparseinst.engine.errors import run_errors, setup_errors
from sparseinst.engine.host_memory import keep_freed_memory_for_inference
from sparseinst.engine.model_keys import set_model_keys
from sparseinst.engine.output_folder import check_no_earlier_run, claimed
from sparseinst.engine.processes import add_process_arguments, check_device, run_processes
from sparseinst.engine.trainer import Trainer
from sparseinst.evaluation import check_evaluation, check_test_config, evaluate
from sparseinst.runtime.optimize import optimize_as_configured

logger = logging.getLogger(__name__)

DATA_FLAGS = {
    "train_json": "COCO json to train on, in place of DATASETS.TRAIN",
    "train_images": "folder of its images",
    "test_json": "COCO json to evaluate on, in place of DATASETS.TEST",
    "test_images": "folder of its images",
}


def build_parser() -> argparse.ArgumentParser:
    """Return Detectron2's parser with arguments for a user's own data and for several processes."""
    parser = default_argument_parser(
        epilog="KEY VALUE pairs at the end override the config file, for example: SOLVER.IMS_PER_BATCH 8; "
        "for a LazyConfig (.py, whose code is run): train.max_iter=100"
    )
    for name, meaning in DATA_FLAGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", default="", metavar="PATH", help=meaning)
    parser.add_argument(
        "--val-share", type=float, metavar="SHARE", help="evaluate on this share of --train-json, such as 0.2"
    )
    add_process_arguments(parser)
    return parser


def main(args: argparse.Namespace) -> dict:
    """Train, or evaluate with ``--eval-only``, in one process. Return the results of the evaluation."""
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
                run = partial(evaluate, cfg, model)
            else:
                trainer = Trainer(cfg)
                trainer.resume_or_load(args.resume)
                run = trainer.train
        with run_errors(cfg.OUTPUT_DIR):
            results = run()
        if comm.is_main_process() and cfg.TEST.EXPECTED_RESULTS:
            verify_results(cfg, results)
    return results


def setup(args: argparse.Namespace, stack: contextlib.ExitStack) -> CfgNode:
    """Prepare the config, data sets, output folder, loggers and seed of one process.

    Args:
        args: parsed by `build_parser`.
        stack: holds OUTPUT_DIR until it is closed.

    Raises:
        ValueError: the arguments, the config, the data sets or OUTPUT_DIR cannot be used.
    """
    if not args.config_file:
        raise ValueError("--config-file is missing: a YAML file, or a name such as sparse_inst_r50_giam")
    args.config_file = resolve_config_file(args.config_file)
    flags = {name: repr(getattr(args, name)) for name in DATA_FLAGS if getattr(args, name)}
    flags |= {} if args.val_share is None else {"val_share": repr(args.val_share)}
    opts = [part for name, value in flags.items() for part in (f"DATASETS.{name.upper()}", value)]
    cfg = load_config(args.config_file, [*args.opts, *opts])
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
    notes = set_model_keys(cfg, eval_only=args.eval_only, resume=args.resume)
    if not args.eval_only:
        check_num_classes(cfg, splits)
    cfg.freeze()
    if comm.is_main_process():
        stack.enter_context(claimed(cfg.OUTPUT_DIR))
    if not args.eval_only and not args.resume:
        check_no_earlier_run(cfg.OUTPUT_DIR)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="sparseinst")
    for level, lines in ((logging.WARNING, warnings), (logging.INFO, notes)):
        for line in lines:
            logger.log(level, line)
    log_data_warnings(cfg, splits)
    default_setup(cfg, args)
    return cfg


def load_model(cfg: CfgNode, resume: bool) -> nn.Module:
    """Return the trained model, optimized as RUNTIME says."""
    keep_freed_memory_for_inference(cfg)
    model = build_model(cfg).eval()
    checkpointer_from_config(cfg, model, cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    return optimize_as_configured(cfg, model)


def cli(argv: Sequence[str] | None = None) -> None:
    """Run the command: one process, one for each of ``--num-gpus``, or one of torchrun's."""
    run_processes(main, build_parser().parse_args(argv))


if __name__ == "__main__":
    cli()

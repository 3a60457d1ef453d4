"""Train and evaluate SparseInst: ``python train_net.py --config-file configs/sparse_inst_r50_giam.yaml``."""

import argparse
import contextlib
import errno
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from sparseinst.checkpoint import check_weights_file, checkpointer_from_config
from sparseinst.config import load_config, resolve_config_file
from sparseinst.data.coco_json import check_num_classes, class_info, log_data_warnings, register_user_datasets
from sparseinst.engine.finite import NonFiniteStepError
from sparseinst.engine.host_memory import keep_freed_memory_for_inference
from sparseinst.engine.interruption import TrainingInterrupted
from sparseinst.engine.output_folder import check_free_space, check_no_earlier_run, claimed
from sparseinst.engine.processes import (
    add_process_arguments,
    check_device,
    check_process_arguments,
    exit_with_error,
    run_processes,
)
from sparseinst.engine.trainer import RUN_ERRORS, Trainer, check_test_config
from sparseinst.evaluation import evaluate
from sparseinst.runtime.optimize import optimize_as_configured

DATA_FLAGS = {
    "--train-json": "COCO json to train on, in place of DATASETS.TRAIN",
    "--train-images": "folder of its images",
    "--test-json": "COCO json to evaluate on, in place of DATASETS.TEST",
    "--test-images": "folder of its images",
}


def build_parser() -> argparse.ArgumentParser:
    """Detectron2's arguments, those for a user's own data, and those for several processes."""
    parser = default_argument_parser(
        epilog="KEY VALUE pairs at the end override the config file, for example: SOLVER.IMS_PER_BATCH 8"
    )
    for flag, meaning in DATA_FLAGS.items():
        parser.add_argument(flag, default="", metavar="PATH", help=meaning)
    add_process_arguments(parser)
    return parser


# The disk, or the user's share of it, is full; a file is too large.
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def setup(args: argparse.Namespace, stack: contextlib.ExitStack) -> CfgNode:
    """Config, data sets, output folder, loggers and seed of one process.

    Args:
        args: what :func:`build_parser` gives.
        stack: holds OUTPUT_DIR until it is closed.

    Raises:
        ValueError: whatever is wrong with the arguments, the config, the data sets or OUTPUT_DIR.
    """
    if not args.config_file:
        raise ValueError("--config-file is missing: a YAML file, or a name such as sparse_inst_r50_giam")
    args.config_file = resolve_config_file(args.config_file)
    cfg = load_config(args.config_file, args.opts)
    check_device(cfg.MODEL.DEVICE)
    for flag in DATA_FLAGS:
        name = flag.removeprefix("--").replace("-", "_")
        if getattr(args, name):
            cfg.DATASETS[name.upper()] = getattr(args, name)
    # In every process, also in those that launch() has spawned, so that all know the data.
    splits = ("TEST",) if args.eval_only else ("TRAIN", "TEST")
    register_user_datasets(cfg, splits)
    check_num_classes(cfg, splits)
    if args.eval_only:
        check_test_config(cfg)
    if not args.resume:
        check_weights_file(cfg.MODEL.WEIGHTS)
    cfg.freeze()
    if comm.is_main_process():
        stack.enter_context(claimed(cfg.OUTPUT_DIR))
    if not args.eval_only and not args.resume:
        check_no_earlier_run(cfg.OUTPUT_DIR)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="sparseinst")
    log_data_warnings(cfg, splits)
    default_setup(cfg, args)
    if args.eval_only:
        keep_freed_memory_for_inference(cfg)
    return cfg


def main(args: argparse.Namespace) -> dict:
    """Train, or evaluate with ``--eval-only``, in one process.

    Returns:
        The evaluation's results.
    """
    with contextlib.ExitStack() as stack:
        try:
            cfg = setup(args, stack)
            run = _prepare_evaluation(cfg, args) if args.eval_only else _prepare_training(cfg, args)
        except (ValueError, FileNotFoundError) as error:
            # FileNotFoundError: a builtin data set that is not on this machine.
            exit_with_error(error)
        try:
            results = run()
        except NonFiniteStepError as error:
            # It is the same on all ranks.
            exit_with_error(error)
        except RUN_ERRORS as error:
            sys.exit(f"error: {error}")
        except TrainingInterrupted as error:
            if comm.get_local_rank():
                # After an error the launcher would end rank 0, which may still be saving.
                return {}
            print(f"{error}. What was trained is saved in {cfg.OUTPUT_DIR}; go on with --resume", file=sys.stderr)
            sys.exit(128 + error.signal)
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            sys.exit(f"error: {error}. Make room for OUTPUT_DIR {cfg.OUTPUT_DIR}, and go on with --resume")
        if comm.is_main_process() and cfg.TEST.EXPECTED_RESULTS:
            verify_results(cfg, results)
        return results


def _prepare_evaluation(cfg: CfgNode, args: argparse.Namespace) -> Callable[[], dict]:
    model = build_model(cfg)
    model.eval()
    checkpointer = checkpointer_from_config(cfg, model, cfg.OUTPUT_DIR)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    model = optimize_as_configured(cfg, model)
    return lambda: evaluate(cfg, model)


def _prepare_training(cfg: CfgNode, args: argparse.Namespace) -> Callable[[], dict]:
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    if comm.is_main_process():
        check_free_space(cfg.OUTPUT_DIR, trainer.checkpoint_bytes())
        class_info(cfg.DATASETS.TRAIN[0]).save(Path(cfg.OUTPUT_DIR) / "classes.json")
    return trainer.train


def cli(argv: Sequence[str] | None = None) -> None:
    """The command: one process, one for each of ``--num-gpus``, or one of torchrun's."""
    args = build_parser().parse_args(argv)
    try:
        check_process_arguments(args)
    except ValueError as error:
        sys.exit(f"error: {error}")
    run_processes(main, args)


if __name__ == "__main__":
    cli()

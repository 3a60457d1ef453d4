"""Train and evaluate SparseInst: ``python train_net.py --config-file configs/sparse_inst_r50_giam.yaml``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from sparseinst.checkpoint import check_weights_file, checkpointer_from_config
from sparseinst.data.coco_json import check_num_classes, class_info, log_data_warnings, register_user_datasets
from sparseinst.engine.evaluation import evaluate_and_time
from sparseinst.engine.setup import load_config, resolve_config_file
from sparseinst.engine.trainer import Trainer, check_test_config

DATA_FLAGS = {
    "--train-json": "COCO json to train on, in place of DATASETS.TRAIN",
    "--train-images": "folder of its images",
    "--test-json": "COCO json to evaluate on, in place of DATASETS.TEST",
    "--test-images": "folder of its images",
}


def build_parser() -> argparse.ArgumentParser:
    """Detectron2's arguments, and those for a user's own data."""
    parser = default_argument_parser(
        epilog="KEY VALUE pairs at the end override the config file, for example: SOLVER.IMS_PER_BATCH 8"
    )
    for flag, meaning in DATA_FLAGS.items():
        parser.add_argument(flag, default="", metavar="PATH", help=meaning)
    return parser


def setup(args: argparse.Namespace) -> CfgNode:
    """Config, data sets, loggers and seed of one process.

    Raises:
        ValueError: whatever is wrong with the arguments, the config or the data sets.
    """
    if not args.config_file:
        raise ValueError("--config-file is missing: a YAML file, or a name such as sparse_inst_r50_giam")
    args.config_file = resolve_config_file(args.config_file)
    cfg = load_config(args.config_file, args.opts)
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
    Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="sparseinst")
    log_data_warnings(cfg, splits)
    default_setup(cfg, args)
    return cfg


def main(args: argparse.Namespace) -> dict:
    """Train, or evaluate with ``--eval-only``, in one process.

    Returns:
        The evaluation's results.
    """
    try:
        cfg = setup(args)
        if args.eval_only:
            model = build_model(cfg)
            model.eval()
            checkpointer = checkpointer_from_config(cfg, model, cfg.OUTPUT_DIR)
            checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        else:
            trainer = Trainer(cfg)
            trainer.resume_or_load(resume=args.resume)
    except (ValueError, FileNotFoundError) as error:
        # FileNotFoundError: a builtin data set that is not on this machine.
        sys.exit(f"error: {error}")

    if args.eval_only:
        results = evaluate_and_time(cfg, model)
    else:
        if comm.is_main_process():
            class_info(cfg.DATASETS.TRAIN[0]).save(Path(cfg.OUTPUT_DIR) / "classes.json")
        results = trainer.train()
    if comm.is_main_process() and cfg.TEST.EXPECTED_RESULTS:
        verify_results(cfg, results)
    return results


def cli(argv: Sequence[str] | None = None) -> None:
    """The command: one process, or one for each of ``--num-gpus``."""
    args = build_parser().parse_args(argv)
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


if __name__ == "__main__":
    cli()

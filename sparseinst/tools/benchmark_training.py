"""Time training steps: ``python -m sparseinst.tools.benchmark_training --config-file sparse_inst_r50_giam``.

The steps are the trainer's own, with the real model (random weights), optimizer and guard. The stages are timed in
further steps, which are synchronized before and after each stage. By default images are noise and ground truth is
ellipses, --instances in each image of --size, mapped beforehand, so that no step waits for data. --data shapes draws
shapes, and --data config uses DATASETS.TRAIN (or TRAIN_JSON and TRAIN_IMAGES); both use the real loader: raise
DATALOADER.NUM_WORKERS as long as "waiting for data" falls. "All but the network" is every stage except the network's
forward pass and the backward pass.
Memory is measured in a process for each setting: on CUDA the peak of PyTorch's allocator, on the CPU the largest
resident set minus that before the model.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparseinst.benchmarks.arguments import add_common_arguments
from sparseinst.config.arguments import check_least
from sparseinst.engine.console import prepare_console, with_exit_codes

if TYPE_CHECKING:
    from detectron2.config import CfgNode

# The named settings of --compare: KEY VALUE pairs below SOLVER.
NAMED_SETTINGS = {
    "configured": "",
    "plain": "CHANNELS_LAST False COMPILE False OPTIMIZER_IMPLEMENTATION auto RECOMPUTE []",
    "channels-last": "CHANNELS_LAST True",
    "fused": "OPTIMIZER_IMPLEMENTATION fused",
    "compiled": "COMPILE True",
    "recompute": "RECOMPUTE \"['backbone.*', 'encoder', 'decoder.*_branch']\"",
    "fastest": "CHANNELS_LAST True COMPILE True OPTIMIZER_IMPLEMENTATION fused",
    "bfloat16": "AMP.ENABLED True AMP.DTYPE bfloat16",
    "float16": "AMP.ENABLED True AMP.DTYPE float16",
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--data",
        choices=["ellipses", "shapes", "config"],
        default="ellipses",
        help="source of images and ground truth, see above",
    )
    add(
        "--size",
        type=int,
        nargs=2,
        default=[640, 864],
        metavar=("HEIGHT", "WIDTH"),
        help="size of drawn images, pixels",
    )
    add("--instances", type=int, default=7, metavar="N", help="ellipses in each image (default 7)")
    add("--batch-size", type=int, metavar="N", help="images in a step (default SOLVER.IMS_PER_BATCH)")
    add("--precision", choices=["float32", "bfloat16", "float16"], help="default: that of SOLVER.AMP")
    add("--device", help="default MODEL.DEVICE, or the CPU where CUDA is missing")
    add("--no-memory", action="store_true", help="do not measure memory, which needs a process for each setting")
    add_common_arguments(parser, NAMED_SETTINGS, "SOLVER", repetitions=5, warmup=1)
    return parser


@with_exit_codes()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0, or 1 where the arguments, the config or the data are wrong."""
    args = build_parser().parse_args(argv)
    prepare_console()
    from sparseinst.benchmarks.settings import run_command
    from sparseinst.engine.errors import RUN_ERRORS

    return run_command(args, run, RUN_ERRORS)


def build_configs(args: argparse.Namespace, folder: Path) -> "dict[str, CfgNode]":
    """Return the config of each setting, with the data that --data names.

    Args:
        args: of `build_parser`.
        folder: for drawn data.

    Raises:
        ValueError: the arguments, the config or the data are wrong.
    """
    from sparseinst import config
    from sparseinst.benchmarks.settings import apply_setting, check_distinct
    from sparseinst.benchmarks.training import as_training
    from sparseinst.config import load_config
    from sparseinst.data.coco_json import check_num_classes
    from sparseinst.tools.make_shapes import write_ellipses, write_shapes_dataset

    check_least(args, {"--size": 1, "--instances": 1, "--repetitions": 1, "--batch-size": 1, "--warmup": 0})
    opts = list(args.opts)
    if args.device is not None:
        opts += ["MODEL.DEVICE", args.device]
    if args.batch_size is not None:
        opts += ["SOLVER.IMS_PER_BATCH", str(args.batch_size)]
    if args.precision is not None:
        opts += ["SOLVER.AMP.ENABLED", str(args.precision != "float32")]
        opts += ["SOLVER.AMP.DTYPE", args.precision] if args.precision != "float32" else []
    cfg = load_config(args.config_file, opts, imports=args.imports)
    cfg.defrost()
    datasets = cfg.DATASETS
    if args.data == "ellipses":
        _, num_classes = config.num_classes(cfg) or (None, 80)
        drawn = write_ellipses(folder, tuple(args.size), args.instances, num_classes)
        datasets.TRAIN_JSON, datasets.TRAIN_IMAGES = map(str, drawn)
        cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (min(args.size),), max(args.size)
        cfg.INPUT.CROP.ENABLED = False
    elif args.data == "shapes":
        write_shapes_dataset(folder, 64, 0, min(args.size), split="train")
        datasets.TRAIN_JSON, datasets.TRAIN_IMAGES = str(folder / "train.json"), str(folder / "train")
    cfg = as_training(cfg)
    if not cfg.DATASETS.TRAIN:
        raise ValueError("--data config: DATASETS.TRAIN is empty; set it, or DATASETS.TRAIN_JSON and TRAIN_IMAGES")
    check_num_classes(cfg, ("TRAIN",))
    check_distinct("--compare", [setting.partition("=")[0] for setting in args.compare])
    settings = (apply_setting(cfg, setting, NAMED_SETTINGS, "SOLVER") for setting in args.compare)
    return {name: own_cfg for name, own_cfg, _ in settings}


def run(args: argparse.Namespace) -> dict:
    """Measure and print, and return all figures for a JSON file.

    Raises:
        ValueError: the arguments, the config or the data are wrong.
    """
    from sparseinst.benchmarks.settings import machine, report, table
    from sparseinst.benchmarks.training import measure_trainings

    is_drawn = args.data == "ellipses"
    with tempfile.TemporaryDirectory() as folder:
        configs = build_configs(args, Path(folder))
        cfg = next(iter(configs.values()))
        data = {
            "ellipses": f"{args.instances} ellipses in each image of {'x'.join(map(str, args.size))}, no data wait",
            "shapes": f"drawn shapes of {min(args.size)} pixels",
            "config": ", ".join(cfg.DATASETS.TRAIN),
        }[args.data]
        precision = cfg.SOLVER.AMP.DTYPE if cfg.SOLVER.AMP.ENABLED else "float32"
        print(f"{args.config_file}, batch of {cfg.SOLVER.IMS_PER_BATCH}, {precision}, {machine(cfg)}; {data}")
        measurements = measure_trainings(
            configs,
            caches_batches=is_drawn,
            repetitions=args.repetitions,
            warmup=args.warmup,
            with_memory=not args.no_memory,
        )
    figures = report(measurements)
    print(f"{args.repetitions} repetitions after {args.warmup}; ms a step (5th, 95th percentile)\n\n{table(figures)}")
    return {"config": args.config_file, "machine": machine(cfg), "data": data, "settings": figures}


if __name__ == "__main__":
    sys.exit(main())

"""How long a training step takes: ``python -m sparseinst.tools.benchmark_training --config-file sparse_inst_r50_giam``.

The trainer's own steps, with the real model (random weights), optimizer and guard, timed stage by stage, each after the
device has finished. By default images are noise and ground truth is ellipses, --instances of them in each picture of
--size, which the data set's mapper has prepared before, so that no step waits for data; --data shapes draws shapes, and
--data config takes DATASETS.TRAIN (or TRAIN_JSON and TRAIN_IMAGES), both through the real loader with its workers, and
say how many images a worker reads in a second. "All but the network" is every stage but the network's own forward and
backward pass; the criterion's backward pass counts as such a stage. Memory is measured in a process for each setting:
on CUDA what PyTorch's allocator gave out at most, on the CPU the largest resident set above that before the model.
"""

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils.logger import setup_logger
from tabulate import tabulate

from sparseinst.config import load_config
from sparseinst.data.coco_json import check_num_classes
from sparseinst.data.ellipses import write_ellipses
from sparseinst.data.loader import build_train_loader
from sparseinst.data.synthetic import write_shapes_dataset
from sparseinst.engine.benchmark import ratio, summarize
from sparseinst.engine.benchmark_settings import apply_setting, machine
from sparseinst.engine.trainer import RUN_ERRORS
from sparseinst.engine.training_benchmark import (
    STAGES,
    Measurement,
    as_training,
    as_training_of,
    images_per_second,
    measure,
)

# What has a name of its own in --compare; each is KEY VALUE pairs below SOLVER.
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
PRECISIONS = ("float32", "bfloat16", "float16")
# Images that the speed of a worker is measured with.
WORKER_IMAGES = 64


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m sparseinst.tools.benchmark_training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config-file", required=True, help="YAML file, or the name of one that comes with the package"
    )
    parser.add_argument("--data", choices=["ellipses", "shapes", "config"], default="ellipses", help="see above")
    parser.add_argument(
        "--size", type=int, nargs=2, default=[640, 864], metavar=("HEIGHT", "WIDTH"), help="of made pictures, pixels"
    )
    parser.add_argument("--instances", type=int, default=7, metavar="N", help="ellipses in each image (default 7)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images in a step (default SOLVER.IMS_PER_BATCH)")
    parser.add_argument("--precision", choices=PRECISIONS, help="default: as SOLVER.AMP has it")
    parser.add_argument("--device", help="default MODEL.DEVICE, or the CPU where there is none such")
    parser.add_argument("--threads", type=int, metavar="N", help="of PyTorch on the CPU")
    parser.add_argument("--repetitions", type=int, default=5, metavar="N", help="kept (default 5)")
    parser.add_argument("--warmup", type=int, default=1, metavar="N", help="repetitions before them (default 1)")
    parser.add_argument(
        "--no-memory", action="store_true", help="leave memory out: no further process for each setting"
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        metavar="SETTING",
        default=["configured"],
        help=f"ways to train, in turn in one process: {', '.join(NAMED_SETTINGS)}, or NAME='KEY VALUE ...' with keys "
        "below SOLVER, or whole ones. Ratios are against the first",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config overrides, last"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0; 2 where the arguments, the config or the data do not allow it."""
    args = build_parser().parse_args(argv)
    for name in ("fvcore", "detectron2", "sparseinst"):
        setup_logger(name=name).setLevel(logging.WARNING)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        try:
            configs = build_configs(args, Path(folder))
            report = run(args, configs)
        except (ValueError, *RUN_ERRORS) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def build_configs(args: argparse.Namespace, folder: Path) -> dict[str, CfgNode]:
    """The config of each setting, with the data that is asked for.

    Args:
        args: what :func:`build_parser` gives.
        folder: where data can be written.

    Raises:
        ValueError: whatever is wrong with the arguments, the config or the data.
    """
    _check(args)
    opts = list(args.opts)
    if args.device is not None:
        opts += ["MODEL.DEVICE", args.device]
    if args.batch_size is not None:
        opts += ["SOLVER.IMS_PER_BATCH", str(args.batch_size)]
    if args.precision is not None:
        opts += ["SOLVER.AMP.ENABLED", str(args.precision != "float32")]
        opts += ["SOLVER.AMP.DTYPE", args.precision] if args.precision != "float32" else []
    cfg = load_config(args.config_file, opts)
    num_classes = cfg.MODEL.SPARSE_INST.DECODER.NUM_CLASSES
    size = tuple(args.size)
    if args.data == "ellipses":
        cfg = as_training_of(cfg, *write_ellipses(folder, size, args.instances, num_classes), size)
    elif args.data == "shapes":
        write_shapes_dataset(folder, 64, 0, min(size), split="train")
        cfg = as_training_of(cfg, folder / "train.json", folder / "train")
    else:
        cfg = as_training(cfg)
    if not cfg.DATASETS.TRAIN:
        raise ValueError("--data config: DATASETS.TRAIN is empty; set it, or DATASETS.TRAIN_JSON and TRAIN_IMAGES")
    check_num_classes(cfg, ("TRAIN",))
    return {
        name: own_cfg
        for name, own_cfg, _ in (apply_setting(cfg, text, NAMED_SETTINGS, "SOLVER") for text in args.compare)
    }


def run(args: argparse.Namespace, configs: dict[str, CfgNode]) -> dict:
    """Measure and print. Returns everything that was measured, for a JSON file."""
    cfg = next(iter(configs.values()))
    data = {
        "ellipses": f"{args.instances} ellipses in each picture of {args.size[0]}x{args.size[1]}, no waiting for data",
        "shapes": f"drawn shapes of {min(args.size)} pixels",
        "config": ", ".join(cfg.DATASETS.TRAIN),
    }[args.data]
    print(f"{args.config_file}, batch of {cfg.SOLVER.IMS_PER_BATCH}, {_precision(cfg)}, {machine(cfg)}; {data}")
    measurements = measure(
        configs,
        keeps_batches=args.data == "ellipses",
        repetitions=args.repetitions,
        warmup=args.warmup,
        with_memory=not args.no_memory,
    )
    print(f"{args.repetitions} repetitions after {args.warmup}; ms a step (5th, 95th percentile), share\n")
    print(table(measurements))
    report = {
        "config": args.config_file,
        "machine": machine(cfg),
        "data": data,
        "settings": as_dict(measurements),
    }
    if args.data != "ellipses":
        speed = images_per_second(build_train_loader(cfg, cfg.SEED), WORKER_IMAGES)
        report["images_per_second_and_worker"] = speed
        first = next(iter(measurements.values()))
        needed = first.batch_size / float(np.median(first.totals))
        print(
            f"\nA worker reads {speed:.1f} images/s; the steps of {next(iter(configs))} take {needed:.1f}: "
            f"{needed / speed:.2f} workers' work. DATALOADER.NUM_WORKERS is {cfg.DATALOADER.NUM_WORKERS}"
        )
    return report


def table(measurements: dict[str, Measurement]) -> str:
    """What was measured, a column for each setting."""
    baseline = next(iter(measurements.values())).totals
    columns = []
    for measured in measurements.values():
        shares = np.median(measured.stages / measured.stages.sum(1, keepdims=True), axis=0)
        column = [f"{_interval(stage)} {share:.1%}" for stage, share in zip(measured.stages.T, shares)]
        outside = measured.outside_network()
        low, middle, high = np.percentile(outside, [5, 50, 95])
        against = ratio(baseline, measured.totals)
        column += [
            _interval(measured.totals),
            f"{_interval(outside * measured.stages.sum(1))} {middle:.1%} ({low:.1%}, {high:.1%})",
            f"{measured.batch_size / np.median(measured.totals):.2f}",
            "not measured" if measured.peak_bytes is None else f"{measured.peak_bytes / 2**20:.0f}",
            f"{against['median']:.2f} ({against['p5']:.2f}, {against['p95']:.2f})",
        ]
        columns.append(column)
    rows = [
        *STAGES,
        "step",
        "all but the network",
        "images/s",
        "peak MB",
        f"times as fast as {next(iter(measurements))}",
    ]
    return tabulate(list(zip(rows, *columns)), headers=["", *measurements], tablefmt="github", disable_numparse=True)


def as_dict(measurements: dict[str, Measurement]) -> dict:
    """What was measured, for a JSON file."""
    baseline = next(iter(measurements.values())).totals
    return {
        name: {
            **{stage: summarize(values) for stage, values in zip(STAGES, measured.stages.T)},
            "step": summarize(measured.totals),
            "share_of_all_but_the_network": float(np.median(measured.outside_network())),
            "images_per_second": measured.batch_size / float(np.median(measured.totals)),
            "peak_mb": None if measured.peak_bytes is None else measured.peak_bytes / 2**20,
            "times_as_fast_as_first": ratio(baseline, measured.totals),
        }
        for name, measured in measurements.items()
    }


def _check(args: argparse.Namespace) -> None:
    least = {
        "--size": (min(args.size), 1),
        "--instances": (args.instances, 1),
        "--batch-size": (1 if args.batch_size is None else args.batch_size, 1),
        "--threads": (1 if args.threads is None else args.threads, 1),
        "--repetitions": (args.repetitions, 1),
        "--warmup": (args.warmup, 0),
    }
    for flag, (value, limit) in least.items():
        if value < limit:
            raise ValueError(f"{flag} has {value}; it must be at least {limit}")


def _precision(cfg: CfgNode) -> str:
    return cfg.SOLVER.AMP.DTYPE if cfg.SOLVER.AMP.ENABLED else "float32"


def _interval(values: np.ndarray) -> str:
    summary = summarize(values)
    return f"{summary['median_ms']:.1f} ({summary['p5_ms']:.1f}, {summary['p95_ms']:.1f})"


if __name__ == "__main__":
    sys.exit(main())

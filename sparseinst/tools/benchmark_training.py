"""How long a training step takes: ``python -m sparseinst.tools.benchmark_training --config-file sparse_inst_r50_giam``.

Times the trainer's own steps, with the real model (random weights), optimizer and guard. The stages come from further
steps in PyTorch's profiler. By default images are noise and ground truth is ellipses, --instances of them in each image
of --size, mapped beforehand, so that no step waits for data. --data shapes draws shapes, and --data config takes
DATASETS.TRAIN (or TRAIN_JSON and TRAIN_IMAGES); both go through the real loader with its workers, and print how many
images a worker reads per second. "All but the network" is every stage but the network's forward pass and the backward
pass. Memory is measured in a process for each setting: on CUDA the peak of PyTorch's allocator, on the CPU the largest
resident set above that before the model.
"""

import argparse
import functools
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

from sparseinst.benchmarks.settings import apply_setting, check_least, interval, machine, ratio, summarize
from sparseinst.benchmarks.training import STAGES, Measurement, as_training, images_per_second, measure
from sparseinst.data.coco_json import check_num_classes
from sparseinst.data.ellipses import write_ellipses
from sparseinst.data.loader import build_train_loader
from sparseinst.data.synthetic import write_shapes_dataset
from sparseinst.engine.setup import load_config
from sparseinst.engine.trainer import RUN_ERRORS

# Names that --compare knows; each is KEY VALUE pairs below SOLVER.
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
# The key that drawn data takes its number of classes from.
NUM_CLASSES = "MODEL.SPARSE_INST.DECODER.NUM_CLASSES"
# Images that the speed of a worker is measured with.
_WORKER_IMAGES = 64


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m sparseinst.tools.benchmark_training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config-file", required=True, help="YAML file, or the name of one that comes with the package")
    add("--data", choices=["ellipses", "shapes", "config"], default="ellipses", help="see above")
    add("--size", type=int, nargs=2, default=[640, 864], metavar=("HEIGHT", "WIDTH"), help="of drawn images, pixels")
    add("--instances", type=int, default=7, metavar="N", help="ellipses in each image (default 7)")
    add("--batch-size", type=int, metavar="N", help="images in a step (default SOLVER.IMS_PER_BATCH)")
    add("--precision", choices=PRECISIONS, help="default: as SOLVER.AMP says")
    add("--device", help="default MODEL.DEVICE, or the CPU where that is missing")
    add("--threads", type=int, metavar="N", help="of PyTorch on the CPU")
    add("--repetitions", type=int, default=5, metavar="N", help="counted ones (default 5)")
    add("--warmup", type=int, default=1, metavar="N", help="repetitions before them (default 1)")
    add("--no-memory", action="store_true", help="leave memory out: no further process for each setting")
    add("--compare", nargs="+", metavar="SETTING", default=["configured"],
        help=f"settings to train with, in turn in one process: {', '.join(NAMED_SETTINGS)}, or NAME='KEY VALUE ...' "
        "with keys below SOLVER, or full ones. Ratios are against the first")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    add("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config overrides, last")
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
            report = run(args, build_configs(args, Path(folder)))
        except (ValueError, *RUN_ERRORS) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def build_configs(args: argparse.Namespace, folder: Path) -> dict[str, CfgNode]:
    """Return the config of each setting, with the data that --data names.

    Args:
        args: of :func:`build_parser`.
        folder: where data can be written.

    Raises:
        ValueError: the arguments, the config or the data cannot be used.
    """
    optional = {"--batch-size": args.batch_size, "--threads": args.threads}
    least = {"--size": min(args.size), "--instances": args.instances, "--repetitions": args.repetitions}
    least |= {flag: value for flag, value in optional.items() if value is not None}
    check_least({flag: (value, 1) for flag, value in least.items()} | {"--warmup": (args.warmup, 0)})
    opts = list(args.opts)
    if args.device is not None:
        opts += ["MODEL.DEVICE", args.device]
    if args.batch_size is not None:
        opts += ["SOLVER.IMS_PER_BATCH", str(args.batch_size)]
    if args.precision is not None:
        opts += ["SOLVER.AMP.ENABLED", str(args.precision != "float32")]
        opts += ["SOLVER.AMP.DTYPE", args.precision] if args.precision != "float32" else []
    cfg = load_config(args.config_file, opts)
    cfg.defrost()
    datasets = cfg.DATASETS
    if args.data == "ellipses":
        num_classes = functools.reduce(lambda node, name: node[name], NUM_CLASSES.split("."), cfg)
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
    settings = (apply_setting(cfg, setting, NAMED_SETTINGS, "SOLVER") for setting in args.compare)
    return {name: own_cfg for name, own_cfg, _ in settings}


def run(args: argparse.Namespace, configs: dict[str, CfgNode]) -> dict:
    """Measure and print. Returns all figures, for a JSON file."""
    cfg = next(iter(configs.values()))
    data = {
        "ellipses": f"{args.instances} ellipses in each image of {args.size[0]}x{args.size[1]}, no waiting for data",
        "shapes": f"drawn shapes of {min(args.size)} pixels",
        "config": ", ".join(cfg.DATASETS.TRAIN),
    }[args.data]
    precision = cfg.SOLVER.AMP.DTYPE if cfg.SOLVER.AMP.ENABLED else "float32"
    print(f"{args.config_file}, batch of {cfg.SOLVER.IMS_PER_BATCH}, {precision}, {machine(cfg)}; {data}")
    is_drawn = args.data == "ellipses"
    measurements = measure(
        configs,
        caches_batches=is_drawn,
        repetitions=args.repetitions,
        warmup=args.warmup,
        with_memory=not args.no_memory,
    )
    print(f"{args.repetitions} repetitions after {args.warmup}; ms a step (5th, 95th percentile), share\n")
    print(table(measurements))
    report = {"config": args.config_file, "machine": machine(cfg), "data": data, "settings": as_dict(measurements)}
    if not is_drawn:
        speed = images_per_second(build_train_loader(cfg, cfg.SEED), _WORKER_IMAGES)
        report["images_per_second_and_worker"] = speed
        name, figures = next(iter(report["settings"].items()))
        needed = figures["images_per_second"]
        print(
            f"\nA worker reads {speed:.1f} images/s; the steps of {name} take {needed:.1f}: "
            f"{needed / speed:.2f} workers' work. DATALOADER.NUM_WORKERS is {cfg.DATALOADER.NUM_WORKERS}"
        )
    return report


def table(measurements: dict[str, Measurement]) -> str:
    """Return a column for each setting."""
    columns = []
    for name, figures in as_dict(measurements).items():
        measured, against = measurements[name], figures["times_as_fast_as_first"]
        shares = np.median(measured.stages / measured.stages.sum(1, keepdims=True), axis=0)
        columns.append(
            [f"{interval(stage)} {share:.1%}" for stage, share in zip(measured.stages.T, shares)]
            + [interval(measured.totals), f"{figures['share_of_all_but_the_network']:.1%}"]
            + [f"{figures['images_per_second']:.2f}"]
            + ["not measured" if figures["peak_mb"] is None else f"{figures['peak_mb']:.0f}"]
            + [f"{against['median']:.2f} ({against['p5']:.2f}, {against['p95']:.2f})"]
        )
    first = next(iter(measurements))
    rows = [*STAGES, "step", "all but the network", "images/s", "peak MB", f"times as fast as {first}"]
    return tabulate(list(zip(rows, *columns)), headers=["", *measurements], tablefmt="github", disable_numparse=True)


def as_dict(measurements: dict[str, Measurement]) -> dict[str, dict]:
    """Return the figures of each setting, for a JSON file."""
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


if __name__ == "__main__":
    sys.exit(main())

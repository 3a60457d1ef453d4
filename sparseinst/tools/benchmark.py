"""How fast a model is, stage by stage: ``python -m sparseinst.tools.benchmark --config-file sparse_inst_r50_giam``.

No data set and no weights are needed: they may be random, since the time does not depend on them. Pictures are random
too, or given. The network runs on them; post-processing then gets drawn objects, --detections of them in each picture,
because random weights would let every prediction pass, with noise for masks. Timed are, each after the device has
finished: preprocessing (from a decoded picture: resizing, normalising, padding), network, post-processing (to boolean
masks of the picture's size, or what MASK_FORMAT says), copy to the host. "As published" is network and
post-processing, "end to end" all four. Reading and decoding files, and drawing, are not timed.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluators, inference_on_dataset
from detectron2.modeling import build_model
from detectron2.utils.logger import setup_logger
from tabulate import tabulate
from torch import nn

from sparseinst.config import load_config
from sparseinst.data.augmentations import build_test_augmentations
from sparseinst.data.images import read_image
from sparseinst.engine.benchmark import STAGES, Measurement, PlainSparseInst, measure, ratio, summarize
from sparseinst.engine.benchmark_settings import apply_setting, machine
from sparseinst.engine.host_memory import keep_freed_memory_for_inference
from sparseinst.modeling.optimization import optimize_as_configured
from sparseinst.modeling.sparse_inst import SparseInst

# What has a name of its own in --compare; each is KEY VALUE pairs below RUNTIME.
NAMED_SETTINGS = {
    "configured": "",
    "eager": "FUSE False CHANNELS_LAST False",
    "fused": "FUSE True CHANNELS_LAST False",
    "fused-channels-last": "FUSE True CHANNELS_LAST True WINOGRAD False",
    "winograd": "FUSE True CHANNELS_LAST True WINOGRAD True",
    "compiled": "FUSE True CHANNELS_LAST True WINOGRAD True COMPILE True",
    "bfloat16": "PRECISION bfloat16",
    "float16": "PRECISION float16",
    "openvino": "ENGINE openvino",
    "openvino-plain": "ENGINE openvino WINOGRAD False",
}
PLAIN = "plain"
INFERENCE = "RUNTIME"


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m sparseinst.tools.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config-file", required=True, help="YAML file, or the name of one that comes with the package"
    )
    parser.add_argument("--input", nargs="+", metavar="PICTURE", default=[], help="pictures (default: random ones)")
    parser.add_argument(
        "--size", type=int, nargs=2, default=[480, 640], metavar=("HEIGHT", "WIDTH"), help="of random pictures, pixels"
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1], metavar="N", help="images in a batch")
    parser.add_argument("--detections", type=int, default=20, metavar="N", help="objects in each image (default 20)")
    parser.add_argument(
        "--area",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="of the picture, that half of the objects are smaller than (default 0.05); 1: each fills the picture",
    )
    parser.add_argument("--repetitions", type=int, default=20, metavar="N", help="kept (default 20)")
    parser.add_argument("--warmup", type=int, default=2, metavar="N", help="repetitions before them (default 2)")
    parser.add_argument("--threads", type=int, metavar="N", help="of PyTorch on the CPU")
    parser.add_argument(
        "--compare",
        nargs="+",
        metavar="SETTING",
        default=["configured"],
        help=f"ways to run the model, in turn in one process: {PLAIN} (the model as built, post-processing as "
        f"published), {', '.join(NAMED_SETTINGS)}, or NAME='KEY VALUE ...' with keys below {INFERENCE}, or whole ones. "
        "Ratios are against the first",
    )
    parser.add_argument(
        "--stock", action="store_true", help="also print what Detectron2's inference_on_dataset says of the first"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config overrides, last"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0; 2 where the arguments or the config do not allow it."""
    args = build_parser().parse_args(argv)
    for name in ("fvcore", "detectron2", "sparseinst"):
        setup_logger(name=name).setLevel(logging.WARNING)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        cfg = load_config(args.config_file, args.opts)
        pictures = _pictures(args, cfg)
        keep_freed_memory_for_inference(cfg)
        models = build_models(cfg, args.compare)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report = {"config": args.config_file, "machine": machine(cfg), "detections": args.detections, "batches": []}
    print(f"{args.config_file}, {report['machine']}, {args.detections} objects in each picture of {_sizes(pictures)}")
    for batch_size in args.batch_sizes:
        batch = [pictures[index % len(pictures)] for index in range(batch_size)]
        measurements = measure(
            models,
            batch,
            build_test_augmentations(cfg),
            num_detections=args.detections,
            repetitions=args.repetitions,
            warmup=args.warmup,
            median_area=args.area,
        )
        print(f"\nBatch of {batch_size}, {args.repetitions} repetitions after {args.warmup}\n{table(measurements)}")
        report["batches"].append({"batch_size": batch_size, "settings": as_dict(measurements)})
    if args.stock:
        _print_stock_speed(next(iter(models.values())), pictures, cfg)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def build_models(cfg: CfgNode, settings: Sequence[str]) -> dict[str, nn.Module]:
    """One model, run in each of the ways; weights are MODEL.WEIGHTS' shapes at random.

    Raises:
        ValueError: an unknown setting, or a model that is no SparseInst.
        ImportError: a setting needs a package that is not installed.
    """
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    if not isinstance(model, SparseInst):
        raise ValueError(f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}; the benchmark runs a SparseInst")
    models: dict[str, nn.Module] = {}
    for setting in settings:
        if setting == PLAIN:
            models[PLAIN] = PlainSparseInst(model)
            continue
        name, own_cfg, keys = apply_setting(cfg, setting, NAMED_SETTINGS, INFERENCE, [PLAIN])
        # Other keys than those of INFERENCE shape the model itself.
        is_other = any(not key.startswith(f"{INFERENCE}.") for key in keys)
        models[name] = optimize_as_configured(own_cfg, build_model(own_cfg).eval() if is_other else model)
    return models


def table(measurements: dict[str, Measurement]) -> str:
    """What was measured, a row for each setting; times are milliseconds for a batch: median (5th, 95th percentile)."""
    names = list(measurements)
    baseline = measurements[names[0]].total()
    rows = []
    for name, measured in measurements.items():
        columns = [*measured.stages.T, measured.published(), measured.total()]
        against = ratio(baseline, measured.total())
        rows.append(
            [
                name,
                *map(_interval, columns),
                f"{measured.batch_size / np.median(measured.total()):.2f}",
                f"{measured.peak_bytes / 2**20:.0f}",
                f"{against['median']:.2f} ({against['p5']:.2f}, {against['p95']:.2f})",
            ]
        )
    headers = ["", *STAGES, "as published", "end to end", "images/s", "peak MB", f"times as fast as {names[0]}"]
    parts = [
        f"{name}: " + ", ".join(f"{part} {1e3 * seconds:.1f}" for part, seconds in measured.parts.items())
        for name, measured in measurements.items()
        if measured.parts
    ]
    text = tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
    return text + ("\nParts of the network, one by one, ms. " + "; ".join(parts) if parts else "")


def as_dict(measurements: dict[str, Measurement]) -> dict:
    """What was measured, for a JSON file."""
    baseline = next(iter(measurements.values())).total()
    return {
        name: {
            **{stage: summarize(values) for stage, values in zip(STAGES, measured.stages.T)},
            "as published": summarize(measured.published()),
            "end to end": summarize(measured.total()),
            "parts_ms": {part: 1e3 * seconds for part, seconds in measured.parts.items()},
            "images_per_second": measured.batch_size / float(np.median(measured.total())),
            "peak_mb": measured.peak_bytes / 2**20,
            "times_as_fast_as_first": ratio(baseline, measured.total()),
        }
        for name, measured in measurements.items()
    }


def _pictures(args: argparse.Namespace, cfg: CfgNode) -> list[np.ndarray]:
    least = {"--size": min(args.size), "--batch-sizes": min(args.batch_sizes), "--repetitions": args.repetitions}
    for flag, value in least.items():
        if value < 1:
            raise ValueError(f"{flag} has {value}; it must be at least 1")
    num_masks = cfg.MODEL.SPARSE_INST.DECODER.NUM_MASKS
    if args.area <= 0:
        raise ValueError(f"--area is {args.area}; it must be above 0")
    if not 0 <= args.detections <= num_masks:
        raise ValueError(
            f"--detections is {args.detections}; MODEL.SPARSE_INST.DECODER.NUM_MASKS allows 0 to {num_masks}"
        )
    if args.input:
        return [read_image(path, cfg.INPUT.FORMAT, cfg.INPUT.MAX_IMAGE_PIXELS) for path in args.input]
    return [np.random.default_rng(0).integers(0, 256, (*args.size, 3), dtype=np.uint8)]


def _sizes(pictures: Sequence[np.ndarray]) -> str:
    return ", ".join(sorted({f"{picture.shape[0]}x{picture.shape[1]}" for picture in pictures}))


def _interval(values: np.ndarray) -> str:
    summary = summarize(values)
    return f"{summary['median_ms']:.1f} ({summary['p5_ms']:.1f}, {summary['p95_ms']:.1f})"


class _Runner(nn.Module):
    """The four methods as one call, for Detectron2."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: list[dict]) -> list[dict]:
        images = self.model.preprocess_image(inputs)
        return self.model.postprocess(self.model.network(images.tensor), inputs, images)


def _print_stock_speed(model: nn.Module, pictures: Sequence[np.ndarray], cfg: CfgNode) -> None:
    """Detectron2's own figure: its warm-up is 5 batches, and random weights keep what they keep."""
    inputs = []
    for picture in pictures:
        image = torch.from_numpy(np.ascontiguousarray(_resized(picture, cfg).transpose(2, 0, 1)))
        inputs.append([{"image": image, "height": picture.shape[0], "width": picture.shape[1]}])
    setup_logger(name="detectron2").setLevel(logging.INFO)
    inference_on_dataset(_Runner(model).eval(), inputs * max(1, 12 // len(inputs)), DatasetEvaluators([]))


def _resized(picture: np.ndarray, cfg: CfgNode) -> np.ndarray:
    for augmentation in build_test_augmentations(cfg):
        picture = augmentation.get_transform(picture).apply_image(picture)
    return picture


if __name__ == "__main__":
    sys.exit(main())

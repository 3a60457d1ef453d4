"""Time a model stage by stage: ``python -m sparseinst.tools.benchmark --config-file sparse_inst_r50_giam``.

The command needs neither a data set nor weights, because random weights take the same time. Images are random, or given
by --input. The network runs on them; post-processing gets drawn objects instead, --detections in each image, because
random weights would let every prediction pass, with noise for masks. The stages are preprocessing (resizing,
normalizing and padding of a decoded image), network, post-processing (to masks of the image's size, in the configured
format) and the copy to the host. "As published" is network and post-processing, "end to end" all four. Reading,
decoding and drawing are not timed.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparseinst.benchmarks.arguments import add_common_arguments
from sparseinst.config.arguments import CONFIG_HELP, check_least
from sparseinst.engine.console import prepare_console, with_exit_codes

if TYPE_CHECKING:
    from detectron2.config import CfgNode
    from torch import nn

# The config node of inference.
RUNTIME = "RUNTIME"
# Of PyTorch's network; an exported file has none of them.
PYTORCH_KEYS = [f"{RUNTIME}.{key}" for key in ("FUSE", "CHANNELS_LAST", "WINOGRAD", "COMPILE")]
# Options that --suite does not have, by attribute.
NOT_OF_SUITES = {
    "compare": "--compare",
    "detections": "--detections",
    "batch_sizes": "--batch-sizes",
    "area": "--area",
    "imports": "--import",
}
# The named settings of --compare: KEY VALUE pairs below RUNTIME.
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
    "openvino-without-winograd": "ENGINE openvino WINOGRAD False",
    "openvino-bfloat16": "ENGINE openvino PRECISION bfloat16",
    "onnxruntime": "ENGINE onnxruntime",
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--suite",
        # The names in sparseinst.benchmarks.suites, which imports PyTorch.
        choices=["realtime"],
        help="time models of every family and Detectron2's Mask R-CNN in turn, at their own and at one common size, "
        "with 50 and 100 objects; --config-file adds configs, also of Detectron2's model zoo",
    )
    add("--plot", type=Path, metavar="PNG", help="with --suite: plot published AP against the measured time")
    add("--input", nargs="+", metavar="IMAGE", default=[], help="image files (default: a random image)")
    add(
        "--size",
        type=int,
        nargs=2,
        default=[480, 640],
        metavar=("HEIGHT", "WIDTH"),
        help="size of random images, pixels",
    )
    add("--batch-sizes", type=int, nargs="+", default=[1], metavar="N", help="images in a batch")
    add("--detections", type=int, default=20, metavar="N", help="objects in each image (default 20)")
    add("--area", type=float, default=0.05, metavar="SHARE",
        help="median area of the objects, as a share of the image (default 0.05); 1: each fills the image")  # fmt: skip
    add("--busy", type=int, default=0, metavar="N",
        help="run N spinning processes meanwhile, as on a shared server (default 0)")  # fmt: skip
    several = f"{CONFIG_HELP}; several are run in turn in one process, each at its own test size"
    add_common_arguments(
        parser,
        NAMED_SETTINGS,
        RUNTIME,
        repetitions=20,
        warmup=2,
        nargs="+",
        metavar="NAME",
        help=several,
        required=False,
        default=[],
    )
    return parser


@with_exit_codes()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0, or 1 where the arguments or the config are wrong."""
    parser = build_parser()
    args = parser.parse_args(argv)
    # Attributes that exist get no defaults.
    explicit = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(NOT_OF_SUITES)))
    args.refused = [flag for name, flag in NOT_OF_SUITES.items() if getattr(explicit, name) is not None]
    prepare_console()
    from sparseinst.benchmarks.settings import run_command

    return run_command(args, run)


def run(args: argparse.Namespace) -> dict:
    """Measure and print, and return all figures for a JSON file.

    Raises:
        ValueError: the arguments or the config are wrong.
        ImportError: a setting needs a package that is not installed.
    """
    import numpy as np
    from detectron2.data import transforms as T

    from sparseinst.benchmarks.inference import measure_models
    from sparseinst.benchmarks.settings import busy_processes, check_distinct, machine, report, short_names, table
    from sparseinst.config import load_config
    from sparseinst.data.augmentations import build_test_augmentations
    from sparseinst.data.images import read_image
    from sparseinst.engine.host_memory import keep_freed_memory_for_inference

    check_least(args, {"--size": 1, "--batch-sizes": 1, "--repetitions": 1, "--warmup": 0, "--busy": 0})
    if args.suite:
        refused = args.refused + ["a second --input"] * (len(args.input) > 1)
        if refused:
            raise ValueError(f"--suite has its own settings and one image; leave out {', '.join(refused)}")
        with busy_processes(args.busy):
            return run_named_suite(args)
    if not args.config_file:
        raise ValueError("Give --config-file or --suite")
    if args.plot is not None:
        raise ValueError("--plot needs --suite")
    if args.area <= 0:
        raise ValueError(f"--area is {args.area}; it must be above 0")
    cfgs = {
        config_file: load_config(config_file, args.opts, imports=args.imports)
        for config_file in dict.fromkeys(args.config_file)
    }
    # The order of the channels changes no time.
    cfg = next(iter(cfgs.values()))
    images = [read_image(path, cfg.INPUT.FORMAT, cfg.INPUT.MAX_IMAGE_PIXELS) for path in args.input]
    images = images or [np.random.default_rng(0).integers(0, 256, (*args.size, 3), dtype=np.uint8)]
    keep_freed_memory_for_inference(cfg)
    models, augmentations = {}, {}
    config_names = short_names([Path(config_file).with_suffix("") for config_file in cfgs])
    check_distinct("--config-file", config_names)
    for config_name, own_cfg in zip(config_names, cfgs.values()):
        for setting, (model, model_cfg) in build_models(own_cfg, args.compare).items():
            name = " ".join([config_name] * (len(cfgs) > 1) + [setting] * (len(args.compare) > 1))
            name = name or setting
            models[name] = model
            augmentations[name] = T.AugmentationList(build_test_augmentations(model_cfg))
    found = {
        "configs": list(cfgs),
        "busy": args.busy,
        "machine": machine(cfg),
        "detections": args.detections,
        "batches": [],
    }
    sizes = ", ".join(sorted({f"{image.shape[0]}x{image.shape[1]}" for image in images}))
    busy = f", with {args.busy} spinning processes" if args.busy else ""
    print(f"{', '.join(cfgs)}, {found['machine']}{busy}, {args.detections} objects in each image of {sizes}")
    for batch_size in args.batch_sizes:
        with busy_processes(args.busy):
            measurements = measure_models(
                models,
                [images[index % len(images)] for index in range(batch_size)],
                augmentations,
                num_detections=args.detections,
                repetitions=args.repetitions,
                warmup=args.warmup,
                median_area=args.area,
            )
        if len(models) * len(args.batch_sizes) > 1 and not cfg.MODEL.DEVICE.startswith("cuda"):
            # The peak of the process is that of all models and batches together.
            measurements = {name: each._replace(peak_bytes=None) for name, each in measurements.items()}
        figures = report(measurements)
        print(f"\nBatch of {batch_size}, {args.repetitions} repetitions after {args.warmup}, ms\n{table(figures)}")
        found["batches"].append({"batch_size": batch_size, "settings": figures})
    return found


def run_named_suite(args: argparse.Namespace) -> dict:
    """Measure and print a suite, plot it, and return its figures."""
    import numpy as np

    from sparseinst.benchmarks.settings import machine
    from sparseinst.benchmarks.suites import COMMON_SIDE, SUITES, SuiteModel, run_suite, suite_config, suite_table
    from sparseinst.checkpoint.atomic_write import write_atomically
    from sparseinst.data.images import read_image
    from sparseinst.engine.host_memory import keep_freed_memory_for_inference
    from sparseinst.visualization.plots import draw_speed

    models = {each.config: each for each in SUITES[args.suite]}
    models |= {name: SuiteModel(name) for name in args.config_file if name not in models}
    cfg = suite_config(next(iter(models)), args.opts, False)
    # All on one device, with one line in the log without CUDA.
    opts = [*args.opts, "MODEL.DEVICE", cfg.MODEL.DEVICE]
    keep_freed_memory_for_inference(cfg)
    random_image = np.random.default_rng(0).integers(0, 256, (*args.size, 3), dtype=np.uint8)
    image = read_image(args.input[0], "RGB", cfg.INPUT.MAX_IMAGE_PIXELS) if args.input else random_image
    height, width = image.shape[:2]
    rows = run_suite(list(models.values()), image, opts, repetitions=args.repetitions, warmup=args.warmup)
    found = {
        "suite": args.suite,
        "busy": args.busy,
        "machine": machine(cfg),
        "image_size": [height, width],
        "common_side": COMMON_SIDE,
        "repetitions": args.repetitions,
        "warmup": args.warmup,
        "rows": rows,
    }
    print(
        f"{found['machine']}, {cfg.RUNTIME.PRECISION} (Detectron2's models: float32, eager), image of "
        f"{height}x{width}, batch of 1, common size with a short side of {COMMON_SIDE}, median ms of "
        f"{args.repetitions} repetitions for 50, 100 objects; AP as published, * test-dev\n\n{suite_table(rows)}"
    )
    if args.plot is not None:
        png = draw_speed(rows, f"{found['machine']}, {cfg.RUNTIME.PRECISION}")
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.plot, lambda file: file.write(png))
    return found


def build_models(cfg: "CfgNode", settings: Sequence[str]) -> "dict[str, tuple[nn.Module, CfgNode]]":
    """Build a model with random weights, and return it with each of the settings, and its config, by name.

    A setting that names an exported file by its path, or by MODEL.WEIGHTS, runs that file.

    Raises:
        ValueError: a setting is unknown or does not apply to its file, or the model is not an InstanceSegmenter.
        ImportError: a setting needs a package that is not installed.
    """
    import torch
    from detectron2.modeling import build_model

    from sparseinst.benchmarks.settings import apply_setting, check_distinct, check_segmenter, short_names
    from sparseinst.runtime.exported_file import is_exported
    from sparseinst.runtime.exported_model import follow_exported, load_exported
    from sparseinst.runtime.optimize import optimize_as_configured

    files = [setting for setting in settings if is_exported(setting) and Path(setting).is_file()]
    for setting in settings:
        if is_exported(setting) and "=" not in setting and setting not in files:
            raise ValueError(f"--compare: the file {setting} does not exist")
    # A setting's name ends at its "=".
    names = {file: name.replace("=", "-") for file, name in zip(files, short_names([Path(file) for file in files]))}
    check_distinct("--compare", [names.get(setting, setting.partition("=")[0]) for setting in settings])
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    check_segmenter(model)
    models = {}
    for setting in settings:
        own_setting = setting
        if setting in names:
            own_setting = f"{names[setting]}=MODEL.WEIGHTS {shlex.quote(setting)}"
        name, own_cfg, keys = apply_setting(cfg, own_setting, NAMED_SETTINGS, RUNTIME)
        if is_exported(file := own_cfg.MODEL.WEIGHTS):
            if unused := [key for key in keys if key in PYTORCH_KEYS]:
                raise ValueError(
                    f"--compare {name}: the exported file {file} of MODEL.WEIGHTS has no {', '.join(unused)}. Leave "
                    f"MODEL.WEIGHTS out, and name the file: --compare ... {file}"
                )
            follow_exported(own_cfg)
            models[name] = load_exported(own_cfg), own_cfg
            continue
        # Keys outside RUNTIME change the model itself.
        is_other = any(not key.startswith(f"{RUNTIME}.") for key in keys)
        own_model = build_model(own_cfg).eval() if is_other else model
        models[name] = optimize_as_configured(own_cfg, own_model), own_cfg
    return models


if __name__ == "__main__":
    sys.exit(main())

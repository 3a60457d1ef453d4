"""Compare the speed of demo or predict with the model's: ``sparseinst benchmark-video --config-file NAME``.

With --video the demo runs on the first frames of the video, with --input `predict` on images, in turn with the model
alone on the same decoded images, to masks on the host ("end to end" in tools.benchmark). Weights are not needed,
because post-processing gets drawn objects; an exported file (--opts MODEL.WEIGHTS model.onnx) runs in its engine. With
--video drawing alone is timed too, on a random image.
"""

import argparse
import contextlib
import io
import itertools
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparseinst.config.arguments import add_config_arguments, add_opts_argument, check_least
from sparseinst.engine.console import prepare_console, with_exit_codes

if TYPE_CHECKING:
    import numpy as np
    from detectron2.config import CfgNode

    from sparseinst.inference import Predictor

# Decoded images, the name of the command that is compared, and a function that runs it on them.
_Run = tuple[list["np.ndarray"], str, Callable[[], object]]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add_config_arguments(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--video", metavar="FILE", help="its first frames are used")
    source.add_argument("--input", nargs="+", metavar="NAME", help="images, as predict takes them; the first are used")
    add("--frames", type=int, default=60, metavar="N", help="frames of the video, or images (default 60)")
    add("--detections", type=int, default=20, metavar="N", help="objects in each frame (default 20)")
    add("--repetitions", type=int, default=3, metavar="N", help="runs of both, in turn (default 3)")
    add("--image", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"),
        help="with --video: size of the image for the time of drawing alone (default 1080 1920)")  # fmt: skip
    add("--objects", type=int, metavar="N", help="with --video: objects drawn on that image (default 30)")
    add("--threads", type=int, metavar="N", help="threads of PyTorch on the CPU")
    add_opts_argument(parser)
    return parser


@with_exit_codes()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0, or 1 where the arguments, the config or the video are wrong."""
    args = build_parser().parse_args(argv)
    prepare_console()
    from sparseinst.benchmarks.settings import run_command

    return run_command(args, run)


def run(args: argparse.Namespace) -> None:
    """Measure and print.

    Raises:
        ValueError: the arguments, the config or the video are wrong.
        ImportError: a package that the config needs is not installed.
    """
    import numpy as np
    import torch
    from detectron2.modeling import build_model
    from tabulate import tabulate

    from sparseinst.benchmarks.inference import DrawnObjects
    from sparseinst.benchmarks.settings import check_segmenter, machine
    from sparseinst.config import load_config
    from sparseinst.engine.host_memory import keep_freed_memory_for_inference
    from sparseinst.inference import Predictor
    from sparseinst.runtime.exported_file import is_exported
    from sparseinst.runtime.exported_model import follow_exported, load_exported
    from sparseinst.runtime.optimize import optimize_as_configured
    from sparseinst.visualization import draw_instances

    check_least(args, {"--frames": 1, "--repetitions": 1, "--objects": 1, "--image": 1})
    for flag, value in (("--objects", args.objects), ("--image", args.image)):
        if args.input and value is not None:
            raise ValueError(f"{flag} is about drawing, which --input does not time; leave it out")
    cfg = load_config(args.config_file, args.opts, imports=args.imports)
    if args.input:
        cfg.MODEL.OUTPUT.MASK_FORMAT = "rle"
    keep_freed_memory_for_inference(cfg)
    torch.manual_seed(0)
    if is_exported(cfg.MODEL.WEIGHTS):
        follow_exported(cfg)
        model = load_exported(cfg)
    else:
        model = optimize_as_configured(cfg, build_model(cfg).eval())
    check_segmenter(model)
    drawn = DrawnObjects(model, args.detections).eval()
    predictor = Predictor(cfg, model=drawn)
    if args.video:
        height, width = args.image or (1080, 1920)
        image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        # First, so that too many objects for the model stop the command at once.
        predictor([image], "RGB")
        drawn.num_detections = args.objects or 30
        (instances,) = predictor([image], "RGB")
        drawn.num_detections = args.detections
    with tempfile.TemporaryDirectory() as folder:
        start = _images_run if args.input else _video_run
        frames, name, run_command = start(args, cfg, predictor, Path(folder))
        runs = {"model alone": lambda: list(predictor.stream(frames, "RGB")), name: run_command}
        seconds = _time_in_turn(runs, args.repetitions)
    sizes = sorted({frame.shape[:2] for frame in frames})
    shown = " to ".join(f"{size[0]}x{size[1]}" for size in dict.fromkeys([sizes[0], sizes[-1]]))
    print(f"{args.config_file}, {machine(cfg)}: {len(frames)} {'images' if args.input else 'frames'} of {shown},")
    print(f"{args.detections} objects in each; median of {args.repetitions} repetitions in turn")
    rows = [
        [name, len(frames) / np.median(each), np.median(seconds["model alone"] / each)]
        for name, each in seconds.items()
    ]
    print(tabulate(rows, ["", "images/s", "share of the model alone"], tablefmt="github", floatfmt=".2f"))
    if args.input:
        return
    drawing = _time_in_turn({"": lambda: draw_instances(image, instances, predictor.metadata)}, args.repetitions)
    print(f"\nDrawing alone, {len(instances)} objects on an image of {height}x{width}: ", end="")
    print(f"{1e3 * np.median(drawing['']):.1f} ms")


def _video_run(args: argparse.Namespace, cfg: "CfgNode", predictor: "Predictor", folder: Path) -> _Run:
    from sparseinst.tools import demo, demo_run

    clip = folder / "clip.mp4"
    frames = _cut(args.video, clip, args.frames)
    arguments = ["--config-file", args.config_file, "--video-input", str(clip), "--output", str(folder / "drawn.mp4")]
    arguments = demo.build_parser().parse_args(arguments)
    return frames, "demo", lambda: demo_run.run_video(arguments, cfg, predictor)


def _images_run(args: argparse.Namespace, cfg: "CfgNode", predictor: "Predictor", folder: Path) -> _Run:
    from sparseinst.data.images import read_image
    from sparseinst.inference.many_images import predict_many
    from sparseinst.inference.prediction_lines import list_images

    names = list_images(args.input)[: args.frames]
    # Before all are decoded, so that too many objects for the model stop the command at once.
    predictor(names[:1])
    cfg = cfg.clone()
    # The first line of the output names a weights file; the model is there already.
    cfg.MODEL.WEIGHTS = str(folder / "weights.pth")
    Path(cfg.MODEL.WEIGHTS).touch()
    numbers = itertools.count()
    frames = [read_image(name, max_pixels=cfg.INPUT.MAX_IMAGE_PIXELS) for name in names]
    return frames, "predict", lambda: predict_many(cfg, predictor, names, folder / f"{next(numbers)}.jsonl")


def _cut(source: str, clip: Path, num_frames: int) -> "list[np.ndarray]":
    """Write the first frames of a video to a clip, and return them as they are read from the clip."""
    from sparseinst.inference import VideoReader, VideoWriter

    with VideoReader(source) as reader, VideoWriter(clip, reader.fps) as writer:
        for frame in itertools.islice(reader, num_frames):
            writer.write(frame)
    if writer.num_frames == 0:
        raise ValueError(f"OpenCV could not read a single frame of {source}")
    with VideoReader(clip) as reader:
        return list(reader)


def _time_in_turn(runs: dict[str, Callable[[], object]], repetitions: int) -> "dict[str, np.ndarray]":
    """Return the seconds of each run, (repetitions,), after one round of warm-up."""
    import numpy as np

    from sparseinst.evaluation.stage_timer import StageTimer

    timer = StageTimer()
    for _ in range(1 + repetitions):
        for name, run_once in runs.items():
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                with timer.stage(name):
                    run_once()
    return {name: np.array(values[1:]) for name, values in timer.seconds.items()}


if __name__ == "__main__":
    sys.exit(main())

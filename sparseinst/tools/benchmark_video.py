"""How much of the model's speed the demo keeps on a video: ``python -m sparseinst.tools.benchmark_video --help``.

The demo itself runs on the first frames of the video, and in turn with it the model alone on the same frames, from a
decoded frame to masks on the host, which is what the benchmark calls end to end. No weights are needed: as in the
benchmark, the network runs, and post-processing gets drawn objects. Drawing alone is timed on a random picture.
"""

import argparse
import contextlib
import io
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.modeling import build_model
from tabulate import tabulate
from torch import nn

from sparseinst.config import load_config
from sparseinst.engine.benchmark import drawn_outputs
from sparseinst.engine.host_memory import keep_freed_memory_for_inference
from sparseinst.inference import Predictor, VideoReader, VideoWriter, draw_instances
from sparseinst.inference.visualization import DRAWINGS
from sparseinst.modeling.optimization import optimize_as_configured
from sparseinst.tools import demo
from sparseinst.tools.benchmark import machine


class DrawnObjects(nn.Module):
    """A SparseInst that runs, and then finds so many drawn objects, whatever it was shown.

    Args:
        model: in eval mode.
        num_detections: objects in each image.
    """

    def __init__(self, model: nn.Module, num_detections: int) -> None:
        super().__init__()
        self.model = model
        self.num_detections = num_detections
        self._scenes: dict[tuple[int, ...], dict[str, torch.Tensor]] = {}

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """As SparseInst's."""
        images = self.model.preprocess_image(batched_inputs)
        outputs = self.model.network(images.tensor)
        shape = (self.num_detections, *outputs["pred_masks"].shape)
        if shape not in self._scenes:
            self._scenes[shape] = drawn_outputs(outputs, self.num_detections)
        return self.model.postprocess(self._scenes[shape], batched_inputs, images)


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m sparseinst.tools.benchmark_video",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config-file", required=True, help="YAML file, or the name of one that comes with the package"
    )
    parser.add_argument("--video", required=True, metavar="FILE", help="frames are taken from its start")
    parser.add_argument("--frames", type=int, default=60, metavar="N", help="of the video (default 60)")
    parser.add_argument("--detections", type=int, default=20, metavar="N", help="objects in each frame (default 20)")
    parser.add_argument("--repetitions", type=int, default=3, metavar="N", help="of each, in turn (default 3)")
    parser.add_argument("--drawings", nargs="+", choices=DRAWINGS, default=list(DRAWINGS), help="default: all")
    parser.add_argument(
        "--picture", type=int, nargs=2, default=[1080, 1920], metavar=("HEIGHT", "WIDTH"),
        help="that drawing alone is timed on (default 1080 1920)",
    )  # fmt: skip
    parser.add_argument("--objects", type=int, default=30, metavar="N", help="drawn on it (default 30)")
    parser.add_argument("--threads", type=int, metavar="N", help="of PyTorch on the CPU")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config overrides, last"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0; 2 where the arguments, the config or the video do not allow it."""
    args = build_parser().parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        for flag, value in (
            ("--frames", args.frames),
            ("--repetitions", args.repetitions),
            ("--objects", args.objects),
        ):
            if value < 1:
                raise ValueError(f"{flag} is {value}; it must be at least 1")
        cfg = load_config(args.config_file, args.opts)
        num_masks = cfg.MODEL.SPARSE_INST.DECODER.NUM_MASKS
        if not 0 <= args.detections <= num_masks or args.objects > num_masks:
            raise ValueError(
                f"--detections and --objects: MODEL.SPARSE_INST.DECODER.NUM_MASKS allows up to {num_masks}"
            )
        keep_freed_memory_for_inference(cfg)
        torch.manual_seed(0)
        model = DrawnObjects(optimize_as_configured(cfg, build_model(cfg).eval()), args.detections).eval()
        predictor = Predictor(cfg, model=model)
        with tempfile.TemporaryDirectory() as folder:
            clip = Path(folder) / "clip.mp4"
            frames = _cut(args.video, clip, args.frames)
            ways: dict[str, Callable[[], object]] = {"model alone": lambda: predictor(frames, "RGB")}
            for drawing in args.drawings:
                arguments = ["--video-input", str(clip), "--output", f"{folder}/drawn.mp4", "--drawing", drawing]
                arguments = demo.build_parser().parse_args(["--config-file", args.config_file, *arguments])
                ways[f"demo, {drawing}"] = lambda arguments=arguments: demo.run_video(arguments, cfg, predictor)
            seconds = _time_in_turn(ways, args.repetitions)
        print(
            f"{args.config_file}, {machine(cfg)}: {len(frames)} frames of {frames[0].shape[0]}x{frames[0].shape[1]}, "
        )
        print(f"{args.detections} objects in each; median of {args.repetitions} repetitions in turn")
        rows = [[way, len(frames) / np.median(each), _share(seconds, way)] for way, each in seconds.items()]
        print(tabulate(rows, ["", "images/s", "share of the model alone"], tablefmt="github", floatfmt=".2f"))

        model.num_detections = args.objects
        picture = np.random.default_rng(0).integers(0, 256, (*args.picture, 3), dtype=np.uint8)
        (instances,) = predictor([picture], "RGB")
        ways = {
            drawing: lambda drawing=drawing: draw_instances(picture, instances, predictor.metadata, drawing=drawing)
            for drawing in args.drawings
        }
        seconds = _time_in_turn(ways, args.repetitions)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\nDrawing alone, {len(instances)} objects on a picture of {args.picture[0]}x{args.picture[1]}")
    rows = [[way, 1e3 * np.median(each), 1 / _share(seconds, way)] for way, each in seconds.items()]
    print(tabulate(rows, ["", "ms", f"times as long as {args.drawings[0]}"], tablefmt="github", floatfmt=".1f"))
    return 0


def _cut(source: str, clip: Path, num_frames: int) -> list[np.ndarray]:
    """The first frames of a video, as a video of their own too."""
    with VideoReader(source) as reader, VideoWriter(clip, reader.fps) as writer:
        for frame in itertools.islice(reader, num_frames):
            writer.write(frame)
    if writer.num_frames == 0:
        raise ValueError(f"OpenCV could not read a single frame of {source}")
    with VideoReader(clip) as reader:
        return list(reader)


def _time_in_turn(ways: dict[str, Callable[[], object]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each way, after one round that is not counted."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for repetition in range(1 + repetitions):
        for way, run in ways.items():
            start = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                run()
            if repetition > 0:
                seconds[way].append(time.perf_counter() - start)
    return seconds


def _share(seconds: dict[str, list[float]], way: str) -> float:
    """How fast a way is against the first one, repetition by repetition: the median."""
    first = next(iter(seconds.values()))
    return float(np.median(np.array(first) / np.array(seconds[way])))


if __name__ == "__main__":
    sys.exit(main())

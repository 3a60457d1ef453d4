"""Draw predictions on images, videos and the webcam: ``python -m sparseinst.tools.demo --help``.

Reading, the model, and drawing with writing overlap. The last line says how many images or frames were done in a
second, and how many the model alone would do, from a decoded image to masks on the host: the time that was spent in it
while the other stages ran too. On an idle machine that equals what
``python -m sparseinst.tools.benchmark --size HEIGHT WIDTH --detections N`` calls end to end, with as many objects.
"""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import Instances
from detectron2.utils.logger import setup_logger
from tqdm import tqdm

from sparseinst import config
from sparseinst.config import load_config
from sparseinst.data.ground_truth import GroundTruth
from sparseinst.engine.host_memory import keep_freed_memory_for_inference
from sparseinst.inference import ImageReadError, Predictor, VideoReader, VideoWriter, read_image
from sparseinst.inference.output_files import (
    IAM_FOLDER,
    check_image_folder,
    check_not_read,
    find_images,
    output_names,
    save_image,
    video_file,
)
from sparseinst.inference.pipeline import QUEUE_LENGTH, read_ahead, work_behind
from sparseinst.ops.mask_output import MaskMemoryError
from sparseinst.tools.demo_results import CocoResults, TimedPredictor, images_file
from sparseinst.visualization import VideoDrawer, draw_beside, draw_iams, draw_instances

Item = TypeVar("Item")
Result = TypeVar("Result")

# Images that are read ahead, and that may wait until they are drawn: fewer than frames, as they can be large.
IMAGE_QUEUE_LENGTH = 1
# Where the boolean masks of an image take more, the next image waits until it is drawn.
LARGE_MASK_BYTES = 2**28
# The exit code of a command that Ctrl-C ended.
EXIT_INTERRUPTED = 130
NO_WINDOW = (
    "There is no window here: this OpenCV is built without (install opencv-python in place of opencv-python-headless, "
    "the extra 'gui'), or there is no display"
)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m sparseinst.tools.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config-file", required=True, help="YAML file, or the name of one that comes with the package")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="NAME", help="images: files, folders, glob patterns")
    source.add_argument("--video-input", metavar="FILE", help="a video")
    source.add_argument("--webcam", type=int, nargs="?", const=0, metavar="INDEX", help="a camera (default 0)")
    add(
        "--output",
        type=Path,
        help="folder for the images; folder or .mp4 file for a video. Without it and without --json: a window",
    )
    add("--confidence-threshold", type=float, default=0.5, help="least score of what is drawn (default 0.5)")
    add(
        "--json",
        type=Path,
        metavar="FILE",
        help="write COCO results to FILE, and to its STEM_images.json which image id is which image",
    )
    add("--ground-truth", type=Path, metavar="JSON", help="draw this COCO json's objects of an image next to it")
    add("--show-iams", action="store_true", help="draw the instances' activation maps too")
    add(
        "--mask-nms",
        type=float,
        metavar="IOU",
        help="of two masks of a class that overlap more than this, drop the worse (default: as the config says, off)",
    )
    add("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config overrides, last")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments after the program's name; ``sys.argv``'s where None.

    Returns:
        Exit code: 0; 1 where an image could not be read; 2 where the arguments, the config, the weights or the video do
        not allow a run; 130 where Ctrl-C ended it: what was done until then is kept.
    """
    _survive_closed_streams()
    args = build_parser().parse_args(argv)
    for name in ("fvcore", "detectron2", "sparseinst"):
        setup_logger(name=name).setLevel(logging.INFO)
    try:
        check_arguments(args)
        cfg = load_config(args.config_file, args.opts)
        set_model_keys(cfg, args)
        keep_freed_memory_for_inference(cfg)
        return run_video(args, cfg) if args.input is None else run_images(args, cfg)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        # Before anything was done.
        print("Interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def set_model_keys(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Translate the flags to keys of the model's config. Raise ValueError where the model has no such key."""
    if args.mask_nms is not None:
        config.set_declared(cfg, "mask_nms_key", args.mask_nms)
    if args.show_iams:
        config.set_declared(cfg, "activation_maps_key", True)
    # No masks are computed below the threshold. The margin is for scores that are rounded.
    cfg.MODEL.OUTPUT.SCORE_THRESHOLD = max(cfg.MODEL.OUTPUT.SCORE_THRESHOLD, 0.999 * args.confidence_threshold)


def run_images(args: argparse.Namespace, cfg: CfgNode) -> int:
    """Predict and draw images.

    Returns:
        Exit code: 0; 1 where an image could not be read; 130 where Ctrl-C ended it.
    """
    paths = find_images(args.input)
    if args.output is not None:
        check_image_folder(args.output, paths)
    check_json(args, cfg, paths)
    ground_truth = None if args.ground_truth is None else GroundTruth(args.ground_truth)
    predictor = Predictor(cfg)
    if ground_truth is not None and ground_truth.class_names != predictor.classes.names:
        raise ValueError(
            f"--ground-truth {args.ground_truth} has the classes {ground_truth.class_names[:5]}, ..., the model "
            f"{predictor.classes.names[:5]}, ...: give the json that belongs to the model's data"
        )
    timed = TimedPredictor(predictor, args.confidence_threshold)
    results = CocoResults(predictor.classes)
    done: list[Path] = []
    failures: list[str] = []

    def predict() -> Iterator[tuple[Path, str, np.ndarray, Instances]]:
        with contextlib.closing(read_ahead(map(_read, paths), IMAGE_QUEUE_LENGTH)) as images:
            named = zip(paths, output_names(paths), images, strict=True)
            for path, name, image in tqdm(named, total=len(paths), unit="picture"):
                try:
                    if isinstance(image, ImageReadError):
                        raise image
                    instances = timed.predict(image)
                except ImageReadError as error:
                    failures.append(str(error))
                except MaskMemoryError as error:
                    failures.append(f"{path}: {error}")
                else:
                    yield path, name, image, instances

    def draw(path: Path, image: np.ndarray, instances: Instances) -> np.ndarray:
        drawing = draw_instances(image, instances, predictor.metadata)
        truth = None if ground_truth is None else ground_truth.find(path)
        if truth is None:
            return drawing
        of_truth = draw_instances(image, truth, predictor.metadata)
        return draw_beside([(drawing, "predictions"), (of_truth, "ground truth")])

    def finish(predicted: tuple[Path, str, np.ndarray, Instances]) -> dict[str, np.ndarray]:
        path, name, image, instances = predicted
        drawings = {}
        if args.output is not None or args.json is None:
            drawings[name] = draw(path, image, instances)
        if args.show_iams:
            drawings[f"{IAM_FOLDER}/{name}"] = draw_iams(
                image, instances, predictor.metadata, normalization=predictor.iam_normalization
            )
        if args.output is not None:
            for relative_name, drawing in drawings.items():
                save_image(args.output / relative_name, drawing)
        if args.json is not None:
            results.add(str(path), instances)
        done.append(path)
        return drawings

    interrupted = run_stages(predict(), finish, _show_all if args.output is None else None, IMAGE_QUEUE_LENGTH)
    if args.json is not None:
        results.write(args.json)
    if args.output is not None:
        iams = f", their activation maps in {args.output / IAM_FOLDER}" if args.show_iams else ""
        _say(f"{len(done)} of {len(paths)} pictures are in {args.output}{iams}")
    _say(timed.speed(len(done), "pictures"))
    for failure in failures:
        print(failure, file=sys.stderr)
    if interrupted:
        return EXIT_INTERRUPTED
    return 1 if failures else 0


def run_video(args: argparse.Namespace, cfg: CfgNode, predictor: Predictor | None = None) -> int:
    """Predict and draw the frames of a video file or of a camera.

    Args:
        args: the command's.
        cfg: the model's config.
        predictor: in place of the one that the config describes.

    Returns:
        Exit code: 0, or 130 where Ctrl-C ended it.
    """
    is_camera = args.webcam is not None
    source, name = (args.webcam, "webcam") if is_camera else (args.video_input, args.video_input)
    output = None if args.output is None else video_file(args.output, name)
    if output is not None:
        check_not_read("--output", output, _files_read(args, cfg))
    check_json(args, cfg)
    is_shown = is_camera or (output is None and args.json is None)
    done = 0
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(VideoReader(source))
        predictor = predictor or Predictor(cfg)
        timed = TimedPredictor(predictor, args.confidence_threshold)
        results = CocoResults(predictor.classes)
        drawer = VideoDrawer(predictor.metadata)
        writer = None if output is None else stack.enter_context(VideoWriter(output, reader.fps))

        def predict() -> Iterator[tuple[np.ndarray, Instances]]:
            # A camera's frames are shown without delay.
            with contextlib.closing(read_ahead(reader, 0 if is_camera else QUEUE_LENGTH)) as frames:
                for frame in tqdm(frames, total=reader.num_frames, unit="frame"):
                    yield frame, timed.predict(frame)

        def finish(predicted: tuple[np.ndarray, Instances]) -> np.ndarray:
            nonlocal done
            frame, instances = predicted
            if writer is not None or is_shown:
                frame = drawer.draw(frame, instances)
            if writer is not None:
                writer.write(frame)
            done += 1
            if args.json is not None:
                results.add(name, instances, frame=done)
            return frame

        show = (lambda frame: _show(name, frame, wait_ms=1)) if is_shown else None
        interrupted = run_stages(predict(), finish, show, QUEUE_LENGTH)
    if done == 0 and not interrupted:
        raise ValueError(f"OpenCV could not read a single frame of {name}")
    if args.json is not None:
        results.write(args.json)
    if output is not None and done > 0:
        _say(f"{'The first ' if interrupted else ''}{done} frames are in {output}")
    _say(timed.speed(done, "frames"))
    return EXIT_INTERRUPTED if interrupted else 0


def run_stages(
    predicted: Generator[Item, None, None],
    finish: Callable[[Item], Result],
    show: Callable[[Result], bool] | None,
    queue_length: int,
) -> bool:
    """Predict in this thread and finish in another, until the end.

    Args:
        predicted: tuples that end with the instances.
        finish: draws, writes and collects one prediction.
        show: shows a result in a window, and returns True to stop. Windows belong to this thread and show results
            without delay, so everything is done in this thread then.
        queue_length: predictions that may wait until they are finished.

    Returns:
        Whether Ctrl-C ended it.
    """
    queue_length = queue_length if show is None else 0
    try:
        with (
            contextlib.closing(predicted),
            contextlib.closing(work_behind(finish, predicted, queue_length, _has_large_masks)) as finished,
        ):
            for result in finished:
                if show is not None and show(result):
                    break
    except KeyboardInterrupt:
        print("Interrupted", file=sys.stderr)
        return True
    return False


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError where a flag's value, or a combination of flags, does not make sense."""
    if not 0 <= args.confidence_threshold <= 1:
        raise ValueError(f"--confidence-threshold is {args.confidence_threshold}; it must be in [0, 1]")
    if args.mask_nms is not None and not 0 < args.mask_nms <= 1:
        raise ValueError(f"--mask-nms is {args.mask_nms}; it must be in (0, 1]")
    if args.show_iams and args.input is None:
        raise ValueError("--show-iams draws the activation maps of images: it needs --input")
    if args.ground_truth is not None and args.input is None:
        raise ValueError("--ground-truth belongs to images: it needs --input")
    if _has_window():
        return
    if args.webcam is not None:
        raise ValueError(f"--webcam shows a window. {NO_WINDOW}")
    if args.output is None and args.json is None:
        raise ValueError(f"Without --output the drawings go to a window. Give --output. {NO_WINDOW}")
    if args.output is None and args.show_iams:
        raise ValueError(f"--show-iams without --output goes to a window. Give --output. {NO_WINDOW}")


def check_json(args: argparse.Namespace, cfg: CfgNode, paths: Sequence[Path] = ()) -> None:
    """Raise ValueError where a file of ``--json`` would overwrite a file that is read."""
    if args.json is not None:
        for file in (args.json, images_file(args.json)):
            check_not_read("--json", file, _files_read(args, cfg, paths))


def _files_read(args: argparse.Namespace, cfg: CfgNode, paths: Sequence[Path] = ()) -> list[str | Path | None]:
    return [*paths, args.video_input, args.ground_truth, args.config_file, cfg.MODEL.WEIGHTS]


def _read(path: Path) -> np.ndarray | ImageReadError:
    # Returned, as an error that is raised would end the thread that reads the other images.
    try:
        return read_image(path)
    except ImageReadError as error:
        return error


def _has_large_masks(predicted: tuple) -> bool:
    masks = predicted[-1].pred_masks
    return isinstance(masks, torch.Tensor) and masks.numel() > LARGE_MASK_BYTES


def _survive_closed_streams() -> None:
    # Without a standard error (cron, a service) tqdm and the error messages have nowhere to write.
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    # A log line that nobody reads (demo | true) is dropped in place of a traceback.
    logging.raiseExceptions = False


def _say(line: str) -> None:
    try:
        print(line, flush=True)
    except BrokenPipeError:
        # Python would write what is left of the line at its end, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _has_window() -> bool:
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return False
    return bool(cv2.currentUIFramework())


def _show_all(drawings: dict[str, np.ndarray]) -> bool:
    return any([_show(name, drawing, wait_ms=0) for name, drawing in drawings.items()])


def _show(title: str, image: np.ndarray, wait_ms: int) -> bool:
    """Show an image in a window; return True where the user pressed q or escape."""
    cv2.imshow(title, image[:, :, ::-1])
    return cv2.waitKey(wait_ms) & 0xFF in (ord("q"), 27)


if __name__ == "__main__":
    sys.exit(main())

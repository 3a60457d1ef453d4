"""Draw predictions on pictures, videos and the webcam: ``python -m sparseinst.tools.demo --help``.

Reading, the model, and drawing and writing run beside one another. The last line says how many pictures or frames were
done in a second, and how many the model alone would do, from a decoded picture to masks on the host: the time that
was spent in it while the other stages ran too. On a machine that does nothing else, that is what
``python -m sparseinst.tools.benchmark --size HEIGHT WIDTH --detections N`` calls end to end, with as many objects.
"""

import argparse
import contextlib
import functools
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

from sparseinst.config import load_config
from sparseinst.data.ground_truth import GroundTruth
from sparseinst.engine.host_memory import keep_freed_memory_for_inference
from sparseinst.inference import (
    ImageReadError,
    Predictor,
    VideoReader,
    VideoWriter,
    draw_beside,
    draw_iams,
    draw_instances,
    read_image,
)
from sparseinst.inference.pipeline import QUEUE_LENGTH, read_ahead, work_behind
from sparseinst.inference.video_drawing import VideoDrawer
from sparseinst.inference.visualization import DRAWINGS
from sparseinst.modeling import MaskMemoryError
from sparseinst.tools.demo_files import (
    IAM_FOLDER,
    check_image_folder,
    check_not_read,
    find_images,
    output_names,
    save_picture,
    video_file,
)
from sparseinst.tools.demo_results import CocoResults, TimedPredictor, images_file

Item = TypeVar("Item")
Result = TypeVar("Result")

# Pictures that are read ahead, and that may wait until they are drawn: fewer than frames, as they can be large.
PICTURE_QUEUE_LENGTH = 1
# Where the boolean masks of a picture take more, the next ones are not made before it is drawn.
LARGE_MASK_BYTES = 2**28
# As shells tell that Ctrl-C ended a command.
EXIT_INTERRUPTED = 130


def run_images(args: argparse.Namespace, cfg: CfgNode) -> int:
    """Predict and draw pictures.

    Returns:
        Exit code: 0; 1 where one of them could not be read; 130 where Ctrl-C ended it.
    """
    paths = find_images(args.input)
    if args.output is not None:
        check_image_folder(args.output, paths)
    _check_json(args, cfg, paths)
    ground_truth = None if args.ground_truth is None else GroundTruth(args.ground_truth)
    predictor = Predictor(cfg)
    if ground_truth is not None and ground_truth.class_names != predictor.classes.names:
        raise ValueError(
            f"--ground-truth {args.ground_truth} has the classes {ground_truth.class_names[:5]}, ..., the model "
            f"{predictor.classes.names[:5]}, ...: give the json that belongs to the model's data"
        )
    results = CocoResults(predictor.classes)
    num_done = 0
    timed = TimedPredictor(predictor, args.confidence_threshold)
    draw = functools.partial(draw_instances, metadata=predictor.metadata, drawing=args.drawing)
    failures = []

    def predict() -> Iterator[tuple[Path, str, np.ndarray, Instances]]:
        with contextlib.closing(read_ahead(map(_read, paths), PICTURE_QUEUE_LENGTH)) as images:
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

    def finish(predicted: tuple[Path, str, np.ndarray, Instances]) -> dict[str, np.ndarray]:
        nonlocal num_done
        path, name, image, instances = predicted
        pictures = {}
        if args.output is not None or args.json is None:
            pictures[name] = draw(image, instances)
            truth = None if ground_truth is None else ground_truth.find(path)
            if truth is not None:
                pictures[name] = draw_beside([(pictures[name], "predictions"), (draw(image, truth), "ground truth")])
        if args.show_iams:
            pictures[f"{IAM_FOLDER}/{name}"] = draw_iams(
                image, instances, predictor.metadata, normalization=predictor.iam_normalization
            )
        if args.output is not None:
            for relative_name, picture in pictures.items():
                save_picture(args.output / relative_name, picture)
        if args.json is not None:
            results.add(str(path), instances)
        num_done += 1
        return pictures

    show = _show_pictures if args.output is None else None
    interrupted = _run(predict(), finish, show, PICTURE_QUEUE_LENGTH)
    if args.json is not None:
        results.write(args.json)
    if args.output is not None:
        iams = f", their activation maps in {args.output / IAM_FOLDER}" if args.show_iams else ""
        print(f"{num_done} of {len(paths)} pictures are in {args.output}{iams}")
    print(timed.speed(num_done, "pictures"))
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
    _check_json(args, cfg)
    is_shown = is_camera or (output is None and args.json is None)
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(VideoReader(source))
        predictor = predictor or Predictor(cfg)
        results = CocoResults(predictor.classes)
        num_done = 0
        timed = TimedPredictor(predictor, args.confidence_threshold)
        drawer = VideoDrawer(predictor.metadata, args.drawing)
        writer = None if output is None else stack.enter_context(VideoWriter(output, reader.fps))

        def predict() -> Iterator[tuple[np.ndarray, Instances]]:
            # A camera's frames are shown as soon as they can be.
            with contextlib.closing(read_ahead(reader, 0 if is_camera else QUEUE_LENGTH)) as frames:
                for frame in tqdm(frames, total=reader.num_frames, unit="frame"):
                    yield frame, timed.predict(frame)

        def finish(predicted: tuple[np.ndarray, Instances]) -> np.ndarray:
            nonlocal num_done
            frame, instances = predicted
            if writer is not None or is_shown:
                frame = drawer.draw(frame, instances)
            if writer is not None:
                writer.write(frame)
            num_done += 1
            if args.json is not None:
                results.add(name, instances, frame=num_done)
            return frame

        show = (lambda frame: _show(name, frame, wait_ms=1)) if is_shown else None
        interrupted = _run(predict(), finish, show, QUEUE_LENGTH)
    if num_done == 0 and not interrupted:
        raise ValueError(f"OpenCV could not read a single frame of {name}")
    if args.json is not None:
        results.write(args.json)
    if output is not None and num_done > 0:
        print(f"{'The first ' if interrupted else ''}{num_done} frames are in {output}")
    print(timed.speed(num_done, "frames"))
    return EXIT_INTERRUPTED if interrupted else 0


def _read(path: Path) -> np.ndarray | ImageReadError:
    # The error is one of this picture alone.
    try:
        return read_image(path)
    except ImageReadError as error:
        return error


def _run(
    predicted: Generator[Item, None, None],
    finish: Callable[[Item], Result],
    show: Callable[[Result], bool] | None,
    queue_length: int,
) -> bool:
    """Predict in this thread and finish in another, until the end.

    Args:
        predicted: the predictions; the last of each are the instances.
        finish: draws, writes and collects one of them.
        show: shows what is finished, at once; True where it is to be the last. Windows belong to this thread, and what
            they show is not to wait: all is done in this thread then.
        queue_length: predictions that may wait until they are finished.

    Returns:
        Whether Ctrl-C ended it.
    """
    queue_length = queue_length if show is None else 0
    try:
        with (
            contextlib.closing(predicted),
            contextlib.closing(work_behind(finish, predicted, queue_length, _is_large)) as finished,
        ):
            for result in finished:
                if show is not None and show(result):
                    break
    except KeyboardInterrupt:
        print("Interrupted", file=sys.stderr)
        return True
    return False


def _is_large(predicted: tuple) -> bool:
    masks = predicted[-1].pred_masks
    return isinstance(masks, torch.Tensor) and masks.numel() > LARGE_MASK_BYTES


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m sparseinst.tools.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config-file", required=True, help="YAML file, or the name of one that comes with the package"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="NAME", help="pictures: files, folders, glob patterns")
    source.add_argument("--video-input", metavar="FILE", help="a video")
    source.add_argument("--webcam", type=int, nargs="?", const=0, metavar="INDEX", help="a camera, 0 where not given")
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for the pictures; folder or .mp4 file for a video. Without it and without --json: a window",
    )
    parser.add_argument(
        "--confidence-threshold", type=float, default=0.5, help="least score of what is drawn and written (default 0.5)"
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write COCO results to FILE, and to its STEM_images.json which image id is which picture",
    )
    parser.add_argument(
        "--ground-truth", type=Path, metavar="JSON", help="draw what this COCO json has of a picture beside it"
    )
    parser.add_argument("--show-iams", action="store_true", help="draw the instances' activation maps too")
    parser.add_argument(
        "--drawing",
        choices=DRAWINGS,
        default="fast",
        help="who draws: we (default), or Detectron2's visualizers, which draw alike in many times the time",
    )
    parser.add_argument(
        "--mask-nms",
        type=float,
        metavar="IOU",
        help="of two masks of a class that overlap more than this, drop the worse (default: as the config says, off)",
    )
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config overrides, last"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments after the program's name; ``sys.argv``'s where None.

    Returns:
        Exit code: 0; 1 where a picture could not be read; 2 where the arguments, the config, the weights or the video
        do not allow a run; 130 where Ctrl-C ended it: what was done until then is kept.
    """
    args = build_parser().parse_args(argv)
    for name in ("fvcore", "detectron2", "sparseinst"):
        setup_logger(name=name).setLevel(logging.INFO)
    try:
        _check_arguments(args)
        cfg = load_config(args.config_file, args.opts)
        if args.mask_nms is not None:
            cfg.MODEL.SPARSE_INST.MASK_NMS_THRESHOLD = args.mask_nms
        if args.show_iams:
            cfg.MODEL.SPARSE_INST.DECODER.OUTPUT_IAM = True
        _skip_rejected(cfg, args.confidence_threshold)
        keep_freed_memory_for_inference(cfg)
        return run_video(args, cfg) if args.input is None else run_images(args, cfg)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        # Before anything was done.
        print("Interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _skip_rejected(cfg: CfgNode, threshold: float) -> None:
    """Let the model make no masks for what is below the command's threshold: rescoring only lowers a score."""
    # A little lower, since the score is rounded.
    keys = cfg.MODEL.SPARSE_INST
    keys.CLS_THRESHOLD = max(keys.CLS_THRESHOLD, 0.999 * threshold)


def _check_arguments(args: argparse.Namespace) -> None:
    if not 0 <= args.confidence_threshold <= 1:
        raise ValueError(f"--confidence-threshold is {args.confidence_threshold}; it must be in [0, 1]")
    if args.mask_nms is not None and not 0 < args.mask_nms <= 1:
        raise ValueError(f"--mask-nms is {args.mask_nms}; it must be in (0, 1]")
    if args.show_iams and args.input is None:
        raise ValueError("--show-iams draws the activation maps of pictures: it needs --input")
    if args.ground_truth is not None and args.input is None:
        raise ValueError("--ground-truth belongs to pictures: it needs --input")
    if args.webcam is not None and not _has_window():
        raise ValueError(f"--webcam shows a window. {_NO_WINDOW}")
    if args.output is None and args.json is None and not _has_window():
        raise ValueError(f"Without --output the drawings go to a window. Give --output. {_NO_WINDOW}")
    if args.show_iams and args.output is None and not _has_window():
        raise ValueError(f"--show-iams without --output goes to a window. Give --output. {_NO_WINDOW}")


_NO_WINDOW = (
    "There is no window here: this OpenCV is built without (install opencv-python in place of opencv-python-headless, "
    "the extra 'gui'), or there is no display"
)


def _has_window() -> bool:
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return False
    return bool(cv2.currentUIFramework())


def _files_read(args: argparse.Namespace, cfg: CfgNode, paths: Sequence[Path] = ()) -> list[str | Path | None]:
    return [*paths, args.video_input, args.ground_truth, args.config_file, cfg.MODEL.WEIGHTS]


def _check_json(args: argparse.Namespace, cfg: CfgNode, paths: Sequence[Path] = ()) -> None:
    if args.json is not None:
        for file in (args.json, images_file(args.json)):
            check_not_read("--json", file, _files_read(args, cfg, paths))


def _show_pictures(pictures: dict[str, np.ndarray]) -> bool:
    return any([_show(name, picture, wait_ms=0) for name, picture in pictures.items()])


def _show(title: str, picture: np.ndarray, wait_ms: int) -> bool:
    """Show a picture in a window; True where the user pressed q or escape."""
    cv2.imshow(title, picture[:, :, ::-1])
    return cv2.waitKey(wait_ms) & 0xFF in (ord("q"), 27)


if __name__ == "__main__":
    sys.exit(main())

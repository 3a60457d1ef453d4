"""Draw predictions on images, videos and the webcam, for the command `demo`."""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Generator, Sequence
from pathlib import Path

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.structures import Instances
from tqdm import tqdm

from sparseinst import config
from sparseinst.data.broken_images import describe_failure
from sparseinst.data.ground_truth import GroundTruth
from sparseinst.data.images import DataError
from sparseinst.engine.console import EXIT_INTERRUPTED
from sparseinst.engine.host_memory import keep_freed_memory_for_inference
from sparseinst.engine.run_setup import log_to_console
from sparseinst.inference import Predictor, VideoReader, VideoWriter
from sparseinst.inference.output_files import (
    IAM_FOLDER,
    CocoResults,
    check_image_folder,
    check_not_read,
    coco_images_file,
    find_images,
    output_names,
    save_image,
    video_file,
)
from sparseinst.inference.pipeline import (
    IMAGE_QUEUE_LENGTH,
    QUEUE_LENGTH,
    Interruption,
    read_ahead,
    read_images_ahead,
    run_stages,
)
from sparseinst.inference.timed_predictor import TimedPredictor
from sparseinst.inference.video import without_password
from sparseinst.runtime.exported_model import config_of_run
from sparseinst.visualization import VideoDrawer, captioned_grid, draw_iams, draw_instances

NO_WINDOW = (
    "A window cannot be opened: either this OpenCV is built without windows (install opencv-python in place of "
    "opencv-python-headless, the extra 'gui'), or the machine has no display"
)


def run(args: argparse.Namespace) -> int:
    """Run the command. Return the code of `run_images` or `run_video`."""
    log_to_console(logging.INFO)
    check_arguments(args)
    cfg = config_of_run(args.config_file, args.opts, args.imports)
    set_model_keys(cfg, args)
    keep_freed_memory_for_inference(cfg)
    return run_video(args, cfg) if args.input is None else run_images(args, cfg)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError for a wrong value of a flag, or flags that contradict each other."""
    is_drawn_in_window = args.output is None and (args.json is None or args.show_iams)
    if not 0 <= args.confidence_threshold <= 1:
        raise ValueError(f"--confidence-threshold is {args.confidence_threshold}; it must be in [0, 1]")
    if args.mask_nms is not None and not 0 < args.mask_nms <= 1:
        raise ValueError(f"--mask-nms is {args.mask_nms}; it must be in (0, 1]")
    if args.show_iams and args.input is None:
        raise ValueError("--show-iams draws the activation maps of images: it needs --input")
    if args.ground_truth is not None and args.input is None:
        raise ValueError("--ground-truth belongs to images: it needs --input")
    if is_drawn_in_window and not _has_window():
        raise ValueError(f"Without --output the drawings are shown in a window. Give --output. {NO_WINDOW}")


def set_model_keys(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Translate the flags to keys of the model's config. Raise ValueError where the model has no such key."""
    if args.mask_nms is not None:
        config.set_declared(cfg, "mask_nms_key", args.mask_nms)
    if args.show_iams:
        config.set_declared(cfg, "activation_maps_key", True)
    # Masks below the threshold are not computed. The margin allows for rounded scores.
    cfg.MODEL.OUTPUT.SCORE_THRESHOLD = max(cfg.MODEL.OUTPUT.SCORE_THRESHOLD, 0.999 * args.confidence_threshold)


def run_images(args: argparse.Namespace, cfg: CfgNode) -> int:
    """Predict and draw images. Return the exit code: 0; 1 where an image could not be used; 130 after Ctrl-C."""
    paths = find_images(args.input)
    if args.output is not None:
        check_image_folder(args.output, paths)
    check_json(args, cfg, paths)
    predictor = Predictor(cfg)
    truth = None
    if args.ground_truth is not None:
        truth = GroundTruth(args.ground_truth, cfg.INPUT.MAX_IMAGE_PIXELS, predictor.classes.names)
    timed = TimedPredictor(predictor, args.confidence_threshold)
    results = CocoResults(predictor.classes)
    failures: list[str] = []

    def finish(predicted: tuple[Path, str, np.ndarray, Instances]) -> dict[str, np.ndarray]:
        path, name, image, instances = predicted
        drawings = {}
        if args.output is not None or args.json is None:
            drawings[name] = draw_instances(image, instances, predictor.metadata)
            true_instances = None
            if truth is not None:
                try:
                    true_instances = truth.find(path)
                except DataError as error:
                    failures.append(f"--ground-truth: {error}")
            if true_instances is not None:
                drawn_truth = draw_instances(image, true_instances, predictor.metadata)
                drawings[name] = captioned_grid([[(drawings[name], "predictions"), (drawn_truth, "ground truth")]])
        if args.show_iams:
            normalization = predictor.iam_normalization
            iams = draw_iams(image, instances, predictor.metadata, normalization=normalization)
            drawings[f"{IAM_FOLDER}/{name}"] = iams
        if args.output is not None:
            for relative_name, drawing in drawings.items():
                save_image(args.output / relative_name, drawing)
        if args.json is not None:
            results.add(str(path), instances)
        return drawings

    show = _show_all if args.output is None else None
    with Interruption() as interruption:
        predicted = predict_images(paths, timed, failures, cfg.INPUT.MAX_IMAGE_PIXELS)
        num_done, is_complete = run_stages(predicted, finish, show, IMAGE_QUEUE_LENGTH, interruption)
        if args.json is not None:
            results.write(args.json)
        if args.output is not None:
            iams = f", their activation maps in {args.output / IAM_FOLDER}" if args.show_iams else ""
            print(f"{num_done} of {len(paths)} images are in {args.output}{iams}")
        print(timed.speed(num_done, "images"))
    return _exit_code(failures, is_complete)


def run_video(args: argparse.Namespace, cfg: CfgNode, predictor: Predictor | None = None) -> int:
    """Predict and draw the frames of a video file or of a camera, up to a frame whose masks take too much memory.

    Return the exit code: 0; 1 where a frame ended the video; 130 after Ctrl-C.

    Args:
        args: of the command.
        cfg: of the model.
        predictor: replaces the one that the config describes.
    """
    is_camera = args.webcam is not None
    source, name = (args.webcam, "webcam") if is_camera else (args.video_input, without_password(args.video_input))
    output = None if args.output is None else video_file(args.output, name)
    if output is not None:
        check_not_read("--output", output, _files_read(args, cfg))
    check_json(args, cfg)
    is_written = output is not None or args.json is not None
    is_shown = not is_written or (is_camera and _has_window())
    with VideoReader(source) as reader:
        predictor = predictor or Predictor(cfg)
        timed = TimedPredictor(predictor, args.confidence_threshold)
        results = CocoResults(predictor.classes)
        drawer = VideoDrawer(predictor.metadata)
        failures: list[str] = []
        num_frames = 0

        def finish(predicted: tuple[np.ndarray, Instances]) -> np.ndarray:
            nonlocal num_frames
            frame, instances = predicted
            num_frames += 1
            if writer is not None or is_shown:
                frame = drawer.draw(frame, instances)
            if writer is not None:
                writer.write(frame)
            if args.json is not None:
                results.add(name, instances, frame=num_frames)
            return frame

        show = (lambda frame: _show(name, frame, wait_ms=1)) if is_shown else None
        with Interruption() as interruption:
            with contextlib.nullcontext() if output is None else VideoWriter(output, reader.fps) as writer:
                # The frames of a camera are shown without delay.
                predicted = predict_frames(reader, timed, failures, 0 if is_camera else QUEUE_LENGTH)
                num_done, is_complete = run_stages(predicted, finish, show, QUEUE_LENGTH, interruption)
            if num_done == 0 and is_complete and not failures:
                raise ValueError(f"OpenCV could not read a single frame of {name}")
            if args.json is not None:
                results.write(args.json)
            if output is not None and num_done > 0:
                print(f"{'' if is_complete and not failures else 'The first '}{num_done} frames are in {output}")
            print(timed.speed(num_done, "frames"))
    return _exit_code(failures, is_complete)


def predict_images(
    paths: Sequence[Path], timed: TimedPredictor, failures: list[str], max_pixels: int
) -> Generator[tuple[Path, str, np.ndarray, Instances], None, None]:
    """Yield path, output name, RGB image and instances of each image; append the errors of others to ``failures``."""
    with contextlib.closing(read_images_ahead(paths, max_pixels, IMAGE_QUEUE_LENGTH)) as images:
        named = zip(paths, output_names(paths), images, strict=True)
        for path, name, image in tqdm(named, total=len(paths), unit="image"):
            result = timed.predict_or_error(image)
            if isinstance(result, Exception):
                failures.append(describe_failure(str(path), result))
            else:
                yield path, name, image, result


def predict_frames(
    reader: VideoReader, timed: TimedPredictor, failures: list[str], queue_length: int
) -> Generator[tuple[np.ndarray, Instances], None, None]:
    """Yield each frame of a video with its instances; ``queue_length`` frames are read ahead.

    End at a frame whose masks take too much memory, and append the error to ``failures``.
    """
    with contextlib.closing(read_ahead(reader, queue_length)) as frames:
        for number, frame in enumerate(tqdm(frames, total=reader.num_frames, unit="frame"), 1):
            result = timed.predict_or_error(frame)
            if isinstance(result, Exception):
                failures.append(describe_failure(f"frame {number}", result))
                return
            yield frame, result


def check_json(args: argparse.Namespace, cfg: CfgNode, paths: Sequence[Path] = ()) -> None:
    """Raise ValueError where a file of ``--json`` would overwrite a file that is read."""
    if args.json is not None:
        for file in (args.json, coco_images_file(args.json)):
            check_not_read("--json", file, [*paths, *_files_read(args, cfg)])


def _files_read(args: argparse.Namespace, cfg: CfgNode) -> list[str | Path | None]:
    return [args.video_input, args.ground_truth, args.config_file or None, cfg.MODEL.WEIGHTS]


def _exit_code(failures: list[str], is_complete: bool) -> int:
    for failure in failures:
        print(failure, file=sys.stderr)
    if not is_complete:
        return EXIT_INTERRUPTED
    return 1 if failures else 0


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

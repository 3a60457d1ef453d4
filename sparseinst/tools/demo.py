"""Draw predictions on pictures, videos and the webcam: ``python -m sparseinst.tools.demo --help``."""

import argparse
import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.structures import Instances
from detectron2.utils.logger import setup_logger
from tqdm import tqdm

from sparseinst.data.coco_json import ClassInfo
from sparseinst.data.ground_truth import GroundTruth
from sparseinst.engine.setup import load_config
from sparseinst.inference import (
    ImageReadError,
    Predictor,
    VideoReader,
    VideoWriter,
    draw_beside,
    draw_iams,
    draw_instances,
    draw_video,
    read_image,
    to_coco_results,
)
from sparseinst.modeling import MaskMemoryError
from sparseinst.tools.demo_files import (
    IAM_FOLDER,
    check_image_folder,
    check_not_read,
    find_images,
    output_names,
    save_picture,
    video_file,
    write_file,
)


class CocoResults:
    """What the command predicts, collected for ``--json``."""

    def __init__(self, classes: ClassInfo) -> None:
        self._classes = classes
        self._images: list[dict] = []
        self._results: list[dict] = []

    def add(self, file_name: str, instances: Instances, **extra: int) -> None:
        """Append the instances of one picture; image ids count from 1."""
        height, width = instances.image_size
        image_id = len(self._images) + 1
        self._images.append({"id": image_id, "file_name": file_name, "height": height, "width": width, **extra})
        self._results += to_coco_results(instances, image_id, self._classes.category_ids)

    def write(self, path: Path) -> None:
        """Write the results list to ``path``, and beside it STEM_images.json, a COCO data set without annotations."""
        categories = [{"id": id, "name": name} for name, id in zip(*self._classes, strict=True)]
        images = {"images": self._images, "annotations": [], "categories": categories}
        write_file(path, json.dumps(self._results).encode())
        write_file(images_file(path), json.dumps(images).encode())


def images_file(results: Path) -> Path:
    """Where it stands which picture an image id of the results is."""
    return results.with_name(f"{results.stem}_images.json")


def run_images(args: argparse.Namespace, cfg: CfgNode) -> int:
    """Predict and draw pictures; returns 1 where one of them could not be read, else 0."""
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
    failures = []
    for path, name in zip(tqdm(paths, unit="picture"), output_names(paths), strict=True):
        try:
            image = read_image(path)
        except ImageReadError as error:
            failures.append(str(error))
            continue
        try:
            instances = _confident(predictor([image], "RGB")[0], args.confidence_threshold)
        except MaskMemoryError as error:
            failures.append(f"{path}: {error}")
            continue
        results.add(str(path), instances)
        pictures = {}
        if args.output is not None or args.json is None:
            pictures[name] = draw_instances(image, instances, predictor.metadata)
            truth = None if ground_truth is None else ground_truth.find(path)
            if truth is not None:
                truth_picture = draw_instances(image, truth, predictor.metadata)
                pictures[name] = draw_beside([(pictures[name], "predictions"), (truth_picture, "ground truth")])
        if args.show_iams:
            pictures[f"{IAM_FOLDER}/{name}"] = draw_iams(
                image, instances, predictor.metadata, normalization=predictor.iam_normalization
            )
        if args.output is not None:
            for relative_name, picture in pictures.items():
                save_picture(args.output / relative_name, picture)
        elif any([_show(relative_name, picture, wait_ms=0) for relative_name, picture in pictures.items()]):
            break

    if args.json is not None:
        results.write(args.json)
    num_drawn = len(paths) - len(failures)
    if args.output is not None:
        iams = f", their activation maps in {args.output / IAM_FOLDER}" if args.show_iams else ""
        print(f"{num_drawn} of {len(paths)} pictures are in {args.output}{iams}")
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


def run_video(args: argparse.Namespace, cfg: CfgNode) -> int:
    """Predict and draw the frames of a video file or of a camera; returns 0."""
    source, name = (args.video_input, args.video_input) if args.webcam is None else (args.webcam, "webcam")
    output = None if args.output is None else video_file(args.output, name)
    if output is not None:
        check_not_read("--output", output, _files_read(args, cfg))
    _check_json(args, cfg)
    show = args.webcam is not None or (output is None and args.json is None)
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(VideoReader(source))
        writer = None if output is None else stack.enter_context(VideoWriter(output, reader.fps))
        predictor = Predictor(cfg)
        results = CocoResults(predictor.classes)
        num_frames = 0

        def predict() -> Iterator[tuple[np.ndarray, Instances]]:
            nonlocal num_frames
            for frame in tqdm(reader, total=reader.num_frames, unit="frame"):
                instances = _confident(predictor([frame], "RGB")[0], args.confidence_threshold)
                num_frames += 1
                results.add(name, instances, frame=num_frames)
                yield frame, instances

        draws = writer is not None or show
        for frame in draw_video(predict(), predictor.metadata) if draws else predict():
            if writer is not None:
                writer.write(frame)
            if show and _show(name, frame, wait_ms=1):
                break
    if num_frames == 0:
        raise ValueError(f"OpenCV could not read a single frame of {name}")
    if args.json is not None:
        results.write(args.json)
    if output is not None:
        print(f"{num_frames} frames are in {output}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="python -m sparseinst.tools.demo", description=__doc__)
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
        do not allow a run.
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
        return run_video(args, cfg) if args.input is None else run_images(args, cfg)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


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


def _confident(instances: Instances, threshold: float) -> Instances:
    return instances[instances.scores >= threshold]


def _show(title: str, picture: np.ndarray, wait_ms: int) -> bool:
    """Show a picture in a window; True where the user pressed q or escape."""
    cv2.imshow(title, picture[:, :, ::-1])
    return cv2.waitKey(wait_ms) & 0xFF in (ord("q"), 27)


if __name__ == "__main__":
    sys.exit(main())

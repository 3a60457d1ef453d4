"""Draw predictions on pictures, videos and the webcam: ``python -m sparseinst.tools.demo --help``."""

import argparse
import contextlib
import glob
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
from PIL import Image
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

# What a folder or a glob is searched for; a file named by itself is tried whatever its name.
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
IAM_FOLDER = "iams"

logger = logging.getLogger(__name__)


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
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self._results), encoding="utf-8")
        path.with_name(f"{path.stem}_images.json").write_text(json.dumps(images), encoding="utf-8")


def find_images(inputs: Sequence[str]) -> list[Path]:
    """Picture files that the names stand for, each file once, in the order of the names.

    Args:
        inputs: files, folders (the pictures directly in them) and glob patterns (``**`` for any depth).

    Raises:
        ValueError: a name that stands for no picture.
    """
    paths: dict[Path, Path] = {}
    for name in inputs:
        path = Path(name)
        if path.is_file():
            found = [path]
        else:
            candidates = path.iterdir() if path.is_dir() else map(Path, glob.glob(name, recursive=True))
            found = sorted(p for p in candidates if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        if not found:
            kind = "The folder" if path.is_dir() else "The file or pattern"
            raise ValueError(f"--input: {kind} {name!r} gives no picture ({', '.join(IMAGE_SUFFIXES)})")
        for path in found:
            paths.setdefault(path.resolve(), path)
    return list(paths.values())


def output_names(paths: Sequence[Path]) -> list[str]:
    """A file name for each picture's drawing, no two alike: its own, with _2, _3, ... where another one has it.

    Args:
        paths: pictures; what is neither .jpg, .jpeg nor .png becomes .png.
    """
    # File systems that ignore case are common.
    own_names = [p.name if p.suffix.lower() in (".jpg", ".jpeg", ".png") else f"{p.stem}.png" for p in paths]
    reserved = {name.lower() for name in own_names}
    taken: set[str] = set()
    names = []
    for name in own_names:
        candidate, count = name, 1
        while candidate.lower() in taken or (count > 1 and candidate.lower() in reserved):
            count += 1
            candidate = f"{Path(name).stem}_{count}{Path(name).suffix}"
        taken.add(candidate.lower())
        names.append(candidate)
    return names


def run_images(args: argparse.Namespace, cfg: CfgNode) -> int:
    """Predict and draw pictures; returns 1 where one of them could not be read, else 0."""
    paths = find_images(args.input)
    if args.output is not None:
        _check_image_folder(args.output, paths)
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
        instances = _confident(predictor([image], "RGB")[0], args.confidence_threshold)
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
                _save(args.output / relative_name, picture)
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
    output = None if args.output is None else _video_file(args.output, name)
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


def _check_image_folder(folder: Path, paths: Sequence[Path]) -> None:
    if folder.suffix.lower() in IMAGE_SUFFIXES and not folder.is_dir():
        raise ValueError(f"--output is a folder for --input; {folder} is named like a picture")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {folder} is a file; it must be a folder")
    written_to = {folder.resolve(), (folder / IAM_FOLDER).resolve()}
    for path in paths:
        if path.resolve().parent in written_to:
            raise ValueError(
                f"--output {folder} is where the input {path} lies and would be overwritten; give another one"
            )


def _video_file(output: Path, source_name: str) -> Path:
    is_file = output.suffix.lower() in VIDEO_SUFFIXES and not output.is_dir()
    path = output if is_file else output / f"{Path(source_name).stem}.mp4"
    if path.resolve() == Path(source_name).resolve():
        raise ValueError(f"--output would overwrite the input {source_name}; give another one")
    return path


def _confident(instances: Instances, threshold: float) -> Instances:
    return instances[instances.scores >= threshold]


def _save(path: Path, picture: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, quality=95)


def _show(title: str, picture: np.ndarray, wait_ms: int) -> bool:
    """Show a picture in a window; True where the user pressed q or escape."""
    cv2.imshow(title, picture[:, :, ::-1])
    return cv2.waitKey(wait_ms) & 0xFF in (ord("q"), 27)


if __name__ == "__main__":
    sys.exit(main())

"""What is wrong with a data set, and what is in it: ``python -m sparseinst.tools.check_dataset JSON IMAGES``.

Reads a COCO json and every one of its images, reports all problems at once, and says which numbers of classes and
masks a model for it needs. Exit code 1 where a training would stop because of the data, at its start or on the way; 0
where it would not, also with warnings; 2 where the arguments are wrong.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.modeling import build_backbone
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from sparseinst import config
from sparseinst.config import load_config
from sparseinst.data.annotations import MaskWindow, check_segmentation, is_whole, read_mask
from sparseinst.data.augmentations import ResizeShortestEdge
from sparseinst.data.coco_checks import Finding, check_content
from sparseinst.data.coco_json import NOTHING_TO_TRAIN_ON, crowded_warning, missing_files, read_json
from sparseinst.data.dataset_mapper import check_image_size
from sparseinst.data.images import DataError, read_image, read_image_size

DEFAULT_CONFIG = "sparse_inst_r50_giam"
# Pixels: COCO's limits of small and medium objects.
_SMALL, _MEDIUM = 32**2, 96**2
# What images are padded to a multiple of, so that the mask grid's cells begin there.
_BLOCK = 32


class ImageSurvey(NamedTuple):
    """What was found in one image.

    Attributes:
        finding: what is wrong with the file, or None.
        areas: of its objects in pixels of the file; 0 where nothing is drawn.
        num_vanished: how many objects of some pixels have none on the mask grid.
    """

    finding: Finding | None
    areas: list[int]
    num_vanished: int


class _Images(Dataset):
    """Looks at one image and its objects at a time, in a worker of a DataLoader."""

    def __init__(self, images: list[tuple[dict, list[dict]]], image_root: Path, cfg: CfgNode, is_quick: bool) -> None:
        self.images = images
        self.image_root = image_root
        self.is_quick = is_quick
        self.max_pixels = cfg.INPUT.MAX_IMAGE_PIXELS
        self.resize = ResizeShortestEdge([_train_size(cfg)], cfg.INPUT.MAX_SIZE_TRAIN, "choice")
        self.pixels_per_cell = None if cfg.MODEL.SPARSE_INST.ANTIALIASED_TARGETS else _pixels_per_cell(cfg)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> ImageSurvey:
        image, annotations = self.images[index]
        path = self.image_root / image["file_name"]
        try:
            if self.is_quick:
                size = read_image_size(path, self.max_pixels)
            else:
                size = read_image(path, max_pixels=self.max_pixels).shape[:2]
        except DataError as error:
            return ImageSurvey(Finding("unreadable picture", str(error)), [], 0)
        try:
            check_image_size({**image, "file_name": path}, size)
        except DataError as error:
            return ImageSurvey(Finding("another image size", str(error)), [], 0)
        resize = self.resize.get_transform(np.broadcast_to(np.uint8(0), size))
        areas, num_vanished = [], 0
        for annotation in annotations:
            window = read_mask(annotation["segmentation"], T.TransformList([]), size, size)
            areas.append(0 if window is None else int(window.mask.sum()))
            if window is not None and self.pixels_per_cell:
                resized = read_mask(
                    annotation["segmentation"], T.TransformList([resize]), size, (resize.new_h, resize.new_w)
                )
                num_vanished += resized is None or not is_on_grid(resized, self.pixels_per_cell)
        return ImageSurvey(None, areas, num_vanished)


def is_on_grid(window: MaskWindow, pixels_per_cell: float) -> bool:
    """Whether an object is in the training's targets, which are its mask reduced bilinearly to the mask grid.

    Args:
        window: the object's mask at the training size.
        pixels_per_cell: side of a cell of the mask grid, pixels.
    """
    left, top, right, bottom = window.box()
    top, bottom = top % _BLOCK, bottom - top // _BLOCK * _BLOCK
    left, right = left % _BLOCK, right - left // _BLOCK * _BLOCK
    height, width = (-(-end // _BLOCK) * _BLOCK for end in (bottom, right))
    blocks = torch.zeros(1, 1, height, width)
    blocks[0, 0, top:bottom, left:right] = torch.from_numpy(window.mask)
    cells = (round(height / pixels_per_cell), round(width / pixels_per_cell))
    return bool(F.interpolate(blocks, size=cells, mode="bilinear", align_corners=False).any())


def _train_size(cfg: CfgNode) -> int:
    """The largest short side in training, pixels."""
    sizes = cfg.INPUT.MIN_SIZE_TRAIN
    return sizes if isinstance(sizes, int) else max(sizes)


def _pixels_per_cell(cfg: CfgNode) -> float:
    sparse_inst = cfg.MODEL.SPARSE_INST
    finest = build_backbone(cfg).output_shape()[sparse_inst.ENCODER.IN_FEATURES[0]]
    return finest.stride / sparse_inst.DECODER.SCALE_FACTOR


def find_content_problems(content: Any, image_root: Path, cfg: CfgNode, args: argparse.Namespace) -> Iterator[Finding]:
    """What the start of a training or evaluation refuses or warns of, without a look into the image files."""
    report = check_content(content, args.evaluation)
    yield from report.findings
    if isinstance(content, dict) and not content.get("annotations"):
        yield Finding("no annotations", NOTHING_TO_TRAIN_ON, stops=not args.evaluation)
    elif not report.problems() and not report.num_instances.total():
        yield Finding("no objects", NOTHING_TO_TRAIN_ON, stops=not args.evaluation)
    images, categories = _entries(content, "images"), _entries(content, "categories")
    file_names = [image["file_name"] for image in images if isinstance(image.get("file_name"), str)]
    for file_name in missing_files(file_names, image_root):
        yield Finding("missing file", f"{image_root} has no file {file_name!r}")
    for file_name, count in Counter(file_names).items():
        if count > 1:
            yield Finding("file named twice", f"{file_name!r} is named by {count} images", stops=False)
    num_classes = cfg.MODEL.SPARSE_INST.DECODER.NUM_CLASSES
    if args.config_file and len(categories) != num_classes:
        yield Finding(
            "number of classes",
            f"there are {len(categories)} categories, but MODEL.SPARSE_INST.DECODER.NUM_CLASSES is {num_classes}: set "
            f"MODEL.SPARSE_INST.DECODER.NUM_CLASSES {len(categories)}",
        )
    crowded = crowded_warning(report.num_instances, config.max_instances(cfg))
    if crowded:
        yield Finding("more objects than masks", crowded, stops=False)


def _entries(content: Any, part: str) -> list[dict]:
    entries = content.get(part) if isinstance(content, dict) else None
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def present_images(content: Any, image_root: Path) -> list[tuple[dict, list[dict]]]:
    """The images whose files can be looked at, each with those of its annotations that are objects and can be drawn."""
    images: dict[int, tuple[dict, list[dict]]] = {}
    for image in _entries(content, "images"):
        is_named = isinstance(image.get("file_name"), str) and is_whole(image.get("id"))
        size = (image.get("height"), image.get("width"))
        if is_named and all(is_whole(side) and side > 0 for side in size) and image["id"] not in images:
            images[image["id"]] = (image, [])
    absent = set(missing_files([image["file_name"] for image, _ in images.values()], image_root))
    for annotation in _entries(content, "annotations"):
        image_id = annotation.get("image_id")
        if not is_whole(image_id) or image_id not in images or annotation.get("iscrowd", 0) not in (0, False):
            continue
        image, annotations = images[image_id]
        try:
            if check_segmentation(annotation.get("segmentation"), (image["height"], image["width"])) is None:
                annotations.append(annotation)
        except DataError:
            pass  # find_content_problems has told.
    return [pair for pair in images.values() if pair[0]["file_name"] not in absent]


def survey_images(
    images: list[tuple[dict, list[dict]]], image_root: Path, cfg: CfgNode, *, is_quick: bool = False, workers: int = 0
) -> Iterator[ImageSurvey]:
    """Look at the files of :func:`present_images`, with a progress bar on stderr.

    Args:
        images: from :func:`present_images`.
        image_root: the folder of the files.
        cfg: INPUT is read, and what the size of the mask grid follows from.
        is_quick: read the headers only.
        workers: processes besides this one.
    """
    dataset = _Images(images, image_root, cfg, is_quick)
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, collate_fn=_unchanged)
    yield from tqdm(loader, desc="Images", unit="image", disable=not images)


def broken_images(surveys: list[ImageSurvey], cfg: CfgNode) -> Iterator[Finding]:
    """What is wrong with the files: a warning each where a training passes over so few, otherwise a problem each."""
    findings = [survey.finding for survey in surveys if survey.finding is not None]
    limit = cfg.DATALOADER.MAX_BROKEN_IMAGES
    stops = len(findings) > limit or 0 < len(findings) == len(surveys)
    yield from (finding._replace(stops=stops) for finding in findings)
    if findings:
        yield Finding(
            "images that cannot be used",
            f"{len(findings)} of {len(surveys)}; a training passes over at most DATALOADER.MAX_BROKEN_IMAGES, which is "
            f"{limit}: repair them",
            stops,
        )


def _unchanged(survey: ImageSurvey) -> ImageSurvey:
    return survey


def describe_content(content: Any, surveys: list[ImageSurvey], cfg: CfgNode) -> Iterator[str]:
    """What is in a data set, line by line."""
    categories, annotations = _entries(content, "categories"), _entries(content, "annotations")
    num_crowds = sum(bool(annotation.get("iscrowd", 0)) for annotation in annotations)
    num_images = len(_entries(content, "images"))
    yield (f"{num_images} images, {len(categories)} categories, {len(annotations)} annotations ({num_crowds} crowds)")
    of_category = Counter(str(annotation.get("category_id")) for annotation in annotations)
    shown = [f"{category.get('name')} {of_category[str(category.get('id'))]}" for category in categories[:20]]
    yield "Annotations of each category: " + ", ".join(shown) + ", ..." * (len(categories) > 20)
    yield "Of the images that can be read:"
    counts = np.array([len(survey.areas) for survey in surveys if survey.finding is None])
    areas = np.array([area for survey in surveys for area in survey.areas])
    if len(counts) == 0:
        yield "  none"
        return
    yield (
        f"  objects per image: median {np.median(counts):.0f}, 99th percentile {np.percentile(counts, 99):.0f}, most "
        f"{counts.max()}; images without objects: {(counts == 0).sum()} of {len(counts)}"
    )
    if len(areas) == 0:
        return
    shares = [(areas < _SMALL).mean(), ((areas >= _SMALL) & (areas < _MEDIUM)).mean(), (areas >= _MEDIUM).mean()]
    yield (
        f"  objects by size: {shares[0]:.1%} small (below 32 x 32 pixels), {shares[1]:.1%} medium, {shares[2]:.1%} "
        f"large (from 96 x 96); without a pixel: {(areas == 0).sum()}"
    )
    if cfg.MODEL.SPARSE_INST.ANTIALIASED_TARGETS:
        yield "  objects that the mask grid loses: none, with MODEL.SPARSE_INST.ANTIALIASED_TARGETS True"
    else:
        num_vanished = sum(survey.num_vanished for survey in surveys)
        yield (
            f"  objects that the mask grid loses at the training's largest size (short side {_train_size(cfg)}): "
            f"{num_vanished} of {(areas > 0).sum()} ({num_vanished / max(1, (areas > 0).sum()):.1%})"
            + "; MODEL.SPARSE_INST.ANTIALIASED_TARGETS True keeps them"
            * (num_vanished > 0)
        )
    yield (
        f"To be set: MODEL.SPARSE_INST.DECODER.NUM_CLASSES {len(categories)}; "
        f"MODEL.SPARSE_INST.DECODER.NUM_MASKS {counts.max()} or more holds the objects of every image (it is "
        f"{cfg.MODEL.SPARSE_INST.DECODER.NUM_MASKS})"
    )


def describe_findings(findings: Iterable[Finding], num_shown: int) -> Iterator[str]:
    """All problems and all warnings, line by line, at most ``num_shown`` of each kind, and how many there are."""
    for stops, title in ((True, "Problems, which stop a training"), (False, "Warnings")):
        by_kind: dict[str, list[str]] = {}
        for finding in findings:
            if finding.stops == stops:
                by_kind.setdefault(finding.kind, []).append(finding.message)
        if by_kind:
            yield f"{title}: {sum(map(len, by_kind.values()))}"
        for kind, messages in by_kind.items():
            yield f"  {kind}: {len(messages)}"
            yield from (f"    {message}" for message in messages[:num_shown])
            if len(messages) > num_shown:
                yield f"    ... and {len(messages) - num_shown} more"


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m sparseinst.tools.check_dataset",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="What is a problem, and what a warning: the table at the top of sparseinst/data/coco_checks.py",
    )
    parser.add_argument("json", type=Path, help="COCO json")
    parser.add_argument("images", type=Path, help="folder of its images")
    parser.add_argument(
        "--config-file",
        default="",
        help="of the training, whose number of classes is then checked too; otherwise sparse_inst_r50_giam's sizes",
    )
    parser.add_argument("--evaluation", action="store_true", help="check what only an evaluation reads, too")
    parser.add_argument("--quick", action="store_true", help="read the headers of the image files only")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images, besides this one")
    parser.add_argument("--show", type=int, default=5, metavar="N", help="of each kind of problem (default: 5)")
    parser.add_argument("--opts", nargs="*", default=[], metavar="KEY VALUE", help="override the config")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments after the program's name; ``sys.argv``'s where None.

    Returns:
        Exit code: 0, 1 where a training would stop, 2 where the arguments are wrong.
    """
    args = build_parser().parse_args(argv)
    try:
        cfg = load_config(args.config_file or DEFAULT_CONFIG, args.opts)
        if not args.json.is_file():
            raise ValueError(f"There is no file {args.json}")
        if not args.images.is_dir():
            raise ValueError(f"There is no folder {args.images}")
        if args.workers < 0 or args.show < 0:
            raise ValueError("--workers and --show must not be negative")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        content = read_json(args.json)
    except ValueError as error:
        print(f"{error}\nA training with these data would stop.")
        return 1
    findings = list(find_content_problems(content, args.images, cfg, args))
    images = present_images(content, args.images)
    surveys = list(survey_images(images, args.images, cfg, is_quick=args.quick, workers=args.workers))
    findings += broken_images(surveys, cfg)
    print(args.json)
    for line in (*describe_content(content, surveys, cfg), *describe_findings(findings, args.show)):
        print(line)
    stops = any(finding.stops for finding in findings)
    what = "An evaluation" if args.evaluation else "A training"
    print(f"{what} with these data would stop." if stops else f"Nothing here stops {what.lower()}.")
    return int(stops)


if __name__ == "__main__":
    sys.exit(main())

"""Find the problems and describe the content of a data set, for the command `check_dataset`."""

import argparse
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from torch.utils.data import DataLoader
from tqdm import tqdm

from sparseinst import config
from sparseinst.config import load_config
from sparseinst.data.augmentations import ResizeShortestEdge
from sparseinst.data.coco_checks import Finding, ImageEntry, JsonReport, check_content
from sparseinst.data.coco_json import NOTHING_TO_TRAIN_ON
from sparseinst.data.crowded_images import MOST_INSTANCES, crowded_warning
from sparseinst.data.dataset_mapper import check_image_size
from sparseinst.data.image_files import (
    FileNames,
    ImageTraits,
    find_files,
    image_traits,
    name_findings,
    trait_findings,
)
from sparseinst.data.images import DataError, ImageReadError, read_image, read_image_size
from sparseinst.data.json_file import read_json
from sparseinst.data.mask_decoding import read_mask
from sparseinst.data.model_keys import sides_in_training
from sparseinst.data.other_formats import describe_path
from sparseinst.data.recipes import AUTO, RECIPES, check_recipe_packages, choose_recipe
from sparseinst.modeling.meta_arch import InstanceSegmenter
from sparseinst.structures.image_objects import ImageObjects
from sparseinst.structures.mask_window import MaskWindow
from sparseinst.tools.check_dataset import DEFAULT_CONFIG

# Pixels: COCO's limits of small and medium objects.
_SMALL, _MEDIUM = 32**2, 96**2
# The sides of training images are padded to a multiple of this by most models.
_DIVISIBILITY = 32


class ImageSurvey(NamedTuple):
    """The result for one image.

    Attributes:
        finding: the flaw of the file, or None.
        traits: of the file; None where it has a flaw.
        areas: of its objects, pixels of the file; 0 where rasterization gives no pixel.
        num_vanished: number of objects with pixels that the training targets lose.
        objects: those with pixels, at the training's largest size.
    """

    finding: Finding | None
    traits: ImageTraits | None = None
    areas: list[int] = []
    num_vanished: int = 0
    objects: ImageObjects | None = None


def check_files(
    content: Any, report: JsonReport, files: FileNames, cfg: CfgNode, args: argparse.Namespace
) -> Iterator[Finding]:
    """Yield the findings of the json and of its file names without reading an image; `broken_images` has the absent.

    Args:
        content: the parsed json.
        report: of `check_content`.
        files: of the json's names.
        cfg: the config of the model.
        args: of the command.
    """
    yield from report.findings
    is_empty = isinstance(content, dict) and not content.get("annotations")
    if is_empty or not (report.problems() or report.num_instances.total()):
        yield Finding("no objects", NOTHING_TO_TRAIN_ON, stops=not args.evaluation)
    yield from name_findings(_file_names(content), files, args.images)
    num_categories = len(_entries(content, "categories"))
    key, num_classes = config.num_classes(cfg) or (None, num_categories)
    if num_categories != num_classes and key and config.is_explicit(cfg, key):
        message = f"there are {num_categories} categories, but {key} is {num_classes}: set {key} {num_categories}"
        yield Finding("number of classes", message)
    if crowded := crowded_warning(report.num_instances, cfg, before_training=True):
        yield Finding("more objects than masks", crowded, stops=False)


def _entries(content: Any, part: str) -> list[dict]:
    entries = content.get(part) if isinstance(content, dict) else None
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def _file_names(content: Any) -> list[str]:
    names = [image.get("file_name") for image in _entries(content, "images")]
    return [name for name in names if isinstance(name, str)]


def survey_image(
    entry: ImageEntry, image_root: Path, cfg: CfgNode, is_in_target: Callable[[MaskWindow], bool] | None, is_quick: bool
) -> ImageSurvey:
    """Read one image and rasterize its objects.

    Args:
        entry: of `JsonReport.usable`.
        image_root: the folder of the files.
        cfg: INPUT is read.
        is_in_target: see `InstanceSegmenter.target_check`.
        is_quick: read the header only.
    """
    image, annotations = entry
    path, max_pixels = image_root / image["file_name"], cfg.INPUT.MAX_IMAGE_PIXELS
    try:
        size = read_image_size(path, max_pixels) if is_quick else read_image(path, max_pixels=max_pixels).shape[:2]
        check_image_size({**image, "file_name": path}, size)
        traits = image_traits(image, image_root, max_pixels, decode=not is_quick)
    except DataError as error:
        kind = "unreadable image" if isinstance(error, ImageReadError) else "another image size"
        return ImageSurvey(Finding(kind, str(error)))
    side = cfg.INPUT.SQUARE_SIZE
    shortest_edge = ResizeShortestEdge([_train_size(cfg)], cfg.INPUT.MAX_SIZE_TRAIN, "choice")
    resize = T.Resize((side, side)) if side else shortest_edge
    transform = resize.get_transform(np.broadcast_to(np.uint8(0), size))
    # Detectron2 returns no ResizeTransform where the size stays.
    new_size = size if isinstance(transform, T.NoOpTransform) else (transform.new_h, transform.new_w)
    windows = []
    areas, num_vanished = [], 0
    for annotation in annotations:
        segmentation = annotation["segmentation"]
        window = read_mask(segmentation, T.TransformList([]), size, size)
        areas.append(0 if window is None else int(window.mask.sum()))
        if window is None:
            continue
        windows.append(window)
        if is_in_target is not None:
            resized = read_mask(segmentation, T.TransformList([transform]), size, new_size)
            num_vanished += resized is None or not is_in_target(resized)
    return ImageSurvey(None, traits, areas, num_vanished, _image_objects(windows, size, new_size))


def _image_objects(windows: list[MaskWindow], size: tuple[int, int], new_size: tuple[int, int]) -> ImageObjects:
    """Return the objects of an image of one size as they are at another size."""
    scale = np.array(new_size) / size
    boxes = np.array([window.box() for window in windows], np.float64).reshape(-1, 4)
    centers = np.array([window.center() for window in windows]).reshape(-1, 2)
    padded_size = tuple(-(-side // _DIVISIBILITY) * _DIVISIBILITY for side in new_size)
    return ImageObjects(padded_size, boxes * np.tile(scale[::-1], 2), centers * scale)


def _train_size(cfg: CfgNode) -> int:
    """Return the largest short side in training, pixels."""
    sizes = cfg.INPUT.MIN_SIZE_TRAIN
    return sizes if isinstance(sizes, int) else max(sizes)


def broken_images(surveys: list[ImageSurvey], absent: list[str], cfg: CfgNode) -> Iterator[Finding]:
    """Yield the missing and the broken files: warnings where a training skips so few images, else problems."""
    findings = [Finding("missing file", f"the file {file_name!r} does not exist") for file_name in absent]
    findings += [survey.finding for survey in surveys if survey.finding is not None]
    limit, num_images = cfg.DATALOADER.MAX_BROKEN_IMAGES, len(surveys) + len(absent)
    stops = len(findings) > limit or 0 < len(findings) == num_images
    yield from (finding._replace(stops=stops) for finding in findings)
    if findings:
        message = f"{len(findings)} of {num_images}; a training skips at most DATALOADER.MAX_BROKEN_IMAGES, which is "
        yield Finding("images that cannot be used", f"{message}{limit}: repair them", stops)


def describe_content(
    content: Any, surveys: list[ImageSurvey], sides: np.ndarray, cfg: CfgNode, remedy: str | None, keeps_all: bool
) -> Iterator[str]:
    """Yield lines about the content of a data set, whose objects have these sides in training.

    With the remedy, or where keeps_all, the mask grid loses no object; without a remedy the model has no such grid.
    """
    categories, annotations = _entries(content, "categories"), _entries(content, "annotations")
    num_crowds = sum(bool(annotation.get("iscrowd", 0)) for annotation in annotations)
    num_images = len(_entries(content, "images"))
    yield f"{num_images} images, {len(categories)} categories, {len(annotations)} annotations ({num_crowds} crowds)"
    of_category = Counter(str(annotation.get("category_id")) for annotation in annotations)
    shown = [f"{category.get('name')} {of_category[str(category.get('id'))]}" for category in categories[:20]]
    yield "Annotations of each category: " + ", ".join(shown) + ", ..." * (len(categories) > 20)
    yield "In the images that can be read:"
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
    small, medium, large = np.histogram(areas, (0, _SMALL, _MEDIUM, np.inf))[0] / len(areas)
    yield (
        f"  objects by size: {small:.1%} small (below 32 x 32 pixels), {medium:.1%} medium, {large:.1%} large (from "
        f"96 x 96); without a pixel: {(areas == 0).sum()}"
    )
    if len(sides):
        yield (
            f"  objects at the training's largest size, sqrt(width * height): median {np.median(sides):.0f} pixels, a "
            f"twentieth below {np.percentile(sides, 5):.1f}"
        )
    if remedy is None:
        pass
    elif keeps_all:
        yield f"  objects that the mask grid loses: none, with {remedy}"
    else:
        num_lost, num_drawn = sum(survey.num_vanished for survey in surveys), (areas > 0).sum()
        keeps = f"; {remedy} keeps them" * bool(num_lost)
        yield (
            f"  objects that the mask grid loses at the training's largest size (short side {_train_size(cfg)}): "
            f"{num_lost} of {num_drawn} ({num_lost / max(1, num_drawn):.1%}){keeps}"
        )
    limits = [f"{key} {len(categories)}" for key, _ in filter(None, [config.num_classes(cfg)])]
    for key, most in filter(None, [config.max_instances(cfg)]):
        limits.append(f"{key} {counts.max()} or more, for the objects of every image (it is {most})")
    if limits:
        yield (
            f"The data need {'; '.join(limits)}. A training sets them by itself, masks up to {MOST_INSTANCES}, where "
            "neither you nor MODEL.WEIGHTS do"
        )


def describe_findings(findings: Iterable[Finding], num_shown: int) -> Iterator[str]:
    """Yield lines about problems and warnings: the number of each kind, and at most ``num_shown`` of each."""
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


def run(args: argparse.Namespace) -> int:
    """Check the data set, print the report, and return the exit code; see `check_dataset.main`."""
    if other_format := describe_path(args.json):
        raise ValueError(other_format)
    if not args.json.is_file():
        raise ValueError(f"The file {args.json} does not exist")
    if not args.images.is_dir():
        raise ValueError(f"The folder {args.images} does not exist")
    if args.workers < 0 or args.show < 0:
        raise ValueError("--workers and --show must not be negative")
    try:
        content = read_json(args.json)
    except ValueError as error:
        print(f"{error}\nA training with these data would stop.")
        return 1
    recipe = ""
    if args.recipe:
        try:
            args.config_file, recipe = choose_recipe(args.recipe, str(args.json), args.config_file)
        except ValueError as error:
            if args.recipe != AUTO or args.config_file:
                raise
            # The report says more about the json.
            args.config_file, recipe = RECIPES["ordinary"], f"Recipe ordinary, because auto fails: {error}"
        check_recipe_packages()
    cfg = load_config(args.config_file or DEFAULT_CONFIG, args.opts, imports=args.imports)
    file_names = _file_names(content)
    files = find_files(file_names, args.images)
    report = check_content(content, args.evaluation)
    findings = list(check_files(content, report, files, cfg, args))
    absent = set(files.absent)
    images = [({**image, "file_name": files.found.get(image["file_name"], image["file_name"])}, annotations)
              for image, annotations in report.usable.values() if image["file_name"] not in absent]  # fmt: skip
    model = config.meta_architecture(cfg)
    if not (isinstance(model, type) and issubclass(model, InstanceSegmenter)):
        # The base class knows nothing about the targets.
        model = InstanceSegmenter
    is_in_target = model.target_check(cfg)
    survey = partial(survey_image, image_root=args.images, cfg=cfg, is_in_target=is_in_target, is_quick=args.quick)
    # Without batches, collate_fn is called in a worker with each element.
    loader = DataLoader(images, batch_size=None, num_workers=args.workers, collate_fn=survey)
    surveys = list(tqdm(loader, desc="Images", unit="image", disable=not images))
    findings += broken_images(surveys, files.absent, cfg)
    findings += [Finding("image sizes", warning, stops=False) for warning in model.training_warnings(cfg)]
    findings += trait_findings([survey.traits for survey in surveys if survey.traits is not None])
    print(args.json, *filter(None, [recipe]), sep="\n")
    remedy = model.lossless_targets_key and f"{model.lossless_targets_key} True"
    read = {image["id"] for (image, _), survey in zip(images, surveys) if survey.finding is None}
    sides_read = sides_in_training(cfg, [sides for id, sides in report.sides.items() if id in read])
    for line in describe_content(content, surveys, sides_read, cfg, remedy, is_in_target is None):
        print(line)
    sides = sides_in_training(cfg, report.sides.values())
    for key, (value, reason) in model.keys_for_sides(cfg, sides).items():
        if value != config.value(cfg, key) and not args.evaluation and not config.is_explicit(cfg, key):
            exception = ", unless MODEL.WEIGHTS determines it" if key.startswith("MODEL.") else ""
            print(f"A training sets {key} {value} by itself, {reason}{exception}")
    for line in model.describe_objects(cfg, [survey.objects for survey in surveys if survey.objects is not None]):
        print(line)
    for line in describe_findings(findings, args.show):
        print(line)
    stops = any(finding.stops for finding in findings)
    process = "An evaluation" if args.evaluation else "A training"
    print(f"{process} with these data would stop." if stops else f"Nothing here stops {process.lower()}.")
    return int(stops)

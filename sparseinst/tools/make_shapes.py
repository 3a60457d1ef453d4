"""Write the drawn-shapes data set: ``python -m sparseinst.tools.make_shapes --output datasets/shapes``."""

import argparse
import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from sparseinst.data.shapes import CLASS_NAMES, Annotations, draw_ellipses_image, draw_shapes_image, image_generator

SETTINGS_FILE = "shapes_settings.json"
# Raised when the same settings come to give other data, so that an older data set is not taken for a new one.
_GENERATOR_VERSION = 2


def write_coco(
    folder: Path,
    split: str,
    images: Iterable[tuple[np.ndarray, Annotations]],
    class_names: list[str],
    info: dict[str, Any] | None = None,
) -> Path:
    """Write ``SPLIT.json`` (COCO format) and ``SPLIT/000000.jpg`` and so on; returns the path of the json.

    Args:
        folder: created where absent.
        split: name of the json and of the image folder.
        images: pairs of an image (H, W, 3) uint8 RGB and its annotations without ``id`` and ``image_id``.
        class_names: of the category ids 1, 2, ...
        info: the json's ``info``.

    Raises:
        OSError: an image cannot be written.
    """
    (folder / split).mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index, (image, found) in enumerate(images):
        name = f"{index:06d}.jpg"
        if not cv2.imwrite(str(folder / split / name), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95]):
            raise OSError(f"Could not write {folder / split / name}")
        records.append({"id": index + 1, "file_name": name, "height": image.shape[0], "width": image.shape[1]})
        numbered = enumerate(found, len(annotations) + 1)
        annotations += [{"id": number, "image_id": index + 1, **annotation} for number, annotation in numbered]
    categories = [{"id": number, "name": name, "supercategory": "shape"} for number, name in enumerate(class_names, 1)]
    content = {"info": info or {}, "licenses": [], "images": records}
    json_path = folder / f"{split}.json"
    json_path.write_text(json.dumps({**content, "annotations": annotations, "categories": categories}))
    return json_path


def write_shapes_dataset(
    output_dir: str | Path,
    num_images: int,
    seed: int,
    size: int = 128,
    *,
    split: str = "train",
    progress: bool = False,
) -> Path:
    """Write one split as :func:`write_coco` does; it depends on the seed only.

    Args:
        output_dir: created where absent.
        num_images: at least 1; image 0 holds the one crowd annotation.
        seed: not negative.
        size: height and width of the images, pixels, at least MIN_SIZE.
        split: name of the json and of the image folder.
        progress: show a bar.

    Returns:
        Path of the json.

    Raises:
        ValueError: num_images, seed or size is out of range.
    """
    if num_images < 1:
        raise ValueError(f"The number of images of {split!r} must be at least 1, not {num_images}")
    if seed < 0:
        raise ValueError(f"The seed of {split!r} must not be negative, not {seed}")
    numbers = tqdm(range(num_images), desc=f"{split} shapes", unit="image", disable=not progress)
    images = (draw_shapes_image(image_generator(seed, i), size, size, with_crowd=i == 0) for i in numbers)
    info = {"description": "Drawn shapes", "seed": seed, "num_images": num_images, "size": size}
    return write_coco(Path(output_dir), split, images, CLASS_NAMES, info)


def write_ellipses(
    folder: Path, size: tuple[int, int], num_instances: int, num_classes: int, num_images: int = 8, seed: int = 0
) -> tuple[Path, Path]:
    """Write a data set for benchmarks: noise of ``size`` (height, width) with as many ellipses in each image.

    Returns:
        Path of the json, and the image folder.
    """
    rngs = (image_generator(seed, index) for index in range(num_images))
    images = (draw_ellipses_image(rng, size, num_instances, num_classes) for rng in rngs)
    names = [f"class {number}" for number in range(1, num_classes + 1)]
    return write_coco(folder, "ellipses", images, names), folder / "ellipses"


def make_shapes(
    output_dir: Path, num_images: dict[str, int], seeds: dict[str, int], size: int, overwrite: bool = False
) -> bool:
    """Write every split below one folder, all or nothing.

    Args:
        output_dir: holds SPLIT.json and SPLIT/ of every split, and the settings.
        num_images: of each split.
        seeds: of each split.
        size: height and width of the images, pixels.
        overwrite: replace a data set that was made with other settings.

    Returns:
        False where the folder already holds this data set.

    Raises:
        ValueError: a number is out of range, or the folder holds anything else.
    """
    settings = {"generator": _GENERATOR_VERSION, "num_images": num_images, "seeds": seeds, "size": size}
    if output_dir.exists() and not _may_replace(output_dir, settings, overwrite):
        return False
    partial_dir = output_dir.with_name(f".{output_dir.name}.partial")
    shutil.rmtree(partial_dir, ignore_errors=True)
    try:
        for split, count in num_images.items():
            write_shapes_dataset(partial_dir, count, seeds[split], size, split=split, progress=True)
        (partial_dir / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n")
        if output_dir.exists():
            shutil.rmtree(output_dir)
        partial_dir.rename(output_dir)
    finally:
        shutil.rmtree(partial_dir, ignore_errors=True)
    return True


def _may_replace(output_dir: Path, settings: dict, overwrite: bool) -> bool:
    """Return False where the data set is there already; raise ValueError where files of the user would be lost."""
    if not output_dir.is_dir():
        raise ValueError(f"{output_dir} is not a folder; change --output")
    present = {path.name for path in output_dir.iterdir()}
    if not present:
        return True
    if SETTINGS_FILE not in present:
        raise ValueError(f"{output_dir} holds files that are not a data set of drawn shapes; change --output")
    found = json.loads((output_dir / SETTINGS_FILE).read_text())
    if found == settings:
        return False
    if not overwrite:
        raise ValueError(
            f"{output_dir} holds a data set made with {json.dumps(found)}, but the arguments ask for "
            f"{json.dumps(settings)}; change --output or give --overwrite"
        )
    foreign = present - {SETTINGS_FILE} - {name for split in found["num_images"] for name in (split, f"{split}.json")}
    if foreign:
        raise ValueError(f"{output_dir} holds {sorted(foreign)} and the data set; --overwrite would delete them")
    return True


def build_parser() -> argparse.ArgumentParser:
    """Return the command's argument parser."""
    parser = argparse.ArgumentParser(prog="python -m sparseinst.tools.make_shapes", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("datasets/shapes"), help="folder to write")
    parser.add_argument("--train", type=int, default=2000, help="number of training images")
    parser.add_argument("--val", type=int, default=200, help="number of validation images")
    parser.add_argument("--train-seed", type=int, default=0, help="random seed of the training images")
    parser.add_argument("--val-seed", type=int, default=1, help="random seed of the validation images")
    parser.add_argument("--size", type=int, default=128, help="height and width of the images, pixels")
    parser.add_argument("--overwrite", action="store_true", help="replace a data set made with other settings")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command with argv (default ``sys.argv``); returns 0, or 2 after an error in arguments or folder."""
    args = build_parser().parse_args(argv)
    seeds = {"train": args.train_seed, "val": args.val_seed}
    try:
        written = make_shapes(args.output, {"train": args.train, "val": args.val}, seeds, args.size, args.overwrite)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{args.output}: {args.train} + {args.val} images{'' if written else ' (already there)'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Write the drawn-shapes data set: ``python -m sparseinst.tools.make_shapes --output datasets/shapes``."""

import argparse
import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from tqdm import tqdm

from sparseinst.engine.console import prepare_console, with_exit_codes

if TYPE_CHECKING:
    from sparseinst.data.shapes import Annotations

SETTINGS_FILE = "shapes_settings.json"
# Increase it where the same settings give other data, so that an older data set is not taken for a new one.
_GENERATOR_VERSION = 2


def _write_coco(
    folder: Path, split: str, images: "Iterable[tuple[np.ndarray, Annotations]]", class_names: list[str], info: dict
) -> Path:
    """Write ``SPLIT.json`` (COCO format) and ``SPLIT/000000.jpg`` and so on; return the path of the json.

    Raises:
        OSError: an image cannot be written.
    """
    from sparseinst.checkpoint.atomic_write import write_text_atomically

    (folder / split).mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"info": info, "licenses": [], "images": [], "annotations": []}
    for image_id, (image, found) in enumerate(images, 1):
        name = f"{image_id - 1:06d}.jpg"
        if not cv2.imwrite(str(folder / split / name), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95]):
            raise OSError(f"Could not write {folder / split / name}")
        height, width = image.shape[:2]
        content["images"].append({"id": image_id, "file_name": name, "height": height, "width": width})
        numbered = enumerate(found, len(content["annotations"]) + 1)
        content["annotations"] += [{"id": number, "image_id": image_id, **entry} for number, entry in numbered]
    content["categories"] = [{"id": n, "name": name, "supercategory": "shape"} for n, name in enumerate(class_names, 1)]
    json_path = folder / f"{split}.json"
    write_text_atomically(json_path, json.dumps(content))
    return json_path


def write_shapes_dataset(
    output_dir: str | Path, num_images: int, seed: int, size: int = 128, *, split: str = "train", progress: bool = False
) -> Path:
    """Write one split, ``SPLIT.json`` and the images in ``SPLIT``; return the path of the json.

    Args:
        output_dir: created where absent.
        num_images: at least 1; image 0 has the one crowd annotation.
        seed: not negative; it alone determines image n, for any number of images.
        size: height and width of the images, pixels, at least MIN_SIZE.
        split: name of the json and of the image folder.
        progress: show a bar.

    Raises:
        ValueError: num_images, seed or size is out of range.
    """
    from sparseinst.data.shapes import CLASS_NAMES, draw_shapes_image

    if num_images < 1:
        raise ValueError(f"The number of images of {split!r} must be at least 1, not {num_images}")
    if seed < 0:
        raise ValueError(f"The seed of {split!r} must not be negative, not {seed}")
    numbers = tqdm(range(num_images), desc=f"{split} shapes", unit="image", disable=not progress)
    images = (draw_shapes_image(np.random.default_rng((seed, i)), size, size, with_crowd=i == 0) for i in numbers)
    info = {"description": "Drawn shapes", "seed": seed, "num_images": num_images, "size": size}
    return _write_coco(Path(output_dir), split, images, CLASS_NAMES, info)


def write_ellipses(
    folder: Path, size: tuple[int, int], num_instances: int, num_classes: int, num_images: int = 8, seed: int = 0
) -> tuple[Path, Path]:
    """Write a data set for benchmarks: noise of ``size`` (height, width) with num_instances ellipses in each image.

    Returns:
        Path of the json, and the image folder.
    """
    from sparseinst.data.shapes import draw_ellipses_image

    rngs = (np.random.default_rng((seed, index)) for index in range(num_images))
    images = (draw_ellipses_image(rng, size, num_instances, num_classes) for rng in rngs)
    names = [f"class {number}" for number in range(1, num_classes + 1)]
    return _write_coco(folder, "ellipses", images, names, {}), folder / "ellipses"


def make_shapes(output_dir: Path, num_images: dict[str, int], seeds: dict[str, int], size: int) -> bool:
    """Write SPLIT.json and SPLIT/ of each split, and the settings; leave nothing behind after an error.

    Args:
        output_dir: absent, empty, or this data set.
        num_images, seeds: of each split.
        size: height and width of the images, pixels.

    Returns:
        False where the folder already holds this data set.

    Raises:
        ValueError: a number is out of range, or the folder holds something else.
    """
    settings = {"generator": _GENERATOR_VERSION, "num_images": num_images, "seeds": seeds, "size": size}
    if output_dir.exists():
        if not output_dir.is_dir():
            raise ValueError(f"{output_dir} is not a folder; change --output")
        settings_file = output_dir / SETTINGS_FILE
        found = json.loads(settings_file.read_text()) if settings_file.is_file() else None
        if found == settings:
            return False
        if any(output_dir.iterdir()):
            made = f"a data set made with {json.dumps(found)}" if found else "files that are not drawn shapes"
            raise ValueError(
                f"{output_dir} holds {made}, but the arguments ask for {json.dumps(settings)}; change --output, or "
                "remove the folder"
            )
    partial_dir = output_dir.with_name(f".{output_dir.name}.partial")
    shutil.rmtree(partial_dir, ignore_errors=True)
    try:
        # An error must not follow a progress bar in its line.
        partial_dir.mkdir(parents=True)
        for split, count in num_images.items():
            write_shapes_dataset(partial_dir, count, seeds[split], size, split=split, progress=True)
        (partial_dir / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n")
        # Replaces an empty folder.
        partial_dir.rename(output_dir)
    finally:
        shutil.rmtree(partial_dir, ignore_errors=True)
    return True


def build_parser() -> argparse.ArgumentParser:
    """Return the command's argument parser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("datasets/shapes"), help="folder to write")
    parser.add_argument("--train", type=int, default=2000, help="number of training images")
    parser.add_argument("--val", type=int, default=200, help="number of validation images")
    parser.add_argument("--train-seed", type=int, default=0, help="random seed of the training images")
    parser.add_argument("--val-seed", type=int, default=1, help="random seed of the validation images")
    parser.add_argument("--size", type=int, default=128, help="height and width of the images, pixels")
    return parser


@with_exit_codes()
def main(argv: list[str] | None = None) -> int:
    """Run the command with argv (default ``sys.argv``); return 0, or 1 after an error in arguments or folder."""
    args = build_parser().parse_args(argv)
    prepare_console()
    seeds = {"train": args.train_seed, "val": args.val_seed}
    written = make_shapes(args.output, {"train": args.train, "val": args.val}, seeds, args.size)
    print(f"{args.output}: {args.train} + {args.val} images{'' if written else ' (already there)'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Drawn shapes: a small instance segmentation data set whose classes differ by shape alone.

Scenes are composed in shape_scenes.py; here they are painted, annotated and written.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as mask_util

from sparseinst.data.shape_scenes import CLASS_NAMES, ShapeObject, ShapeScene, compose_scene
from sparseinst.data.shape_textures import BACKGROUNDS, TEXTURES

_SUPERSAMPLING = 8
_SUBPIXEL_BITS = 6  # of OpenCV's fixed-point coordinates


def rasterize(outlines: list[np.ndarray], image_size: tuple[int, int]) -> np.ndarray:
    """Share of each pixel that polygons cover together.

    Args:
        outlines: polygons, each (P, 2) x and y in pixels.
        image_size: (height, width).

    Returns:
        (H, W) float32 in [0, 1].
    """
    height, width = image_size
    fine = np.zeros((height * _SUPERSAMPLING, width * _SUPERSAMPLING), np.uint8)
    for outline in outlines:
        # OpenCV puts pixel centres at whole numbers, COCO at halves.
        corners = (outline * _SUPERSAMPLING - 0.5) * 2**_SUBPIXEL_BITS
        cv2.fillPoly(fine, [np.round(corners).astype(np.int32)], 255, shift=_SUBPIXEL_BITS)
    return cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def _mix(pattern: np.ndarray, tones: np.ndarray) -> np.ndarray:
    """Image (H, W, 3) of the pattern (H, W) in the tones (2, 3)."""
    first, second = tones.astype(np.float32)
    return cv2.merge([first[c] + pattern * (second[c] - first[c]) for c in range(3)])


def _paint_object(rng: np.random.Generator, image: np.ndarray, shape: ShapeObject) -> None:
    """Draw one object into the image (H, W, 3) float32, in place."""
    left, top = np.maximum(np.floor(shape.outline.min(axis=0)).astype(int) - 1, 0)
    right, bottom = np.ceil(shape.outline.max(axis=0)).astype(int) + 1
    window = image[top:bottom, left:right]
    size = window.shape[:2]
    coverage = rasterize([shape.outline - (left, top)], size)[..., None]
    window += coverage * (_mix(TEXTURES[shape.texture](rng, size, min(image.shape[:2])), shape.tones) - window)


def paint_scene(rng: np.random.Generator, scene: ShapeScene) -> np.ndarray:
    """Draw a scene: textured background, thin stray lines, the objects with smooth edges, then blur and noise.

    Args:
        rng: the only source of chance, for texture, lines and noise.
        scene: what to draw.

    Returns:
        Image (H, W, 3) uint8, RGB.
    """
    height, width = scene.image_size
    image = _mix(BACKGROUNDS[scene.background](rng, scene.image_size, min(height, width)), scene.background_tones)
    for _ in range(rng.integers(0, 5)):
        ends = rng.uniform((0, 0), (width, height), (2, 2)).astype(int).tolist()
        cv2.line(image, ends[0], ends[1], rng.uniform(0, 255, 3).tolist(), 1)
    for shape in scene.objects:
        _paint_object(rng, image, shape)
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 0.7))
    image += rng.standard_normal(image.shape, dtype=np.float32) * np.float32(rng.uniform(1, 7))
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def annotate_scene(scene: ShapeScene) -> list[dict[str, Any]]:
    """COCO annotations of a scene's visible objects, without ``id`` and ``image_id``.

    Args:
        scene: what is drawn.

    Returns:
        One dict an object, and one for the crowd: category_id (from 1), segmentation (polygons; uncompressed RLE for a
        crowd), area (pixels) and bbox (x, y, width, height) of the rasterised segmentation, iscrowd.
    """
    height, width = scene.image_size
    annotations = []
    crowd = [shape for shape in scene.objects if shape.is_crowd]
    if crowd:
        mask = rasterize([shape.outline for shape in crowd], scene.image_size) > 0.5
        run_lengths = {"counts": _run_lengths(mask), "size": [height, width]}
        encoded = mask_util.frPyObjects(run_lengths, height, width)
        annotations.append(_annotation(crowd[0], run_lengths, encoded))
    for shape in scene.objects:
        if not shape.is_crowd:
            polygons = [polygon.round(2).reshape(-1).tolist() for polygon in shape.visible]
            encoded = mask_util.merge(mask_util.frPyObjects(polygons, height, width))
            annotations.append(_annotation(shape, polygons, encoded))
    return annotations


def _annotation(shape: ShapeObject, segmentation: list | dict, encoded: dict) -> dict[str, Any]:
    return {
        "category_id": shape.class_index + 1,
        "segmentation": segmentation,
        "area": int(mask_util.area(encoded)),
        "bbox": mask_util.toBbox(encoded).tolist(),
        "iscrowd": int(shape.is_crowd),
    }


def _run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed counts of a boolean mask (H, W): runs down the columns, the first one of False."""
    flat = np.concatenate([[False], mask.reshape(-1, order="F")])
    starts = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(np.concatenate([[0], starts, [mask.size]])).tolist()


def draw_shapes_image(
    rng: np.random.Generator, height: int, width: int, *, with_crowd: bool = False
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Draw one image with its annotations.

    Args:
        rng: the only source of chance.
        height, width: of the image, pixels, each at least MIN_SIZE.
        with_crowd: add a crowd annotation.

    Returns:
        Image (H, W, 3) uint8 RGB, and what :func:`annotate_scene` returns.

    Raises:
        ValueError: the image is too small.
    """
    scene = compose_scene(rng, height, width, with_crowd=with_crowd)
    return paint_scene(rng, scene), annotate_scene(scene)


def image_generator(seed: int, index: int) -> np.random.Generator:
    """The random generator of image ``index`` of the data set of a seed, whatever the number of images."""
    return np.random.default_rng((seed, index))


def write_shapes_dataset(
    output_dir: str | Path,
    num_images: int,
    seed: int,
    size: int = 128,
    *,
    split: str = "train",
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Path:
    """Write ``SPLIT.json`` (COCO format) and ``SPLIT/000000.jpg`` and so on below a folder, a function of the seed.

    Image 0 holds the one crowd annotation.

    Args:
        output_dir: made where absent.
        num_images: at least 1.
        seed: not negative.
        size: height and width of the images, pixels, at least MIN_SIZE.
        split: name of the json and of the image folder.
        progress: wraps the loop over images, to show a bar.

    Returns:
        Path of the json.

    Raises:
        ValueError: num_images, seed or size is out of range.
    """
    if num_images < 1:
        raise ValueError(f"The number of images of {split!r} must be at least 1, not {num_images}")
    if seed < 0:
        raise ValueError(f"The seed of {split!r} must not be negative, not {seed}")
    image_dir = Path(output_dir) / split
    image_dir.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in progress(range(num_images)):
        image, drawn = draw_shapes_image(image_generator(seed, index), size, size, with_crowd=index == 0)
        file_name = f"{index:06d}.jpg"
        path = image_dir / file_name
        if not cv2.imwrite(str(path), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95]):
            raise OSError(f"Could not write {path}")
        images.append({"id": index + 1, "file_name": file_name, "height": size, "width": size})
        for annotation in drawn:
            annotations.append({"id": len(annotations) + 1, "image_id": index + 1, **annotation})
    dataset = {
        "info": {"description": "Drawn shapes", "seed": seed, "num_images": num_images, "size": size},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": number, "name": name, "supercategory": "shape"} for number, name in enumerate(CLASS_NAMES, 1)
        ],
    }
    json_path = Path(output_dir) / f"{split}.json"
    json_path.write_text(json.dumps(dataset))
    return json_path

"""A data set of ellipses on noise: as many objects, and of such sizes, as a benchmark asks for."""

import json
import math
from pathlib import Path

import numpy as np
from PIL import Image

# Standard deviation of the logarithm of the areas, and of the ratios of the axes.
_AREA_SPREAD = 1.0
_ASPECT_SPREAD = 0.4
_CORNERS = 32


def write_ellipses(
    folder: Path,
    size: tuple[int, int],
    num_instances: int,
    num_classes: int,
    num_images: int = 8,
    median_area: float = 0.05,
    seed: int = 0,
) -> tuple[Path, Path]:
    """Write a data set of pictures with as many ellipses each, as polygons; the pictures themselves show noise.

    Args:
        folder: that exists.
        size: of the pictures, (height, width).
        num_instances: in each picture.
        num_classes: of the ellipses.
        num_images: pictures.
        median_area: the share of the picture that half of the ellipses are smaller than.
        seed: of everything.

    Returns:
        Its json and its folder of images.
    """
    rng = np.random.default_rng(seed)
    height, width = size
    images, annotations = [], []
    (folder / "ellipses").mkdir()
    for image_id in range(1, num_images + 1):
        name = f"{image_id}.jpg"
        # Blocks of 8 pixels, about as many bytes as a photograph.
        noise = rng.integers(0, 256, (math.ceil(height / 8), math.ceil(width / 8), 3), dtype=np.uint8)
        picture = np.kron(noise, np.ones((8, 8, 1), np.uint8))[:height, :width]
        Image.fromarray(picture).save(folder / "ellipses" / name)
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for _ in range(num_instances):
            x, y, box = _ellipse(rng, height, width, median_area)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(rng.integers(num_classes)) + 1,
                    "segmentation": [np.stack([x, y], 1).round(2).ravel().tolist()],
                    "bbox": box,
                    "area": box[2] * box[3] * math.pi / 4,
                    "iscrowd": 0,
                }
            )
    categories = [{"id": index + 1, "name": f"class {index + 1}"} for index in range(num_classes)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "ellipses.json").write_text(json.dumps(content), encoding="utf-8")
    return folder / "ellipses.json", folder / "ellipses"


def _ellipse(
    rng: np.random.Generator, height: int, width: int, median_area: float
) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Corners' x and y, and the box, of an ellipse whose centre is in the picture."""
    area = height * width * median_area * math.exp(_AREA_SPREAD * rng.standard_normal())
    aspect = math.exp(_ASPECT_SPREAD * rng.standard_normal())
    half_x, half_y = math.sqrt(area / math.pi * aspect), math.sqrt(area / math.pi / aspect)
    centre_x, centre_y = rng.uniform(1, width - 1), rng.uniform(1, height - 1)
    angles = np.linspace(0, 2 * math.pi, _CORNERS, endpoint=False)
    x = np.clip(centre_x + half_x * np.cos(angles), 0, width)
    y = np.clip(centre_y + half_y * np.sin(angles), 0, height)
    box = [x.min(), y.min(), x.max() - x.min(), y.max() - y.min()]
    return x, y, [float(value) for value in box]

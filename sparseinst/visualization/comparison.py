"""Draw predictions next to the ground truth, colored by right and wrong."""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from detectron2.data.catalog import Metadata
from detectron2.structures import Instances

from sparseinst.visualization.instances import captioned_grid, draw_instances
from sparseinst.visualization.paint import Color

# Distinct for color-blind readers too.
RIGHT: Color = (0.0, 0.75, 0.55)
WRONG_CLASS: Color = (1.0, 0.75, 0.0)
WRONG: Color = (0.95, 0.1, 0.25)
LEGEND = "green: right    yellow: found with another class    red: missed object, or prediction without an object"
# Two images, each with ground truth and predictions.
_CELLS_IN_ROW = 4
_CELL_WIDTH = 400
# Heights of a cell; images of other shapes get white borders.
_CELL_HEIGHTS = (200, 480)
# Characters of an image's name that fit above a cell.
_MAX_NAME = 28


class Comparison(NamedTuple):
    """The predictions and objects of one image.

    Attributes:
        image_rgb: (height, width, 3) uint8, RGB.
        objects: ground truth, as `draw_instances` takes it.
        predictions: likewise, with scores.
        object_colors: RIGHT, WRONG_CLASS or WRONG for each object.
        prediction_colors: the same for each prediction.
        name: of the image.
    """

    image_rgb: np.ndarray
    objects: Instances
    predictions: Instances
    object_colors: Sequence[Color]
    prediction_colors: Sequence[Color]
    name: str


def draw_comparisons(comparisons: Sequence[Comparison], metadata: Metadata, title: str) -> np.ndarray:
    """Draw a grid with ground truth and predictions of each image side by side.

    Args:
        comparisons: at least one.
        metadata: holds ``thing_classes``.
        title: written above the legend of the colors.

    Returns:
        The grid, (H, W, 3) uint8, RGB.
    """
    heights = [_CELL_WIDTH * c.image_rgb.shape[0] / c.image_rgb.shape[1] for c in comparisons]
    size = (round(float(np.clip(np.median(heights), *_CELL_HEIGHTS))), _CELL_WIDTH)
    cells = []
    for comparison in comparisons:
        found = sum(color == RIGHT for color in comparison.object_colors)
        wrong = sum(color != RIGHT for color in comparison.prediction_colors)
        truth = draw_instances(comparison.image_rgb, comparison.objects, metadata, comparison.object_colors)
        predicted = draw_instances(comparison.image_rgb, comparison.predictions, metadata, comparison.prediction_colors)
        num_objects, num_predictions = len(comparison.objects), len(comparison.predictions)
        cells += [
            (_fit(truth, size), f"{_ending(comparison.name)}: truth, {found} of {num_objects} right"),
            (_fit(predicted, size), f"prediction: {wrong} of {num_predictions} wrong"),
        ]
    white = (np.full((*size, 3), 255, np.uint8), "")
    cells += [white] * (-len(cells) % _CELLS_IN_ROW)
    rows = [cells[start : start + _CELLS_IN_ROW] for start in range(0, len(cells), _CELLS_IN_ROW)]
    return captioned_grid(rows, f"{title}\n{LEGEND}")


def _ending(name: str) -> str:
    return name if len(name) <= _MAX_NAME else f"…{name[1 - _MAX_NAME :]}"


def _fit(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize an image into a white one of this size, without distortion."""
    scale = min(size[0] / image.shape[0], size[1] / image.shape[1])
    height, width = max(1, round(image.shape[0] * scale)), max(1, round(image.shape[1] * scale))
    cell = np.full((*size, 3), 255, np.uint8)
    y, x = (size[0] - height) // 2, (size[1] - width) // 2
    cell[y : y + height, x : x + width] = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    return cell

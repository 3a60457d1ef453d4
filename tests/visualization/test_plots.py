"""Plots: PNG files of a readable size for any number of classes, also where nothing is known."""

import io

import numpy as np
import pytest
import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import Boxes, Instances
from PIL import Image

from sparseinst.visualization.comparison import RIGHT, WRONG, WRONG_CLASS, Comparison, draw_comparisons
from sparseinst.visualization.plots import draw_confusion_matrix, draw_curves, draw_precision_recall


def opened(png):
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG" and min(image.size) >= 400 and max(image.size) <= 2500
    return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("num_classes", [1, 4, 100])
def test_confusion_matrix(num_classes):
    rng = np.random.default_rng(0)
    matrix = np.diag(rng.integers(1, 50, num_classes + 1))
    matrix[-1, :-1], matrix[:-1, -1], matrix[-1, -1] = 3, 2, 0
    names = [f"a rather long name of the class {index}" for index in range(num_classes)]
    assert (opened(draw_confusion_matrix(matrix, names, 0.4)) < 255).mean() > 0.02


def test_names_that_matplotlib_would_read_as_formulas():
    names = ["$", "a$^{$", "_hidden", "\\frac"]
    opened(draw_confusion_matrix(np.ones((5, 5), int), names, 0.4))
    opened(draw_precision_recall({0.5: np.ones((101, 4))}, names, 0.4, (1.0, 1.0)))


def test_nothing_found_and_nothing_there():
    opened(draw_confusion_matrix(np.zeros((4, 4), int), ["a", "b", "c"], 0.5))
    opened(draw_precision_recall({0.5: np.full((101, 3), np.nan)}, ["a", "b", "c"], 0.5, (0.0, 0.0)))


@pytest.mark.parametrize("num_classes", [1, 80])
def test_precision_and_recall(num_classes):
    precision = np.linspace(1, 0, 101)[:, None].repeat(num_classes, 1)
    names = [f"class {index}" for index in range(num_classes)]
    opened(draw_precision_recall({0.5: precision, 0.75: precision / 2}, names, 0.4, (0.6, 0.7)))


def test_curves():
    metrics = [{"iteration": i, "total_loss": 5 / (i + 1), "loss_a": 1.0, "lr_heads": 1e-3} for i in range(0, 100, 20)]
    without_ap = opened(draw_curves(metrics))
    metrics.append({"iteration": 100, "segm/AP": 50.0, "segm/AP50": float("nan"), "bbox/AP": 40.0})
    assert not np.array_equal(without_ap, opened(draw_curves(metrics, iterations_per_epoch=7.5)))
    with pytest.raises(ValueError, match="metrics have no losses"):
        draw_curves([{"iteration": 3, "lr": 1.0}])


def rectangle(size, with_score):
    instances = Instances(size, pred_boxes=Boxes(torch.tensor([[2.0, 2, 12, 12]])), pred_classes=torch.tensor([0]))
    instances.pred_masks = torch.zeros(1, *size, dtype=torch.bool)
    instances.pred_masks[:, 2:12, 2:12] = True
    if with_score:
        instances.scores = torch.tensor([0.9])
    return instances


@pytest.mark.parametrize("size", [(40, 60), (300, 20), (16, 16)])
def test_comparison_colors_right_and_wrong(size):
    image = np.full((*size, 3), 128, np.uint8)
    metadata = Metadata(name="plots", thing_classes=["thing"])

    def sheet(color):
        comparison = Comparison(image, rectangle(size, False), rectangle(size, True), [color], [color], "x" * 90)
        return draw_comparisons([comparison] * 3, metadata, "title").astype(int)

    right, wrong, other = map(sheet, (RIGHT, WRONG, WRONG_CLASS))
    assert right.shape == wrong.shape == other.shape and right.shape[1] > 1500
    assert (right[..., 1] - right[..., 0] > 80).sum() > 500  # green
    assert (wrong[..., 0] - wrong[..., 1] > 80).sum() > 500  # red
    assert (other[..., 0] - other[..., 2] > 80).sum() > 500  # yellow

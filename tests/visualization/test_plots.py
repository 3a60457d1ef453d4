"""Plots: what they show, and PNG files of a readable size for any number of classes, also where nothing is known."""

import io

import numpy as np
import pytest
import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import Boxes, Instances
from PIL import Image

from sparseinst.visualization.comparison import RIGHT, WRONG, WRONG_CLASS, Comparison, draw_comparisons
from sparseinst.visualization.plots import (
    ap_over_time_figure,
    confusion_figure,
    confusion_summary,
    draw_confusion_matrix,
    draw_curves,
    draw_precision_recall,
    precision_recall_figure,
)

NAMES = ["cat", "dog", "absent", "fox"]
# Rows: objects; columns: predictions; background last. Of 20 cats 12 are right, 5 are dogs, 1 a fox, 2 missed.
MATRIX = np.array(
    [
        [12, 5, 0, 1, 2],
        [3, 6, 0, 0, 1],
        [0, 0, 0, 0, 0],
        [0, 2, 0, 4, 4],
        [1, 7, 0, 0, 0],
    ]
)


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


def test_the_figures_of_a_confusion_matrix():
    assert confusion_summary(MATRIX, NAMES, 0.375, num_shown=3) == (
        "40 objects: 22 right, 11 with another class, 7 missed\n"
        "8 predictions without an object\n"
        "(mask IoU at least 0.5, score at least 0.38: the best F1)\n"
        "Most often confused: cat as dog 5, dog as cat 3, fox as dog 2\n"
        "1 classes that do not occur are not shown"
    )


def test_the_cells_of_a_confusion_matrix():
    axes = confusion_figure(MATRIX, NAMES, 0.375).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["cat", "dog", "fox", "(missed)"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog", "fox", "(no object)"]
    assert axes.get_xlabel() == "predicted class" and axes.get_ylabel() == "class of the object"
    # Column and row of each count, without the class that does not occur.
    counts = {text.get_position(): text.get_text() for text in axes.texts}
    assert counts == {
        (0.5, 0.5): "12", (1.5, 0.5): "5", (2.5, 0.5): "1", (3.5, 0.5): "2",
        (0.5, 1.5): "3", (1.5, 1.5): "6", (3.5, 1.5): "1",
        (1.5, 2.5): "2", (2.5, 2.5): "4", (3.5, 2.5): "4",
        (0.5, 3.5): "1", (1.5, 3.5): "7",
    }  # fmt: skip
    # Shares of the objects; in the last row of the predictions of a class: 1 of 16 cats, 7 of 20 dogs, 0 of 5 foxes.
    expected = [[0.6, 0.25, 0.05, 0.1], [0.3, 0.6, 0, 0.1], [0, 0.2, 0.4, 0.4], [1 / 16, 7 / 20, 0, 0]]
    np.testing.assert_allclose(axes.collections[0].get_array().filled(0), expected)


def test_names_that_matplotlib_would_read_as_formulas():
    names = ["$", "a$^{$", "_hidden", "\\frac"]
    opened(draw_confusion_matrix(np.ones((5, 5), int), names, 0.4))
    opened(draw_precision_recall({0.5: np.ones((101, 4))}, names, 0.4, (1.0, 1.0)))


def test_nothing_found_and_nothing_there():
    opened(draw_confusion_matrix(np.zeros((4, 4), int), ["a", "b", "c"], 0.5))
    opened(draw_precision_recall({0.5: np.full((101, 3), np.nan)}, ["a", "b", "c"], 0.5, (0.0, 0.0)))


def test_the_curves_of_precision_and_recall():
    # Class a: precision 0.8 up to recall 0.5, then 0; class b: 0.4 everywhere; class c is absent.
    of_a = np.where(np.arange(101) <= 50, 0.8, 0.0)
    precision = np.stack([of_a, np.full(101, 0.4), np.full(101, np.nan)], axis=1)
    figure = precision_recall_figure({0.75: precision / 2, 0.5: precision}, ["a", "b", "c"], 0.375, (0.9, 0.2))
    axes = figure.axes[0]
    assert axes.get_xlabel().startswith("recall") and axes.get_ylabel().startswith("precision")
    lines = {line.get_label(): line.get_xydata() for line in axes.lines}
    recall = np.arange(101) / 100
    # Areas: 51 of 101 points at 0.8, and the mean of both classes.
    expected = {
        "AP50 40.4: a": of_a,
        "AP50 40.0: b": np.full(101, 0.4),
        "AP50 40.2: mean of 2 classes, IoU 0.5": of_a / 2 + 0.2,
        "AP75 20.1: mean of 2 classes, IoU 0.75": of_a / 4 + 0.1,
    }
    assert lines.pop("all objects, score 0.38: the best F1 (IoU 0.5)").tolist() == [[0.9, 0.2]]
    assert lines.keys() == expected.keys()
    for label, curve in expected.items():
        np.testing.assert_allclose(lines[label], np.stack([recall, curve], axis=1), err_msg=label)


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


def test_ap_over_time_shows_means_and_minutes_that_do_not_overlap():
    rows = [
        {"data": "a", "recipe": "b", "minutes": minutes, "AP": [minutes, minutes + 2]} for minutes in (3, 30, 31, 37)
    ]
    (axes,) = ap_over_time_figure(rows).axes
    assert axes.get_xticks().tolist() == [3, 30, 37]
    assert axes.lines[0].get_xydata().tolist() == [[3, 4], [30, 31], [31, 32], [37, 38]]

import cv2
import numpy as np
import pytest

from sparseinst.structures.mask_window import MaskWindow
from sparseinst.visualization.paint import (
    Label,
    mask_window,
    paint_box,
    paint_labels,
    paint_mask,
    paint_objects,
)

GREEN = (0.0, 1.0, 0.0)


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def blended(pixels, color, alpha):
    return np.rint(pixels * (1 - alpha) + 255 * alpha * np.array(color))


def disc(height, width, y, x, radius):
    rows, columns = np.mgrid[:height, :width]
    return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2


def grown(mask, pixels):
    return cv2.dilate(mask.astype(np.uint8), np.ones((2 * pixels + 1,) * 2, np.uint8)).astype(bool)


def test_a_mask_is_blended_inside_and_nothing_changes_outside():
    picture = noise(120, 160)
    # A ring that the picture's border cuts.
    mask = disc(120, 160, 50, 20, 40) & ~disc(120, 160, 50, 20, 15)
    painted = picture.copy()
    paint_mask(painted, mask_window(mask), GREEN, 0.45, 1)
    inner = ~grown(~mask, 2)
    # The outline goes along the border too.
    inner[:, :3] = False
    # Up to rounding.
    assert inner.sum() > 1000 and np.abs(painted[inner] - blended(picture[inner], GREEN, 0.45)).max() <= 1
    outside = ~grown(mask, 2)
    assert np.array_equal(painted[outside], picture[outside])
    # Its outline and its hole's are all green.
    for y, x in ((50, 60), (50, 35)):
        assert (np.abs(painted[y, x - 2 : x + 3].astype(int) - (0, 255, 0)).max(1) < 40).any(), (y, x)


@pytest.mark.parametrize(
    "place", [np.s_[:, 7:8], np.s_[9:10, :], np.s_[4:5, 6:7], np.s_[:, 19:], np.s_[14:, :], np.s_[:, :]]
)
def test_thin_masks_are_seen(place):
    mask = np.zeros((15, 20), dtype=bool)
    mask[place] = True
    painted = np.zeros((15, 20, 3), np.uint8)
    paint_mask(painted, mask_window(mask), GREEN, 0.5, 1)
    assert (painted[mask][:, 1] >= 127).all() and (painted[~grown(mask, 2)] == 0).all()


def test_an_empty_mask_leaves_the_picture():
    picture = noise(15, 20)
    painted = picture.copy()
    paint_mask(painted, mask_window(np.zeros((15, 20), dtype=bool)), GREEN, 0.5, 1)
    assert np.array_equal(painted, picture)
    paint_objects(painted, [MaskWindow(np.zeros((0, 0), bool), 0, 0)], [GREEN], captions=[""])


def test_a_box_is_blended_once_and_inside_it_nothing_changes():
    picture = noise(60, 80)
    painted = picture.copy()
    paint_box(painted, (20, 10, 50, 40), GREEN, 0.5, 4)
    frame = np.zeros((60, 80), dtype=bool)
    frame[8:42, 18:52] = True
    frame[12:38, 22:48] = False
    assert np.abs(painted[frame] - blended(picture[frame], GREEN, 0.5)).max() <= 1
    assert np.array_equal(painted[~frame], picture[~frame])


@pytest.mark.parametrize(
    "box", [(0, 0, 80, 60), (-30, -20, 200, 100), (30, 20, 31, 21), (79, 59, 80, 60), (100, 90, 120, 95)]
)
def test_boxes_are_cut_to_the_picture(box):
    picture = noise(60, 80)
    painted = picture.copy()
    paint_box(painted, box, GREEN, 0.5, 5)
    # No pixel is blended twice.
    once = np.abs(painted - blended(picture, GREEN, 0.5)).max(2) <= 1
    assert (once | (painted == picture).all(2)).all()


def label(text, x, y, size=14, **options):
    return Label(text, x, y, size, GREEN, **options)


def label_boxes(size, labels):
    """The dark grounds on a white picture: x0, y0, x1, y1."""
    picture = np.full((*size, 3), 255, np.uint8)
    paint_labels(picture, labels)
    _, _, stats, _ = cv2.connectedComponentsWithStats((picture.min(2) < 250).astype(np.uint8))
    return sorted((x, y, x + width, y + height) for x, y, width, height, area in stats[1:].tolist() if area > 20)


def test_labels_stay_inside_the_picture():
    (inside,) = label_boxes((100, 200), [label("person 97%", 20, 30)])
    assert inside[:2] == (20, 30)
    width, height = inside[2] - 20, inside[3] - 30
    for x, y in ((-5, -5), (195, 30), (20, 95), (300, 300)):
        (moved,) = label_boxes((100, 200), [label("person 97%", x, y)])
        assert moved == (
            min(max(x, 0), 200 - width), min(max(y, 0), 100 - height),
            min(max(x, 0), 200 - width) + width, min(max(y, 0), 100 - height) + height,
        )  # fmt: skip
    (centered,) = label_boxes((100, 200), [label("person 97%", 100, 30, is_centered=True)])
    assert abs(centered[0] + centered[2] - 200) <= 1


def test_labels_do_not_cover_one_another():
    # The three take one place; the lowest has none below it.
    boxes = label_boxes((100, 200), [label("person 97%", 20, 30), label("car", 25, 32), label("dog", 22, 31)])
    # Grounds that touch are seen as one.
    height = label_boxes((100, 200), [label("person 97%", 20, 30)])[0][3] - 30
    assert len(boxes) == 1 and boxes[0][3] - boxes[0][1] == 3 * height
    at_the_end = label_boxes((100, 200), [label("person 97%", 20, 90), label("person 97%", 25, 95)])
    assert at_the_end[0][3] <= 100


def test_a_label_is_light_on_dark():
    picture = np.full((40, 120, 3), 200, np.uint8)
    paint_labels(picture, [label("HHHH", 10, 10)])
    ground, text = picture[11, 11], picture[10:30, 10:60].reshape(-1, 3).max(0)
    assert (ground == 40).all() and text.min() >= 240
    # A tint of the object's colour.
    assert text[1] == 255 and text[0] < 250


@pytest.mark.parametrize("text", ["", " ", "a\nb", "Straße ÄÖ Ǻ", "大型车", "$x^2", "x" * 500, "\t", "\u202eabc", "🚗"])
@pytest.mark.parametrize("size", [(60, 200), (1, 1), (5, 300), (300, 5)])
def test_any_text_on_any_picture(text, size):
    picture = np.full((*size, 3), 255, np.uint8)
    paint_labels(picture, [label(text, 3, 4), label(text, 3, 4, size=30, is_centered=True)])
    assert (picture != 255).any()


def test_accents_are_not_cut():
    picture = np.zeros((60, 60, 3), np.uint8)
    paint_labels(picture, [label("Ǻ", 10, 10, size=30)])
    # No ink in the first row, and some above the height of an A.
    assert picture[10].max() == 0 and picture[12:17].max() > 100


def test_larger_objects_lie_below_and_labels_above_all():
    picture = np.zeros((200, 200, 3), np.uint8)
    square = MaskWindow(np.ones((100, 100), bool), 50, 50)
    boxes = np.array([[50.0, 50, 150, 150]] * 2)
    colors = [(1.0, 0.0, 0.0), (0.0, 0.0, 1.0)]
    paint_objects(picture, [square, square], colors, boxes=boxes, captions=["one", ""], alpha=0.5)
    # Red, then blue over it.
    assert picture[140, 100].tolist() == [64, 0, 128]
    assert (picture[50:70, 50:100].min(2) > 200).any()


def test_without_boxes_a_label_stands_in_the_middle_of_its_mask():
    picture = np.zeros((200, 200, 3), np.uint8)
    # Most of an L's pixels are in its foot.
    pixels = np.zeros((100, 100), bool)
    pixels[:, :10] = pixels[80:] = 1
    paint_objects(picture, [MaskWindow(pixels, 50, 50)], [GREEN], captions=["L"], alpha=0.5)
    rows, columns = (picture.min(2) > 150).nonzero()
    assert rows.min() >= 130 and 70 < columns.mean() < 110

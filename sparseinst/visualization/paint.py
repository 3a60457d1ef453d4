"""Paint objects into images: Detectron2's look, without matplotlib, which takes 32 times as long.

An image is (height, width, 3) uint8, RGB, and is changed in place. Colours are RGB in [0, 1]. An object without
a mask, or whose mask is empty, shows its box and its label.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

Color = tuple[float, float, float]

# Detectron2 gives sizes in points, and matplotlib draws 72 points on 100 pixels.
_PIXELS_PER_POINT = 100 / 72
# The largest labels have the image's mean side over this in points, but at least so many.
_SIDE_PER_POINT, _LEAST_POINTS = 90, 10
# No label is smaller, in pixels.
_LEAST_TEXT = 11
_BOX_ALPHA = 0.5
# A label's background keeps this share of the image, and is so many pixels wider than the text on each side.
_LABEL_TRANSPARENCY = 0.2
_LABEL_PADDING = 2
# A label is white with this share of its object's colour.
_LABEL_TINT = 0.053
# An object below this height in pixels, or this area, has its label outside.
_SMALL_HEIGHT, _SMALL_AREA = 40, 1000
# A label that would cover another one moves below it, at most so many times.
_MAX_LABEL_MOVES = 4


class Window(NamedTuple):
    """The part of an image that a mask lies in.

    Attributes:
        x, y: upper left corner, in pixels.
        pixels: (height, width) uint8, not 0 where the mask is.
    """

    x: int
    y: int
    pixels: np.ndarray


class Label(NamedTuple):
    """A text and its position.

    Attributes:
        text: what is written, in one line.
        x, y: upper left corner of the label in pixels; the middle of its upper edge where it is centered.
        size: height of the font, in pixels.
        color: of the object.
        is_centered: see x.
    """

    text: str
    x: float
    y: float
    size: int
    color: Color
    is_centered: bool = False


def paint_objects(
    image: np.ndarray,
    windows: Iterable[Window],
    colors: Sequence[Color],
    *,
    boxes: np.ndarray | None = None,
    captions: Sequence[str] | None = None,
    alpha: float = 0.5,
    font_scale: float = 1.0,
) -> None:
    """Paint objects in their order, then the labels on top.

    Args:
        image: changed in place.
        windows: the mask of each object; consumed one by one.
        colors: of each object.
        boxes: (n, 4), x0, y0, x1, y1 in pixels. Where None no boxes are drawn, and labels stand in the masks' middle.
        captions: of each object; None: no labels.
        alpha: the colour's share inside the masks, in [0, 1].
        font_scale: enlarges the labels and the frames of the boxes.
    """
    mean_side = (image.shape[0] * image.shape[1]) ** 0.5
    points = max(mean_side // _SIDE_PER_POINT, _LEAST_POINTS) * font_scale
    frame = round(points / 4 * _PIXELS_PER_POINT)
    edge = round(max(points // 15, 1) * _PIXELS_PER_POINT)
    labels = []
    for index, (window, color) in enumerate(zip(windows, colors, strict=True)):
        if boxes is not None:
            paint_box(image, boxes[index], color, _BOX_ALPHA, frame)
        paint_mask(image, window, color, alpha, edge)
        if captions is not None:
            box = _box_of(window) if boxes is None else boxes[index]
            # Larger objects have larger labels.
            share = float(np.clip(((box[3] - box[1]) / mean_side - 0.02) / 0.08 + 1, 1.2, 2)) / 2
            size = max(round(points * share * _PIXELS_PER_POINT), _LEAST_TEXT)
            place = _label_place(box, image.shape[0], None if boxes is not None else window)
            labels.append(Label(captions[index], *place[:2], size, color, place[2]))
    paint_labels(image, labels)


def mask_window(mask: np.ndarray, box: Sequence[float] | None = None) -> Window:
    """Cut a mask to a box that holds it.

    Args:
        mask: (height, width) bool or uint8.
        box: (x, y, width, height), where one is known.
    """
    pixels = mask.view(np.uint8)
    x, y, width, height = cv2.boundingRect(pixels) if box is None else map(int, box)
    return Window(x, y, np.ascontiguousarray(pixels[y : y + height, x : x + width]))


def paint_mask(image: np.ndarray, window: Window, color: Color, alpha: float, edge: int) -> None:
    """Blend a mask's pixels with a colour, and outline it and its holes.

    Args:
        image: changed in place.
        window: the mask.
        color: of fill and outline.
        alpha: the colour's share in the fill, in [0, 1]; the outline has all of it.
        edge: thickness of the outline, in pixels; its middle lies on the mask's outermost pixels.
    """
    if window.pixels.size == 0:
        return
    height, width = window.pixels.shape
    place = image[window.y : window.y + height, window.x : window.x + width]
    cv2.copyTo(_blend(place, color, alpha), window.pixels, place)
    outlines, _ = cv2.findContours(window.pixels, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(image, outlines, -1, _levels(color), edge, cv2.LINE_AA, offset=(window.x, window.y))


def paint_box(image: np.ndarray, box: Sequence[float], color: Color, alpha: float, frame: int) -> None:
    """Blend a box's frame with a colour.

    Args:
        image: changed in place.
        box: (x0, y0, x1, y1), in pixels; the frame's middle lies on it.
        color: of the frame.
        alpha: the colour's share, in [0, 1].
        frame: thickness, in pixels.
    """
    x, y = (
        np.clip([low, low + frame, max(high, low + frame), max(high, low + frame) + frame], 0, size)
        for low, high, size in (
            (round(box[0] - frame / 2), round(box[2] - frame / 2), image.shape[1]),
            (round(box[1] - frame / 2), round(box[3] - frame / 2), image.shape[0]),
        )
    )
    # Upper and lower strip with the corners, left and right one between them.
    for top, bottom, left, right in ((0, 1, 0, 3), (2, 3, 0, 3), (1, 2, 0, 1), (1, 2, 2, 3)):
        place = image[y[top] : y[bottom], x[left] : x[right]]
        if place.size:
            place[:] = _blend(place, color, alpha)


def paint_labels(image: np.ndarray, labels: Sequence[Label]) -> None:
    """Write labels on dark backgrounds inside the image, without overlap where there is room."""
    taken: list[tuple[int, int, int, int]] = []
    for label in labels:
        ink = _ink(label.text, label.size)[: image.shape[0], : image.shape[1]]
        height, width = ink.shape
        x = label.x - width / 2 if label.is_centered else label.x
        x = min(max(round(x), 0), image.shape[1] - width)
        y = _free_y(min(max(round(label.y), 0), image.shape[0] - height), x, ink.shape, taken, image.shape[0])
        taken.append((x, y, x + width, y + height))
        place = image[y : y + height, x : x + width]
        ground = place.astype(np.float32) * _LABEL_TRANSPARENCY
        text_color = np.float32(_levels(label.color)) * _LABEL_TINT + 255 * (1 - _LABEL_TINT)
        place[:] = np.rint(ground + (text_color - ground) * (ink[:, :, None] / np.float32(255)))


def _box_of(window: Window) -> tuple[int, int, int, int]:
    return window.x, window.y, window.x + window.pixels.shape[1], window.y + window.pixels.shape[0]


def _label_place(box: Sequence[float], image_height: int, window: Window | None) -> tuple[float, float, bool]:
    """Return corner x and y, and whether it is centered: in the window's mask where there is one, else in the box."""
    x0, y0, x1, y1 = box
    if (x1 - x0) * (y1 - y0) < _SMALL_AREA or y1 - y0 < _SMALL_HEIGHT:
        return (x1, y0, False) if y1 >= image_height - 5 else (x0, y1, False)
    if window is None:
        return x0, y0, False
    # The median of the mask's pixels.
    rows, columns = (cv2.reduce(window.pixels, axis, cv2.REDUCE_SUM, dtype=cv2.CV_32S).ravel() for axis in (1, 0))
    middle_y, middle_x = (int(np.searchsorted(np.cumsum(sums), sums.sum() / 2)) for sums in (rows, columns))
    return x0 + middle_x, y0 + middle_y, True


def _free_y(y: int, x: int, size: tuple[int, int], taken: list[tuple[int, int, int, int]], image_height: int) -> int:
    """Return the label's y, or a lower one where it covers no other label."""
    free_y = y
    for _ in range(_MAX_LABEL_MOVES):
        below = [
            y1 for x0, y0, x1, y1 in taken if x0 < x + size[1] and x < x1 and y0 < free_y + size[0] and free_y < y1
        ]
        if not below:
            return free_y
        free_y = max(below)
        if free_y + size[0] > image_height:
            break
    return y


def _blend(pixels: np.ndarray, color: Color, alpha: float) -> np.ndarray:
    """Return pixels with a share ``alpha`` of a colour."""
    # A linear map of the channels is OpenCV's fastest function for this.
    scale = (1 - alpha) * np.eye(3, dtype=np.float32)
    return cv2.transform(pixels, np.column_stack([scale, 255 * alpha * np.array(color, dtype=np.float32)]))


def _levels(color: Color) -> tuple[int, int, int]:
    return tuple(round(255 * part) for part in color)


@functools.lru_cache(maxsize=1024)
def _ink(text: str, size: int) -> np.ndarray:
    """Return how much of a label's pixels is text, (height, width) uint8."""
    text = " ".join(text.split())
    font = _font(size)
    left, top, right, bottom = font.getbbox(text, anchor="ls")
    # All labels have one height, unless a letter is unusually high or low.
    above = max(-top, round(0.76 * size)) + _LABEL_PADDING
    below = max(bottom, round(0.24 * size)) + _LABEL_PADDING
    ink = Image.new("L", (round(right - left) + 2 * _LABEL_PADDING, above + below))
    ImageDraw.Draw(ink).text((_LABEL_PADDING - left, above), text, fill=255, font=font, anchor="ls")
    pixels = np.array(ink)
    pixels.setflags(write=False)
    return pixels


@functools.lru_cache(maxsize=16)
def _font(size: int) -> ImageFont.FreeTypeFont:
    # Comes with matplotlib.
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)

"""Paint objects into images with Detectron2's look, 32 times as fast as with matplotlib.

An image is (height, width, 3) uint8, RGB, and is changed in place. Colors are RGB in [0, 1]. An object with an empty
mask shows its box and its label only.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from sparseinst.structures.mask_window import MaskWindow

Color = tuple[float, float, float]

# Detectron2's sizes are in points, and matplotlib draws 72 points on 100 pixels.
_PIXELS_PER_POINT = 100 / 72
# The largest labels have the mean side of the image divided by this in points, and at least the second number.
_SIDE_PER_POINT, _LEAST_POINTS = 90, 10
# Height of the smallest label, in pixels.
_LEAST_TEXT = 11
_BOX_ALPHA = 0.5
# Share of the image in a label's background, and the background's margin around the text in pixels.
_LABEL_TRANSPARENCY = 0.2
_LABEL_PADDING = 2
# Share of the object's color in the white of its label.
_LABEL_TINT = 0.053
# The label of an object below this height in pixels, or this area, is outside of it.
_SMALL_HEIGHT, _SMALL_AREA = 40, 1000
# A label that would cover another one moves below it, at most so many times.
_MAX_LABEL_MOVES = 4


class Label(NamedTuple):
    """A text and its location.

    Attributes:
        text: in one line.
        x, y: upper left corner of the label in pixels; with ``is_centered`` the middle of its upper edge.
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
    windows: Iterable[MaskWindow],
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
        boxes: (n, 4), x0, y0, x1, y1 in pixels. None: no boxes, and labels in the middle of the masks.
        captions: of each object; None: no labels.
        alpha: share of the color inside the masks, in [0, 1].
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
            box = window.box() if boxes is None else boxes[index]
            # Larger objects have larger labels.
            share = float(np.clip(((box[3] - box[1]) / mean_side - 0.02) / 0.08 + 1, 1.2, 2)) / 2
            size = max(round(points * share * _PIXELS_PER_POINT), _LEAST_TEXT)
            x, y, is_centered = _label_location(box, image.shape[0], window if boxes is None else None)
            labels.append(Label(captions[index], x, y, size, color, is_centered))
    paint_labels(image, labels)


def mask_window(mask: np.ndarray, box: Sequence[float] | None = None) -> MaskWindow:
    """Return the window of a mask, empty where the mask is; OpenCV finds it faster than ``MaskWindow.shrink``.

    Args:
        mask: (height, width) bool, or uint8 of 0 and 1.
        box: (x, y, width, height) around the mask, where it is known.
    """
    pixels = mask.view(np.uint8)
    x, y, width, height = cv2.boundingRect(pixels) if box is None else map(int, box)
    return MaskWindow(np.ascontiguousarray(pixels[y : y + height, x : x + width]).view(bool), y, x)


def paint_mask(image: np.ndarray, window: MaskWindow, color: Color, alpha: float, edge: int) -> None:
    """Blend the pixels of a mask with a color, and outline the mask and its holes.

    Args:
        image: changed in place.
        window: the mask.
        color: of fill and outline.
        alpha: share of the color in the fill, in [0, 1]; the outline is opaque.
        edge: thickness of the outline, in pixels; its middle lies on the outermost pixels of the mask.
    """
    if window.mask.size == 0:
        return
    pixels = window.mask.view(np.uint8)
    x0, y0, x1, y1 = window.box()
    part = image[y0:y1, x0:x1]
    cv2.copyTo(_blend(part, color, alpha), pixels, part)
    outlines, _ = cv2.findContours(pixels, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(image, outlines, -1, _levels(color), edge, cv2.LINE_AA, offset=(x0, y0))


def paint_box(image: np.ndarray, box: Sequence[float], color: Color, alpha: float, frame: int) -> None:
    """Blend the frame of a box with a color.

    Args:
        image: changed in place.
        box: (x0, y0, x1, y1), in pixels; the middle of the frame lies on it.
        color: of the frame.
        alpha: share of the color, in [0, 1].
        frame: thickness, in pixels.
    """
    x0, y0, x1, y1 = (round(side - frame / 2) for side in box)
    x1, y1 = max(x1, x0 + frame), max(y1, y0 + frame)
    x = np.clip([x0, x0 + frame, x1, x1 + frame], 0, image.shape[1])
    y = np.clip([y0, y0 + frame, y1, y1 + frame], 0, image.shape[0])
    # The strips do not overlap: upper and lower one with the corners, left and right one between them.
    for top, bottom, left, right in ((0, 1, 0, 3), (2, 3, 0, 3), (1, 2, 0, 1), (1, 2, 2, 3)):
        strip = image[y[top] : y[bottom], x[left] : x[right]]
        if strip.size:
            strip[:] = _blend(strip, color, alpha)


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
        part = image[y : y + height, x : x + width]
        ground = part.astype(np.float32) * _LABEL_TRANSPARENCY
        text_color = np.float32(_levels(label.color)) * _LABEL_TINT + 255 * (1 - _LABEL_TINT)
        part[:] = np.rint(ground + (text_color - ground) * (ink[:, :, None] / np.float32(255)))


def _label_location(box: Sequence[float], image_height: int, window: MaskWindow | None) -> tuple[float, float, bool]:
    """Return x, y and whether the label is centered: in the mask where it is given, else in the box."""
    x0, y0, x1, y1 = box
    if (x1 - x0) * (y1 - y0) < _SMALL_AREA or y1 - y0 < _SMALL_HEIGHT:
        return (x1, y0, False) if y1 >= image_height - 5 else (x0, y1, False)
    if window is None:
        return x0, y0, False
    # The median row and column of the mask's pixels.
    rows, columns = (np.cumsum(np.count_nonzero(window.mask, axis=axis)) for axis in (1, 0))
    middle_y, middle_x = (int(np.searchsorted(sums, sums[-1] / 2)) for sums in (rows, columns))
    return x0 + middle_x, y0 + middle_y, True


def _free_y(y: int, x: int, size: tuple[int, int], taken: list[tuple[int, int, int, int]], image_height: int) -> int:
    """Return the y of a label, or a lower one where it covers no other label."""
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
    """Return pixels with a share ``alpha`` of a color."""
    # cv2.transform is OpenCV's fastest function for a linear map of the channels.
    scale = (1 - alpha) * np.eye(3, dtype=np.float32)
    return cv2.transform(pixels, np.column_stack([scale, 255 * alpha * np.array(color, dtype=np.float32)]))


def _levels(color: Color) -> tuple[int, int, int]:
    return tuple(round(255 * part) for part in color)


@functools.lru_cache(maxsize=1024)
def _ink(text: str, size: int) -> np.ndarray:
    """Return the coverage of a label's pixels by its text, (height, width) uint8."""
    text = " ".join(text.split())
    font = label_font(size)
    left, top, right, bottom = font.getbbox(text, anchor="ls")
    # All labels have the same height, unless a letter is unusually high or low.
    above = max(-top, round(0.76 * size)) + _LABEL_PADDING
    below = max(bottom, round(0.24 * size)) + _LABEL_PADDING
    ink = Image.new("L", (round(right - left) + 2 * _LABEL_PADDING, above + below))
    ImageDraw.Draw(ink).text((_LABEL_PADDING - left, above), text, fill=255, font=font, anchor="ls")
    pixels = np.array(ink)
    pixels.setflags(write=False)
    return pixels


@functools.lru_cache(maxsize=16)
def label_font(size: int) -> ImageFont.FreeTypeFont:
    """Return the font of labels and captions, of a height in pixels; it comes with matplotlib."""
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)

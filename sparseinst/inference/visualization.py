"""Pictures of predictions: the instances, and the activation maps that they come from."""

import colorsys
from collections.abc import Iterator, Sequence

import cv2
import numpy as np
import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import Boxes, Instances
from detectron2.utils.visualizer import Visualizer
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as mask_api
from torch.nn import functional as F

from sparseinst.inference.drawing import Color, Window, mask_window, paint_objects
from sparseinst.structures.rle_masks import RLEMasks

# Who paints objects: we, or Detectron2's visualizers.
DRAWINGS = ("fast", "detectron2")

# A picture is enlarged until its short side has this many pixels, so that names can be read, ...
_MIN_SHORT_SIDE = 480
# ... but not beyond this long side.
_MAX_ENLARGED_SIDE = 1600
# Of more instances than these, boxes and names would hide the picture.
_MAX_BOXES = 40
# Share of the colour inside a mask; what names and boxes are larger by than Detectron2's.
_ALPHA = 0.45
_FONT_SCALE = 1.4
# Long side of one cell of the picture of activation maps, its caption's height, the gap between cells.
_CELL_SIDE = 256
_CAPTION_HEIGHT = 22
_GAP = 6


def draw_instances(
    image_rgb: np.ndarray, instances: Instances, metadata: Metadata, *, drawing: str = "fast"
) -> np.ndarray:
    """Draw masks, boxes, names and scores.

    Args:
        image_rgb: (height, width, 3) uint8, RGB.
        instances: all that is to be drawn, in the picture's size, on the CPU; ``pred_masks`` boolean or RLEMasks.
            Without ``scores`` (ground truth) only the names are written, and of more than 40 instances only the masks
            are drawn.
        metadata: holds ``thing_classes``.
        drawing: "fast", or "detectron2": its Visualizer, which draws alike, in many times the time.

    Returns:
        (height, width, 3) uint8, RGB; a small picture enlarged so that its short side has 480 pixels. The same for the
        same arguments. Without instances the picture itself, enlarged alike.

    Raises:
        ValueError: an unknown drawing.
    """
    check_drawing(drawing)
    height, width = image_rgb.shape[:2]
    scale = max(1.0, min(_MIN_SHORT_SIDE / min(height, width), _MAX_ENLARGED_SIDE / max(height, width)))
    size = (round(height * scale), round(width * scale))
    picture = _resize(image_rgb, size)
    if len(instances) == 0:
        return picture
    boxes = Boxes(instances.pred_boxes.tensor.clone())
    boxes.scale(size[1] / width, size[0] / height)
    with_boxes = len(instances) <= _MAX_BOXES
    areas = boxes.area().numpy() if with_boxes else mask_areas(instances.pred_masks)
    # Largest first.
    order = np.argsort(-areas).tolist()
    captions = [caption(instances, index, metadata) for index in order] if with_boxes else None
    colors = [rank_color(index) for index in order]
    if drawing == "fast":
        paint_objects(
            picture,
            mask_windows(instances.pred_masks, order, size),
            colors,
            boxes=boxes.tensor.numpy()[order] if with_boxes else None,
            captions=captions,
            alpha=_ALPHA,
            font_scale=_FONT_SCALE,
        )
        return picture
    visualizer = Visualizer(picture, metadata, font_size_scale=_FONT_SCALE)
    for position, index in enumerate(order):
        # One by one: it keeps all masks that it is given at once.
        visualizer.overlay_instances(
            boxes=boxes[index] if with_boxes else None,
            masks=[_mask_rle(instances.pred_masks, index, size)],
            labels=[captions[position]] if with_boxes else None,
            assigned_colors=[colors[position]],
            alpha=_ALPHA,
        )
    return visualizer.output.get_image()


def draw_iams(
    image_rgb: np.ndarray,
    instances: Instances,
    metadata: Metadata,
    *,
    max_instances: int = 8,
    normalization: str = "sigmoid",
) -> np.ndarray:
    """Draw what each instance was pooled from: a row with its mask, then its activation maps as heat over the picture.

    Args:
        image_rgb: (height, width, 3) uint8, RGB.
        instances: as the model returns them, with ``pred_iams`` (n, G, h, w): logits that cover the picture.
        metadata: holds ``thing_classes``.
        max_instances: rows, at most; the first instances are drawn.
        normalization: what the model does to its logits, "sigmoid" or "softmax". A map is drawn over its maximum.

    Returns:
        The grid of pictures, uint8, RGB.

    Raises:
        ValueError: the instances have no ``pred_iams``; an unknown normalisation.
    """
    if not instances.has("pred_iams"):
        raise ValueError("The instances have no activation maps: set MODEL.SPARSE_INST.DECODER.OUTPUT_IAM to True")
    if normalization not in ("sigmoid", "softmax"):
        raise ValueError(f'normalization is {normalization!r}; it must be "sigmoid" or "softmax"')
    height, width = image_rgb.shape[:2]
    scale = _CELL_SIDE / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    picture = _resize(image_rgb, size)
    instances = instances[:max_instances]
    if len(instances) == 0:
        return _grid([[(picture, "nothing found")]])

    rows = []
    for index in range(len(instances)):
        mask = _resize_mask(instances.pred_masks, index, size)
        masked = picture.copy()
        masked[mask] = picture[mask] * 0.45 + np.array(rank_color(index)) * 255 * 0.55
        heat_maps = _heat_maps(instances.pred_iams[index], size, normalization)
        rows.append(
            [(masked, caption(instances, index, metadata))]
            + [(_overlay_heat(picture, heat), f"map {group + 1}") for group, heat in enumerate(heat_maps)]
        )
    return _grid(rows)


def draw_beside(pictures: Sequence[tuple[np.ndarray, str]]) -> np.ndarray:
    """Pictures (height, width, 3) uint8 RGB of one size, each with a caption above it, side by side."""
    return _grid([pictures])


def check_drawing(drawing: str) -> None:
    """Raises ValueError unless it is one of DRAWINGS."""
    if drawing not in DRAWINGS:
        raise ValueError(f"drawing is {drawing!r}; there are {', '.join(DRAWINGS)}")


def caption(instances: Instances, index: int, metadata: Metadata) -> str:
    """An instance's name, and its score where it has one."""
    name = metadata.thing_classes[int(instances.pred_classes[index])]
    return f"{name} {float(instances.scores[index]):.0%}" if instances.has("scores") else name


def rank_color(index: int) -> Color:
    """The colour of the index-th object."""
    # Steps of the golden ratio around the circle of hues: neighbours in rank are far apart.
    return colorsys.hsv_to_rgb((0.33 + index * 0.618034) % 1, 0.85, 1.0)


def mask_windows(masks: torch.Tensor | RLEMasks, order: Sequence[int], size: tuple[int, int]) -> Iterator[Window]:
    """The masks of these indices, resized to ``size``, one by one, so that few are decoded at a time."""
    for index in order:
        if isinstance(masks, RLEMasks) and masks.image_size == size:
            yield mask_window(next(iter(masks[index])), mask_api.toBbox(masks.rles[index]))
        else:
            yield mask_window(_resize_mask(masks, index, size))


def mask_areas(masks: torch.Tensor | RLEMasks) -> np.ndarray:
    """Pixels of each mask, (n,)."""
    if isinstance(masks, RLEMasks):
        return masks.areas()
    return np.array([np.count_nonzero(mask) for mask in masks.numpy()], dtype=np.int64)


def _resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if image.shape[:2] == size:
        return image.copy()
    interpolation = cv2.INTER_AREA if size[0] < image.shape[0] else cv2.INTER_CUBIC
    return cv2.resize(image, size[::-1], interpolation=interpolation)


def _resize_mask(masks: torch.Tensor | RLEMasks, index: int, size: tuple[int, int]) -> np.ndarray:
    """One of the masks, (*size) bool."""
    mask = torch.from_numpy(next(iter(masks[index]))) if isinstance(masks, RLEMasks) else masks[index]
    if tuple(mask.shape) != size:
        mask = F.interpolate(mask[None, None].float(), size=size, mode="bilinear")[0, 0] >= 0.5
    return mask.numpy().astype(bool, copy=False)


def _mask_rle(masks: torch.Tensor | RLEMasks, index: int, size: tuple[int, int]) -> dict:
    """One of the masks as the visualizer takes it; of arrays it takes all but those that are 2 pixels wide."""
    if isinstance(masks, RLEMasks) and masks.image_size == size:
        return masks.rles[index]
    return mask_api.encode(np.asfortranarray(_resize_mask(masks, index, size), dtype=np.uint8))


def _heat_maps(iam_logits: torch.Tensor, size: tuple[int, int], normalization: str) -> np.ndarray:
    """Logits (G, h, w) to maps (G, *size) whose maximum is 1."""
    logits = iam_logits.float()
    peaks = logits.amax(dim=(1, 2), keepdim=True)
    # The softmax's denominator cancels when a map is divided by its maximum.
    maps = (logits - peaks).exp() if normalization == "softmax" else logits.sigmoid() / peaks.sigmoid()
    return F.interpolate(maps[None], size=size, mode="bilinear")[0].clamp(0, 1).numpy()


def _overlay_heat(picture: np.ndarray, heat: np.ndarray) -> np.ndarray:
    heat_bgr = cv2.applyColorMap((heat * 255).astype(np.uint8), cv2.COLORMAP_TURBO)
    gray = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)[:, :, None]
    return (0.4 * gray + 0.6 * heat_bgr[:, :, ::-1]).astype(np.uint8)


def _grid(rows: Sequence[Sequence[tuple[np.ndarray, str]]]) -> np.ndarray:
    """Rows of equally many captioned pictures of one size, as one picture."""
    height, width = rows[0][0][0].shape[:2]
    cell_width = max(width, _CELL_SIDE // 2)
    step_y, step_x = height + _CAPTION_HEIGHT + _GAP, cell_width + _GAP
    sheet = Image.new("RGB", (len(rows[0]) * step_x + _GAP, len(rows) * step_y + _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 14)
    for row_index, row in enumerate(rows):
        for column_index, (picture, caption) in enumerate(row):
            x, y = _GAP + column_index * step_x, _GAP + row_index * step_y
            pen.text((x, y), caption, fill="black", font=font)
            sheet.paste(Image.fromarray(picture), (x, y + _CAPTION_HEIGHT))
    return np.asarray(sheet)

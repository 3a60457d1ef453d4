"""Draw instances, and the activation maps that they were pooled from."""

import colorsys
from collections.abc import Iterator, Sequence

import cv2
import numpy as np
import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import BitMasks, Boxes, Instances
from PIL import Image, ImageDraw
from pycocotools import mask as mask_api
from torch import nn
from torch.nn import functional as F

from sparseinst.structures.gt_masks import gt_masks_tensor
from sparseinst.structures.mask_window import MaskWindow
from sparseinst.structures.rle_masks import RLEMasks
from sparseinst.visualization.paint import Color, label_font, mask_window, paint_objects

# A small image is enlarged until its short side has this many pixels, so that names can be read, ...
_MIN_SHORT_SIDE = 480
# ... but not beyond this long side.
_MAX_ENLARGED_SIDE = 1600
# The boxes and names of more instances would hide the image.
_MAX_BOXES = 40
# Share of the color inside a mask; scale of Detectron2's names and boxes.
_ALPHA = 0.45
_FONT_SCALE = 1.4
# Of the grid of activation maps: long side of a cell, height of its caption, gap between cells, in pixels.
_CELL_SIDE = 256
# Most rows of a sheet of activation maps.
_MAX_ROWS = 8
_CAPTION_HEIGHT = 22
_GAP = 6


def draw_instances(
    image_rgb: np.ndarray, instances: Instances, metadata: Metadata, colors: Sequence[Color] | None = None
) -> np.ndarray:
    """Draw masks, boxes, names and scores.

    Args:
        image_rgb: (height, width, 3) uint8, RGB.
        instances: in the image's size, on the CPU; ``pred_masks`` boolean or RLEMasks. Without ``scores`` (ground
            truth) only the names are written. Of more than 40 instances only the masks are drawn.
        metadata: holds ``thing_classes``.
        colors: of each instance; None: colors that differ.

    Returns:
        (height, width, 3) uint8, RGB, a new array; a small image is enlarged so that its short side has 480 pixels.
    """
    height, width = image_rgb.shape[:2]
    scale = max(1.0, min(_MIN_SHORT_SIDE / min(height, width), _MAX_ENLARGED_SIDE / max(height, width)))
    size = (round(height * scale), round(width * scale))
    drawing = _resize(image_rgb, size)
    if len(instances) == 0:
        return drawing
    boxes = Boxes(instances.pred_boxes.tensor.clone())
    boxes.scale(size[1] / width, size[0] / height)
    with_boxes = len(instances) <= _MAX_BOXES
    areas = boxes.area().numpy() if with_boxes else mask_areas(instances.pred_masks)
    # Largest first.
    order = np.argsort(-areas).tolist()
    paint_objects(
        drawing,
        mask_windows(instances.pred_masks, order, size),
        [rank_color(index) if colors is None else colors[index] for index in order],
        boxes=boxes.tensor.numpy()[order] if with_boxes else None,
        captions=[caption(instances, index, metadata) for index in order] if with_boxes else None,
        alpha=_ALPHA,
        font_scale=_FONT_SCALE,
    )
    return drawing


def draw_iams(
    image_rgb: np.ndarray,
    instances: Instances,
    metadata: Metadata,
    *,
    normalization: str = "sigmoid",
) -> np.ndarray:
    """Draw a row for each of the first _MAX_ROWS instances: its mask, then its activation maps as heat over the image.

    Args:
        image_rgb: (height, width, 3) uint8, RGB.
        instances: as the model returns them, with ``pred_iams`` (n, G, h, w): logits that cover the image.
        metadata: holds ``thing_classes``.
        normalization: of the model's logits, see `iam_normalization`. Each map is divided by its maximum.

    Returns:
        The grid, (H, W, 3) uint8, RGB.

    Raises:
        ValueError: the instances have no ``pred_iams``, or the normalization is unknown.
    """
    if not instances.has("pred_iams"):
        raise ValueError(
            "The instances have no activation maps (pred_iams): predict with OutputOptions.with_maps, or set the "
            "model's key OUTPUT_IAM"
        )
    if normalization not in ("sigmoid", "softmax"):
        raise ValueError(f'normalization is {normalization!r}; it must be "sigmoid" or "softmax"')
    height, width = image_rgb.shape[:2]
    scale = _CELL_SIDE / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    image = _resize(image_rgb, size)
    instances = instances[:_MAX_ROWS]
    if len(instances) == 0:
        return captioned_grid([[(image, "nothing found")]])
    rows = []
    for index in range(len(instances)):
        mask = _resize_mask(instances.pred_masks, index, size)
        masked = image.copy()
        masked[mask] = image[mask] * 0.45 + np.array(rank_color(index)) * 255 * 0.55
        maps = heat_maps(instances.pred_iams[index], size, normalization)
        rows.append(
            [(masked, caption(instances, index, metadata))]
            + [(_overlay_heat(image, heat), f"map {group + 1}") for group, heat in enumerate(maps)]
        )
    return captioned_grid(rows)


def heat_maps(iam_logits: torch.Tensor, size: tuple[int, int], normalization: str) -> np.ndarray:
    """Return the activation maps of an instance as they are drawn.

    Args:
        iam_logits: (G, h, w), over the image.
        size: (height, width) of the result.
        normalization: of the model's logits, see `iam_normalization`.

    Returns:
        (G, height, width) float32 in [0, 1]; each map was divided by its maximum.
    """
    logits = iam_logits.float()
    peaks = logits.amax(dim=(1, 2), keepdim=True)
    # Dividing by the maximum cancels the denominator of the softmax.
    maps = (logits - peaks).exp() if normalization == "softmax" else logits.sigmoid() / peaks.sigmoid()
    return F.interpolate(maps[None], size=size, mode="bilinear")[0].clamp(0, 1).numpy()


def iam_normalization(model: nn.Module) -> str:
    """Return how a model normalizes activation maps, "sigmoid" or "softmax"; "sigmoid" where it has none."""
    return next((m.iam_normalization for m in model.modules() if hasattr(m, "iam_normalization")), "sigmoid")


def ground_truth_instances(instances: Instances) -> Instances:
    """Return the ground truth of a training image as `draw_instances` takes it, on the CPU.

    Args:
        instances: with ``gt_classes`` (M,) and ``gt_masks``: PolygonMasks, BitMasks or a tensor (M, h, w); the masks
            may be absent where M is 0.
    """
    instances = instances.to("cpu")
    masks = BitMasks(gt_masks_tensor(instances))
    return Instances(
        instances.image_size,
        pred_boxes=masks.get_bounding_boxes(),
        pred_masks=masks.tensor,
        pred_classes=instances.gt_classes,
    )


def caption(instances: Instances, index: int, metadata: Metadata) -> str:
    """Return the name of an instance, and its score where it has one."""
    name = metadata.thing_classes[int(instances.pred_classes[index])]
    return f"{name} {float(instances.scores[index]):.0%}" if instances.has("scores") else name


def rank_color(index: int) -> Color:
    """Return the color of the index-th object."""
    # Steps of the golden ratio around the circle of hues separate neighbors.
    return colorsys.hsv_to_rgb((0.33 + index * 0.618034) % 1, 0.85, 1.0)


def mask_windows(masks: torch.Tensor | RLEMasks, order: Sequence[int], size: tuple[int, int]) -> Iterator[MaskWindow]:
    """Yield the masks of these indices, resized to ``size``. One mask is decoded at a time."""
    for index in order:
        if isinstance(masks, RLEMasks) and masks.image_size == size:
            yield mask_window(next(iter(masks[index])), mask_api.toBbox(masks.rles[index]))
        else:
            yield mask_window(_resize_mask(masks, index, size))


def mask_areas(masks: torch.Tensor | RLEMasks) -> np.ndarray:
    """Return the number of pixels of each mask, (n,)."""
    if isinstance(masks, RLEMasks):
        return masks.areas()
    return np.array([np.count_nonzero(mask) for mask in masks.numpy()], dtype=np.int64)


def _resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if image.shape[:2] == size:
        return image.copy()
    interpolation = cv2.INTER_AREA if size[0] < image.shape[0] else cv2.INTER_CUBIC
    return cv2.resize(image, size[::-1], interpolation=interpolation)


def _resize_mask(masks: torch.Tensor | RLEMasks, index: int, size: tuple[int, int]) -> np.ndarray:
    """Return one of the masks, (*size) bool."""
    mask = torch.from_numpy(next(iter(masks[index]))) if isinstance(masks, RLEMasks) else masks[index]
    if tuple(mask.shape) != size:
        mask = F.interpolate(mask[None, None].float(), size=size, mode="bilinear")[0, 0] >= 0.5
    return mask.numpy().astype(bool, copy=False)


def _overlay_heat(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    heat_bgr = cv2.applyColorMap((heat * 255).astype(np.uint8), cv2.COLORMAP_TURBO)
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[:, :, None]
    return (0.4 * gray + 0.6 * heat_bgr[:, :, ::-1]).astype(np.uint8)


def captioned_grid(rows: Sequence[Sequence[tuple[np.ndarray, str]]], title: str = "") -> np.ndarray:
    """Draw rows of captioned images as one image, below a title.

    All rows are equally long, and all images have one size.
    """
    height, width = rows[0][0][0].shape[:2]
    cell_width = max(width, _CELL_SIDE // 2)
    step_y, step_x = height + _CAPTION_HEIGHT + _GAP, cell_width + _GAP
    top = _CAPTION_HEIGHT * len(title.splitlines())
    sheet = Image.new("RGB", (len(rows[0]) * step_x + _GAP, top + len(rows) * step_y + _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    font = label_font(14)
    pen.text((_GAP, _GAP), title, fill="black", font=font)
    for row_index, row in enumerate(rows):
        for column_index, (image, text) in enumerate(row):
            x, y = _GAP + column_index * step_x, top + _GAP + row_index * step_y
            pen.text((x, y), text, fill="black", font=font)
            sheet.paste(Image.fromarray(image), (x, y + _CAPTION_HEIGHT))
    return np.asarray(sheet)

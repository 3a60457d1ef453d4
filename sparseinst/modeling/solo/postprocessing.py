"""From the network's outputs to the detections of one image. Letters: sparseinst.structures."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from sparseinst.modeling.solo.heads import GridHead
from sparseinst.ops.dense_detections import chosen, dense_output
from sparseinst.ops.mask_output import output_masks
from sparseinst.ops.masks import areas_and_sums, greedy_nms, mask_intersections, matrix_nms, pairwise_intersections
from sparseinst.structures.detections import Detections

# Float pixels of soft masks that exist at once before NMS.
MAX_PIXELS_AT_ONCE = 2**25


class DetectionOptions(NamedTuple):
    """Thresholds and limits; see the keys of MODEL.SOLO.

    Attributes:
        score_threshold: scores of candidates are above this, in [0, 1].
        mask_threshold: a pixel belongs to the mask where its probability is above this, in (0, 1).
        nms_type: "matrix" or "mask".
        nms_kernel: "gaussian" or "linear".
        nms_sigma: of the gaussian kernel.
        nms_pre: candidates that enter NMS.
        update_threshold: least score after matrix NMS, in [0, 1].
        iou_threshold: of greedy NMS, in (0, 1].
        max_detections: most detections.
    """

    score_threshold: float = 0.1
    mask_threshold: float = 0.5
    nms_type: str = "matrix"
    nms_kernel: str = "gaussian"
    nms_sigma: float = 2.0
    nms_pre: int = 500
    update_threshold: float = 0.05
    iou_threshold: float = 0.5
    max_detections: int = 100


def points_nms(scores: torch.Tensor) -> torch.Tensor:
    """Keep a cell's score where it equals the largest of itself and its neighbors above, left and above left; else 0.

    In no paper; the released models use it. Ties keep both.

    Args:
        scores: (..., K, S, S).
    """
    largest = F.max_pool2d(scores, kernel_size=2, stride=1, padding=1)[..., :-1, :-1]
    return scores * (scores == largest)


def cell_scores(cate_logits: torch.Tensor, num_grids: Sequence[int]) -> torch.Tensor:
    """Return the scores (..., all cells, K), float32, after points NMS.

    Args:
        cate_logits: (..., K, all cells).
        num_grids: S of each level.
    """
    probs = cate_logits.float().sigmoid()
    levels = probs.split([size * size for size in num_grids], dim=-1)
    kept = [points_nms(level.unflatten(-1, (size, size))).flatten(-2) for level, size in zip(levels, num_grids)]
    return torch.cat(kept, dim=-1).transpose(-1, -2)


def candidate_cells(
    cate_logits: torch.Tensor, num_grids: Sequence[int], score_threshold: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return every cell and class whose score is above the threshold after points NMS.

    Args:
        cate_logits: (K, all cells).
        num_grids: S of each level.
        score_threshold: in [0, 1].

    Returns:
        cells (n,) int64, ascending, numbered through all levels; classes (n,) int64; scores (n,) float32.
    """
    scores = cell_scores(cate_logits, num_grids)
    cells, classes = (scores > score_threshold).nonzero(as_tuple=True)
    return cells, classes, scores[cells, classes]


def detect(
    head: GridHead,
    outputs: dict[str, torch.Tensor],
    image: int,
    options: DetectionOptions,
    *,
    padded_size: tuple[int, int],
    image_size: tuple[int, int],
    output_size: tuple[int, int],
    score_threshold: float = 0.0,
    mask_format: str = "bitmask",
    max_mask_gib: float = float("inf"),
) -> Detections:
    """Select candidates, rescore them by their masks, apply NMS and resize (SOLOv2, section 3.3).

    Soft masks are computed in blocks of cells, each cell once for any number of classes, so that the memory does
    not depend on the number of candidates.

    Args:
        head: computes the masks of cells.
        outputs: of the network.
        image: index in the batch.
        options: thresholds and limits.
        padded_size: size of the padded network input.
        image_size: size of the image in it, at the top left.
        output_size: size of the masks that are returned.
        score_threshold: detections with a final score above this are kept.
        mask_format, max_mask_gib: as in `output_masks`.

    Returns:
        Detections, best first, without masks that are empty at the output size. ``prediction_idx`` numbers cells
        through all levels.

    Raises:
        MaskMemoryError: the boolean masks would take more than ``max_mask_gib``.
    """
    cells, classes, scores = candidate_cells(outputs["cate_logits"][image], head.num_grids, options.score_threshold)
    # Positions of the candidates in `used`, the cells of all candidates.
    used, position = cells.unique(return_inverse=True)
    size = _mask_size(head, padded_size)
    block = max(1, MAX_PIXELS_AT_ONCE // max(1, size[0] * size[1]))

    maskness, masks = _score_masks(head, outputs, image, used, size, options.mask_threshold, block)
    is_large = maskness[position] > 0
    cells, classes, position = cells[is_large], classes[is_large], position[is_large]
    scores, order = (scores[is_large] * maskness[position]).sort(descending=True, stable=True)
    scores, order = scores[: options.nms_pre], order[: options.nms_pre]
    cells, classes, position = cells[order], classes[order], position[order]

    kept_cells, position_kept = position.unique(return_inverse=True)
    if masks is None:
        masks = _soft_masks(head, outputs, image, used[kept_cells], size)
    else:
        masks = masks[kept_cells]
    intersections = mask_intersections(masks > options.mask_threshold)[position_kept][:, position_kept]
    if options.nms_type == "matrix":
        scores = matrix_nms(scores, classes, intersections, options.nms_kernel, options.nms_sigma)
        kept = (scores >= options.update_threshold).nonzero().squeeze(1)
    else:
        kept = greedy_nms(classes, intersections, options.iou_threshold)
    scores, order = scores[kept].sort(descending=True, stable=True)
    kept = kept[order]
    if score_threshold > 0:
        scores = scores[scores > score_threshold]
    scores, kept = scores[: options.max_detections], kept[: min(len(scores), options.max_detections)]
    boxes, found_masks, found = output_masks(
        masks[position_kept[kept]], padded_size, image_size, output_size, options.mask_threshold, mask_format,
        max_mask_gib,
    )  # fmt: skip
    scores, kept = scores[found], kept[found]
    return Detections(boxes, scores, classes[kept], found_masks, cells[kept])


def dense_detections(
    head: GridHead,
    outputs: dict[str, torch.Tensor],
    options: DetectionOptions,
    *,
    padded_size: tuple[int, int],
    max_detections: int,
    score_threshold: float = 0.0,
) -> dict[str, torch.Tensor]:
    """Do what `detect` does, for B images whose output has the padded size, with shapes that do not depend on the data.

    The ``nms_pre`` best pairs of a cell and a class are the candidates, before their masks are known. `detect` scores
    the masks of all pairs above the threshold first, so the two differ where there are more than ``nms_pre``.

    Args:
        head, outputs: as in `detect`.
        options: thresholds and limits, with matrix NMS.
        padded_size: size of the masks that are returned.
        max_detections: most detections that are returned, the best of the options' ``max_detections``.
        score_threshold: as in `detect`.

    Returns:
        The dict of `InstanceSegmenter.dense_detections`.
    """
    scores = cell_scores(outputs["cate_logits"], head.num_grids)
    num_classes = scores.shape[2]
    scores, pairs = scores.flatten(1).topk(min(options.nms_pre, scores.shape[1] * num_classes))
    cells, classes = pairs // num_classes, pairs % num_classes
    mask_probs = head.dense_mask_probs(outputs, cells, _mask_size(head, padded_size))
    areas, sums = (each.view_as(scores) for each in areas_and_sums(mask_probs.flatten(0, 1), options.mask_threshold))
    is_candidate = (scores > options.score_threshold) & (areas > _cell_strides(head, cells.device)[cells])
    scores, order = torch.where(is_candidate, scores * sums / areas.clamp(min=1), 0.0).topk(scores.shape[1])
    classes = classes.gather(1, order)
    intersections = chosen(pairwise_intersections(mask_probs > options.mask_threshold), order)
    intersections = chosen(intersections.transpose(1, 2), order)
    decayed = matrix_nms(scores, classes, intersections, options.nms_kernel, options.nms_sigma)
    is_kept = (scores > 0) & (decayed >= options.update_threshold) & (decayed > score_threshold)
    scores, second = torch.where(is_kept, decayed, 0.0).topk(min(options.max_detections, scores.shape[1]))
    masks = chosen(mask_probs, order.gather(1, second))
    classes = classes.gather(1, second)
    return dense_output(scores, classes, masks, padded_size, options.mask_threshold, max_detections)


def _score_masks(
    head: GridHead,
    outputs: dict[str, torch.Tensor],
    image: int,
    cells: torch.Tensor,
    size: tuple[int, int],
    mask_threshold: float,
    block: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the maskness of each cell, 0 where its mask is too small, and the soft masks if one block holds them."""
    maskness, masks = [torch.zeros(0, device=cells.device)], None
    strides = _cell_strides(head, cells.device)
    for part in cells.split(block) if len(cells) else ():
        masks = _soft_masks(head, outputs, image, part, size)
        areas, sums = areas_and_sums(masks, mask_threshold)
        maskness.append(torch.where(areas > strides[part], sums / areas.clamp(min=1), 0.0))
    if masks is None:
        masks = torch.zeros((0, *size), device=cells.device)
    return torch.cat(maskness), masks if len(cells) <= block else None


def _mask_size(head: GridHead, padded_size: tuple[int, int]) -> tuple[int, int]:
    """Return the size of the finest level's masks, in which candidates are compared."""
    return tuple(side // min(head.mask_strides) for side in padded_size)


def _cell_strides(head: GridHead, device: torch.device) -> torch.Tensor:
    """Return the stride of each cell's level, (all cells,) int64."""
    levels = zip(head.level_sizes, head.strides)
    return torch.cat([torch.full((count,), stride, device=device) for count, stride in levels])


def _soft_masks(
    head: GridHead, outputs: dict[str, torch.Tensor], image: int, cells: torch.Tensor, size: tuple[int, int]
) -> torch.Tensor:
    """Return the probabilities (n, *size) of cells that are numbered through all levels, ascending."""
    masks = []
    start = 0
    for level, count in enumerate(head.level_sizes):
        in_level = cells[(cells >= start) & (cells < start + count)] - start
        if len(in_level):
            masks.append(head.mask_probs(outputs, image, level, in_level, size))
        start += count
    return torch.cat(masks) if masks else torch.zeros((0, *size), device=cells.device)

"""Draw predictions on the frames of a video; an object keeps its color from frame to frame."""

import numpy as np
import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import Boxes, Instances, pairwise_iou

from sparseinst.visualization.instances import caption, mask_areas, mask_windows, rank_color
from sparseinst.visualization.paint import paint_objects

# Least IoU between the boxes of one object in two frames.
MIN_IOU = 0.3
# Frames in which an object that was not found keeps its number.
REMEMBERED_FRAMES = 8
_ALPHA = 0.5


class ObjectTracker:
    """Number the objects of a video so that each keeps its number, and thus its color, from frame to frame.

    Objects are matched greedily to earlier objects of the same class: the pair of boxes with the largest IoU first,
    down to MIN_IOU. An unmatched object is new and gets the smallest free number. An object that is not found is
    remembered at its last box for REMEMBERED_FRAMES frames. Motion and appearance are not used, so objects that move
    fast or cross each other can change numbers.
    """

    def __init__(self) -> None:
        self._numbers = np.zeros(0, dtype=np.int64)
        self._classes = np.zeros(0, dtype=np.int64)
        self._boxes = torch.zeros((0, 4))
        self._last_seen = np.zeros(0, dtype=np.int64)
        self._frame = 0

    def update(self, boxes: torch.Tensor, classes: np.ndarray) -> list[int]:
        """Return the numbers of the objects of the next frame.

        Args:
            boxes: (n, 4), x0, y0, x1, y1 in pixels.
            classes: (n,).
        """
        self._frame += 1
        ious = pairwise_iou(Boxes(boxes), Boxes(self._boxes)).numpy()
        ious[classes[:, None] != self._classes[None, :]] = 0
        numbers = np.full(len(boxes), -1, dtype=np.int64)
        # Best pair first; equal pairs in the order of the objects.
        for pair in np.argsort(-ious, axis=None, kind="stable").tolist():
            index, known = divmod(pair, len(self._boxes))
            if ious[index, known] < MIN_IOU:
                break
            if numbers[index] < 0 and self._last_seen[known] < self._frame:
                numbers[index] = self._numbers[known]
                self._last_seen[known] = self._frame
        self._remember(boxes, classes, numbers)
        return numbers.tolist()

    def _remember(self, boxes: torch.Tensor, classes: np.ndarray, numbers: np.ndarray) -> None:
        """Number the new objects in place, and remember all objects of this frame and those that it misses."""
        missed = (self._last_seen < self._frame) & (self._last_seen >= self._frame - REMEMBERED_FRAMES)
        used = {*numbers.tolist(), *self._numbers[missed].tolist()}
        free = 0
        for index in np.flatnonzero(numbers < 0):
            while free in used:
                free += 1
            numbers[index] = free
            used.add(free)
        self._numbers = np.concatenate([numbers, self._numbers[missed]])
        self._classes = np.concatenate([classes, self._classes[missed]])
        self._boxes = torch.cat([boxes, self._boxes[torch.from_numpy(missed)]])
        self._last_seen = np.concatenate([np.full(len(boxes), self._frame), self._last_seen[missed]])


class VideoDrawer:
    """Draw masks, names and scores on the frames of one video, in their order.

    Args:
        metadata: holds ``thing_classes``.
    """

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata
        self._tracker = ObjectTracker()

    def draw(self, frame: np.ndarray, instances: Instances) -> np.ndarray:
        """Return the next frame with its instances drawn.

        Args:
            frame: (height, width, 3) uint8, RGB; returned itself where it has no instances.
            instances: on the CPU, in the frame's size; ``pred_masks`` boolean or RLEMasks.
        """
        numbers = self._tracker.update(instances.pred_boxes.tensor, instances.pred_classes.numpy())
        if len(instances) == 0:
            return frame
        # Largest first.
        order = np.argsort(-mask_areas(instances.pred_masks), kind="stable").tolist()
        drawn = frame.copy()
        paint_objects(
            drawn,
            mask_windows(instances.pred_masks, order, frame.shape[:2]),
            [rank_color(numbers[index]) for index in order],
            captions=[caption(instances, index, self._metadata) for index in order],
            alpha=_ALPHA,
        )
        return drawn

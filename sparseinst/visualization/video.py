"""Draw predictions on the frames of a video, an object in one colour from frame to frame."""

from collections.abc import Iterable, Iterator

import numpy as np
from detectron2.data.catalog import Metadata
from detectron2.structures import Instances

from sparseinst.visualization.instances import caption, mask_areas, mask_windows, rank_color
from sparseinst.visualization.paint import paint_objects

# Least IoU of the boxes of an object in two frames.
MIN_IOU = 0.3
# Frames in which an object that was not found keeps its number.
REMEMBERED_FRAMES = 8
_ALPHA = 0.5


class ObjectTracker:
    """Numbers the objects of a video so that one keeps its number from frame to frame, for its colour.

    Of all pairs of an object of the frame and one of an earlier frame, of one class, whose boxes overlap by an IoU of
    at least MIN_IOU, the pair with the largest IoU is taken, then the largest among those that are left, and so on
    (greedy). An object without a partner is new, and gets the least free number. An object that is not found is
    remembered at its last box for REMEMBERED_FRAMES frames. Motion and appearance are not used: objects that are fast,
    or change places, can change their numbers.
    """

    def __init__(self) -> None:
        self._numbers = np.zeros(0, dtype=np.int64)
        self._classes = np.zeros(0, dtype=np.int64)
        self._boxes = np.zeros((0, 4), dtype=np.float32)
        self._last_seen = np.zeros(0, dtype=np.int64)
        self._frame = 0

    def update(self, boxes: np.ndarray, classes: np.ndarray) -> list[int]:
        """Return the numbers of one frame's objects.

        Args:
            boxes: (n, 4), x0, y0, x1, y1 in pixels.
            classes: (n,).
        """
        self._frame += 1
        ious = _box_ious(boxes, self._boxes)
        ious[classes[:, None] != self._classes[None, :]] = 0
        numbers = np.full(len(boxes), -1, dtype=np.int64)
        # Best pair first; equal ones in the order of the objects.
        for pair in np.argsort(-ious, axis=None, kind="stable").tolist():
            index, known = divmod(pair, len(self._boxes))
            if ious[index, known] < MIN_IOU:
                break
            if numbers[index] < 0 and self._last_seen[known] < self._frame:
                numbers[index] = self._numbers[known]
                self._last_seen[known] = self._frame
        self._remember(boxes, classes, numbers)
        return numbers.tolist()

    def _remember(self, boxes: np.ndarray, classes: np.ndarray, numbers: np.ndarray) -> None:
        """Give the new objects their numbers, and keep the frame's objects and those that were not found."""
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
        self._boxes = np.concatenate([boxes, self._boxes[missed]])
        self._last_seen = np.concatenate([np.full(len(boxes), self._frame), self._last_seen[missed]])


class VideoDrawer:
    """Draws masks, names and scores on the frames of one video, in their order.

    Args:
        metadata: holds ``thing_classes``.
    """

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata
        self._tracker = ObjectTracker()

    def draw(self, frame: np.ndarray, instances: Instances) -> np.ndarray:
        """Return the next frame with its instances drawn.

        Args:
            frame: (height, width, 3) uint8, RGB; where it has no instances it is returned itself.
            instances: on the CPU, in the frame's size; ``pred_masks`` boolean or RLEMasks.
        """
        numbers = self._tracker.update(instances.pred_boxes.tensor.numpy(), instances.pred_classes.numpy())
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


def draw_video(frames: Iterable[tuple[np.ndarray, Instances]], metadata: Metadata) -> Iterator[np.ndarray]:
    """Draw masks, names and scores on the frames of one video, an object in one colour from frame to frame.

    Args:
        frames: each frame, (height, width, 3) uint8 in RGB, with its instances on the CPU.
        metadata: holds ``thing_classes``.

    Yields:
        The drawn frames, of the same size.
    """
    drawer = VideoDrawer(metadata)
    for frame, instances in frames:
        yield drawer.draw(frame, instances)


def _box_ious(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the IoU (n, m) of boxes (n, 4) and (m, 4)."""
    corners = np.maximum(boxes[:, None, :2], others[None, :, :2]), np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    intersections = np.clip(corners[1] - corners[0], 0, None).prod(2)
    areas, other_areas = ((each[:, 2:] - each[:, :2]).prod(1) for each in (boxes, others))
    return intersections / np.maximum(areas[:, None] + other_areas[None, :] - intersections, 1e-6)

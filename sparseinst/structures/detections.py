"""Hold the predictions of one image. Letters: sparseinst.structures."""

from typing import NamedTuple

import torch


class Detections(NamedTuple):
    """Predictions of one image, best first; n is at most N.

    Attributes:
        boxes: (n, 4) float32, (x0, y0, x1, y1) in pixels of the output; x1 and y1 are exclusive. Tight around the mask,
            or predicted and clipped to the image.
        scores: (n,) float32 in [0, 1], descending.
        classes: (n,) int64 in [0, K).
        masks: (n, height, width) bool at the output size, or a list of n compressed COCO RLEs; none is empty.
        prediction_idx: (n,) int64, the index of each detection among the N predictions.
    """

    boxes: torch.Tensor
    scores: torch.Tensor
    classes: torch.Tensor
    masks: torch.Tensor | list[dict]
    prediction_idx: torch.Tensor

"""Assemble masks from prototypes and coefficients. Letters: sparseinst.structures; k prototypes."""

import torch


def mask_logits(prototypes: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """Return the linear combinations of the prototypes (YOLACT, equation 1).

    Args:
        prototypes: (..., k, Hp, Wp).
        coefficients: (..., n, k).

    Returns:
        (..., n, Hp, Wp).
    """
    return (coefficients @ prototypes.flatten(-2)).unflatten(-1, prototypes.shape[-2:])


def crop_masks(boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return the cells of each box, with a margin of one cell.

    Column ``i`` is inside where x0 * Wp - 1 <= i < x1 * Wp + 1; the same holds for rows.

    Args:
        boxes: (n, 4) x0, y0, x1, y1 in fractions of the image; either x may be the smaller one, and either y.
        size: (Hp, Wp).

    Returns:
        (n, Hp, Wp) bool.
    """
    rows, columns = (_inside(boxes[:, axis::2], count) for axis, count in ((1, size[0]), (0, size[1])))
    return rows[:, :, None] & columns[:, None]


def _inside(sides: torch.Tensor, count: int) -> torch.Tensor:
    low, high = sides.amin(1, keepdim=True), sides.amax(1, keepdim=True)
    cells = torch.arange(count, device=sides.device)
    return (cells >= low * count - 1) & (cells < high * count + 1)

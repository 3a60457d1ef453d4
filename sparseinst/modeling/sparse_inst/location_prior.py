"""Places for instances: activation maps and masks that are tied to one (options; not in the paper).

Instances stand on a grid over the picture, about as many rows as columns, and distances are in its cells. Letters: see
structures.py.
"""

import math

import torch

from sparseinst.ops.precision import no_autocast


def grid_of_places(num_masks: int) -> tuple[int, int]:
    """Rows and columns of the grid that instances stand on: about as many of each, with a cell for every instance."""
    rows = max(1, round(math.sqrt(num_masks)))
    return rows, math.ceil(num_masks / rows)


def cell_coordinates(
    num_masks: int, height: int, width: int, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a map's pixels lie on the grid of places, in its cells.

    Args:
        num_masks: N.
        height, width: of the maps.

    Returns:
        y (height,) and x (width,) of the pixels' centres, float32.
    """
    rows, columns = grid_of_places(num_masks)
    y = (torch.arange(height, device=device) + 0.5) * rows / height
    x = (torch.arange(width, device=device) + 0.5) * columns / width
    return y, x


def location_prior(num_masks: int, height: int, width: int, device: torch.device | None = None) -> torch.Tensor:
    """Logits that fall with the squared distance from each instance's place on a grid over the picture.

    Not in the paper.

    Args:
        num_masks: N.
        height, width: of the maps.

    Returns:
        (N, height, width) float32, not positive: minus the squared distance, in cells of the grid.
    """
    _, columns = grid_of_places(num_masks)
    index = torch.arange(num_masks, device=device)
    place_y, place_x = index // columns + 0.5, index % columns + 0.5
    y, x = cell_coordinates(num_masks, height, width, device)
    distance_y, distance_x = y - place_y[:, None], x - place_x[:, None]
    return -(distance_y.square()[:, :, None] + distance_x.square()[:, None, :])


def window_logits(windows: torch.Tensor, iam_weights: torch.Tensor) -> torch.Tensor:
    """Mask logits that fall with the squared distance from the place that an instance's activation maps lie at.

    Not in the paper. The place is the centre of mass of the instance's maps; distances are in cells of the grid of
    :func:`location_prior`.

    Args:
        windows: (B, N, 2), sharpness and bias of each instance: the logits are bias - sharpness * distance ** 2.
        iam_weights: (B, G * N, H, W) float32, group-major, each map summing to 1.

    Returns:
        (B, N, H, W) float32.
    """
    with no_autocast(windows.device):
        num_masks = windows.shape[1]
        height, width = iam_weights.shape[-2:]
        y, x = cell_coordinates(num_masks, height, width, windows.device)
        maps = iam_weights.unflatten(1, (-1, num_masks)).mean(1)
        center_y, center_x = maps.sum(3) @ y, maps.sum(2) @ x
        sharpness, bias = windows.float()[..., None].unbind(2)
        fall_y = sharpness * (y - center_y[..., None]).square()
        fall_x = sharpness * (x - center_x[..., None]).square()
        return (bias - fall_y)[..., None] - fall_x[..., None, :]

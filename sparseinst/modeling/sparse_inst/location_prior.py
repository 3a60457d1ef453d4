"""Options that tie activation maps and masks to a location (not in the paper).

Instances stand on a grid over the image with about as many rows as columns; distances are in cells of that grid.
Letters: sparseinst.structures.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from sparseinst.ops.coordinates import relative_centers
from sparseinst.ops.precision import no_autocast


def location_grid(num_masks: int) -> tuple[int, int]:
    """Return rows and columns of a nearly square grid with a cell for every instance."""
    rows = max(1, round(math.sqrt(num_masks)))
    return rows, math.ceil(num_masks / rows)


def cell_coordinates(
    num_masks: int, height: int, width: int, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y (height,) and x (width,) of a map's pixel centers in cells of the grid, float32.

    Args:
        num_masks: N.
        height, width: of the map.
    """
    rows, columns = location_grid(num_masks)
    return relative_centers(height, device) * rows, relative_centers(width, device) * columns


def location_prior(num_masks: int, height: int, width: int, device: torch.device | None = None) -> torch.Tensor:
    """Return logits that fall with the squared distance from each instance's cell.

    Args:
        num_masks: N.
        height, width: of the maps.

    Returns:
        (N, height, width) float32, not positive: minus the squared distance in cells.
    """
    _, columns = location_grid(num_masks)
    index = torch.arange(num_masks, device=device)
    cell_y, cell_x = index // columns + 0.5, index % columns + 0.5
    y, x = cell_coordinates(num_masks, height, width, device)
    distance_y, distance_x = y - cell_y[:, None], x - cell_x[:, None]
    return -(distance_y.square()[:, :, None] + distance_x.square()[:, None, :])


class WindowHead(nn.Linear):
    """Predict the windows of `window_logits` from pooled vectors.

    Args:
        vector_dim: C.
        sharpness: initial one, above 0.
    """

    def __init__(self, vector_dim: int, sharpness: float) -> None:
        super().__init__(vector_dim, 2)
        nn.init.normal_(self.weight, std=0.01)
        # The inverse of softplus.
        self.bias.data = torch.tensor([math.log(math.expm1(sharpness)), 0.0])

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return the windows (B, N, 2) of vectors (B, N, C): sharpness and bias."""
        sharpness, bias = super().forward(vectors).unbind(2)
        return torch.stack([F.softplus(sharpness), bias], dim=2)


def window_logits(windows: torch.Tensor, iam_weights: torch.Tensor) -> torch.Tensor:
    """Return mask logits that fall with the squared distance from the center of mass of an instance's maps.

    Args:
        windows: (B, N, 2), sharpness and bias of each instance: logits are bias - sharpness * distance ** 2, with the
            distance in cells.
        iam_weights: (B, G * N, H, W) float32, group-major, each map summing to 1.

    Returns:
        (B, N, H, W) float32.
    """
    with no_autocast(windows.device):
        num_masks = windows.shape[1]
        y, x = cell_coordinates(num_masks, *iam_weights.shape[-2:], windows.device)
        maps = iam_weights.unflatten(1, (-1, num_masks)).mean(1)
        center_y, center_x = maps.sum(3) @ y, maps.sum(2) @ x
        sharpness, bias = windows.float()[..., None].unbind(2)
        fall_y = sharpness * (y - center_y[..., None]).square()
        fall_x = sharpness * (x - center_x[..., None]).square()
        return (bias - fall_y)[..., None] - fall_x[..., None, :]

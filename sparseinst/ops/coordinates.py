"""Coordinates of pixels. Sizes enter as tensors, so that an exported graph does not fix the example's size."""

import torch


def linear_coordinates(size: int, device: torch.device | None = None) -> torch.Tensor:
    """Return (size,) float32 coordinates from -1 at the first pixel to +1 at the last; a single pixel is at -1."""
    steps = torch.arange(size, dtype=torch.float32, device=device)
    return 2 * steps / steps[-1].clamp(min=1) - 1


def relative_centers(size: int, device: torch.device | None = None) -> torch.Tensor:
    """Return (size,) float32 centers of the pixels as fractions of the side, in (0, 1)."""
    steps = torch.arange(size, dtype=torch.float32, device=device)
    return (steps + 0.5) / (steps[-1] + 1)


def coordinate_channels(features: torch.Tensor) -> torch.Tensor:
    """Return the coordinates of the pixels of feature maps (B, C, H, W): (B, 2, H, W), x then y, in [-1, 1]."""
    batch, _, height, width = features.shape
    x = linear_coordinates(width, features.device).to(features.dtype)
    y = linear_coordinates(height, features.device).to(features.dtype)
    return torch.cat([x.expand(batch, 1, height, width), y[:, None].expand(batch, 1, height, width)], dim=1)


def append_coordinates(features: torch.Tensor) -> torch.Tensor:
    """Concatenate two coordinate channels, x then y, and the features.

    Args:
        features: (B, C, H, W).

    Returns:
        (B, 2 + C, H, W).
    """
    return torch.cat([coordinate_channels(features), features], dim=1)

"""Drawings of instances on images and videos."""

from sparseinst.visualization.instances import (
    captioned_grid,
    draw_iams,
    draw_instances,
    ground_truth_instances,
    heat_maps,
    iam_normalization,
)
from sparseinst.visualization.video import VideoDrawer

__all__ = [
    "VideoDrawer",
    "captioned_grid",
    "draw_iams",
    "draw_instances",
    "ground_truth_instances",
    "heat_maps",
    "iam_normalization",
]

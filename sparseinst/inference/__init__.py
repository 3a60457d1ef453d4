"""Predict instances on images and videos, and draw them."""

from sparseinst.data.coco_results import to_coco_results
from sparseinst.data.images import ImageReadError, read_image
from sparseinst.inference.predictor import Predictor
from sparseinst.inference.video import VideoReader, VideoWriter
from sparseinst.visualization import draw_iams, draw_instances

__all__ = [
    "ImageReadError",
    "Predictor",
    "VideoReader",
    "VideoWriter",
    "draw_iams",
    "draw_instances",
    "read_image",
    "to_coco_results",
]

"""Check which objects of a data set SparseInst's targets lose."""

from collections.abc import Callable
from functools import partial

import torch
from detectron2.config import CfgNode
from torch.nn import functional as F

from sparseinst.modeling.auxiliary import build_backbone
from sparseinst.modeling.sparse_inst.encoder import build_sparse_inst_encoder
from sparseinst.structures.mask_window import MaskWindow

# Images are padded to a multiple of this, so cells of the mask grid begin there.
_BLOCK = 32


def target_check(cfg: CfgNode) -> Callable[[MaskWindow], bool] | None:
    """Return a function from an object at the training size to whether the targets have a pixel of it.

    Return None where they keep every object (MODEL.SPARSE_INST.ANTIALIASED_TARGETS).

    Raises:
        ValueError: the backbone or the encoder cannot be built with the config.
    """
    sparse_inst = cfg.MODEL.SPARSE_INST
    if sparse_inst.ANTIALIASED_TARGETS:
        return None
    encoder = build_sparse_inst_encoder(cfg, build_backbone(cfg).output_shape())
    return partial(is_on_grid, pixels_per_cell=encoder.output_shape().stride / sparse_inst.DECODER.SCALE_FACTOR)


def is_on_grid(window: MaskWindow, pixels_per_cell: float) -> bool:
    """Return whether an object survives the bilinear reduction of its mask to the mask grid.

    Args:
        window: the object's mask at the training size.
        pixels_per_cell: side of a cell of the mask grid, pixels.
    """
    left, top, right, bottom = window.box()
    top, bottom = top % _BLOCK, bottom - top // _BLOCK * _BLOCK
    left, right = left % _BLOCK, right - left // _BLOCK * _BLOCK
    height, width = (-(-end // _BLOCK) * _BLOCK for end in (bottom, right))
    blocks = torch.zeros(1, 1, height, width)
    blocks[0, 0, top:bottom, left:right] = torch.from_numpy(window.mask)
    cells = (round(height / pixels_per_cell), round(width / pixels_per_cell))
    return bool(F.interpolate(blocks, size=cells, mode="bilinear", align_corners=False).any())

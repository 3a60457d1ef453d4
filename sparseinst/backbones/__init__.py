"""Backbones beside Detectron2's own; importing this package registers their builders with Detectron2."""

from sparseinst.backbones.timm_backbone import TimmBackbone, build_timm_backbone

__all__ = ["TimmBackbone", "build_timm_backbone"]

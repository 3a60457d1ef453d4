"""The IAM decoder: instance activation maps (IAMs), the vectors they pool, and the masks.

Letters: sparseinst.structures.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.utils.registry import Registry
from fvcore.nn.weight_init import c2_msra_fill, c2_xavier_fill
from torch import nn
from torch.nn import functional as F

from sparseinst.config import registered
from sparseinst.modeling.sparse_inst.fused import FusedDecoder
from sparseinst.ops.coordinates import append_coordinates
from sparseinst.ops.precision import no_autocast

SPARSE_INST_DECODER_REGISTRY = Registry("SPARSE_INST_DECODER")
SPARSE_INST_DECODER_REGISTRY.__doc__ = """
Decoders: modules called with the encoder's map (B, C, H, W); return the dict of `SparseInst.network`. Built as
``Name(cfg, input_shape)`` with the encoder's ShapeSpec. They have ``scale_factor``, mask grid over decoder grid, and
``num_masks``, N. With DECODER.MASK.DETAIL_FEATURE a decoder whose class has ``takes_detail`` True is built with the
feature's ShapeSpec as third argument, and called with the feature as ``detail``. Decoders whose own numbers decide
the order of the instances have ``ranks_instances`` True.
"""

# Initial probability of each class and of each cell of an activation map.
PRIOR_PROB = 0.01
IAM_SUM_FLOOR = 1e-6


def normalize_iams(iam_logits: torch.Tensor, normalization: str = "sigmoid") -> torch.Tensor:
    """Normalize activation maps to a sum of 1 (paper, section 3.2), in float32 under autocast too.

    Args:
        iam_logits: (B, R, H, W), R maps.
        normalization: "sigmoid": sigmoid, divided by its sum (at least 1e-6); "softmax" over H * W.

    Returns:
        (B, R, H, W) float32 in [0, 1].
    """
    with no_autocast(iam_logits.device):
        weights = iam_logits.float().flatten(2)
        if normalization == "softmax":
            weights = weights.softmax(-1)
        else:
            weights = weights.sigmoid()
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=IAM_SUM_FLOOR)
        return weights.unflatten(2, iam_logits.shape[-2:])


def pool_instances(iam_weights: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Sum the features, weighted by each activation map (paper, equation 1).

    Runs in float32 under autocast too, because weights of a large map leave the range of float16.

    Args:
        iam_weights: (B, R, H, W) float32, each map summing to 1.
        features: (B, C, H, W).

    Returns:
        (B, R, C) float32.
    """
    with no_autocast(features.device):
        return torch.bmm(iam_weights.flatten(2), features.float().flatten(2).transpose(1, 2))


class InstanceBranchOutput(NamedTuple):
    """Predictions of the instance branch.

    Attributes:
        class_logits: (B, N, K).
        mask_kernels: (B, N, D).
        objectness_logits: (B, N, 1).
        iam_logits: (B, G * N, H, W), group-major.
    """

    class_logits: torch.Tensor
    mask_kernels: torch.Tensor
    objectness_logits: torch.Tensor
    iam_logits: torch.Tensor


class InstanceBranch(nn.Module):
    """Predict activation maps, pool a vector with each, and predict class, mask kernel and objectness from it.

    Args:
        in_channels: channels of the encoder's map, without coordinates.
        dim: channels of the convolutions.
        num_convs: 3x3 convolutions before the maps.
        num_masks: instances, N.
        num_classes: K.
        kernel_dim: D.
        num_groups: maps per instance, G; also the groups of ``iam_conv``.
        iam_normalization: "sigmoid" or "softmax", see `normalize_iams`.
        with_fc: put a linear layer and ReLU between the pooled vectors and the heads.
        norm: norm of the 3x3 convolutions, "" for none as published.

    Raises:
        ValueError: ``dim`` is not a multiple of ``num_groups``; an unknown normalization.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        dim: int = 256,
        num_convs: int = 4,
        num_masks: int = 100,
        num_classes: int = 80,
        kernel_dim: int = 128,
        num_groups: int = 1,
        iam_normalization: str = "sigmoid",
        with_fc: bool = False,
        norm: str = "",
    ) -> None:
        super().__init__()
        if num_groups < 1 or dim % num_groups:
            raise ValueError(
                f"MODEL.SPARSE_INST.DECODER.INST.DIM is {dim}; it must be a multiple of "
                f"MODEL.SPARSE_INST.DECODER.GROUPS, {num_groups}"
            )
        if iam_normalization not in ("sigmoid", "softmax"):
            raise ValueError(f'iam_normalization is {iam_normalization!r}; it must be "sigmoid" or "softmax"')
        self.num_masks = num_masks
        self.num_groups = num_groups
        self.iam_normalization = iam_normalization

        self.inst_convs = conv_stack(in_channels + 2, dim, num_convs, norm)
        self.iam_conv = nn.Conv2d(dim, num_groups * num_masks, 3, padding=1, groups=num_groups)
        vector_dim = num_groups * dim
        self.fc = nn.Linear(vector_dim, vector_dim) if with_fc else None
        self.cls_score = nn.Linear(vector_dim, num_classes)
        self.mask_kernel = nn.Linear(vector_dim, kernel_dim)
        self.objectness = nn.Linear(vector_dim, 1)
        if iam_normalization == "softmax":
            # Published checkpoints hold it, although the softmax cancels it.
            self.softmax_bias = nn.Parameter(torch.ones(1))

        prior_bias = -math.log((1 - PRIOR_PROB) / PRIOR_PROB)
        nn.init.normal_(self.iam_conv.weight, std=0.01)
        nn.init.constant_(self.iam_conv.bias, prior_bias)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.constant_(self.cls_score.bias, prior_bias)
        nn.init.normal_(self.mask_kernel.weight, std=0.01)
        nn.init.zeros_(self.mask_kernel.bias)
        if self.fc is not None:
            c2_xavier_fill(self.fc)

    def forward(self, features: torch.Tensor) -> InstanceBranchOutput:
        """Predict the instances.

        Args:
            features: (B, 2 + C, H, W), coordinates first.

        Returns:
            Class logits, mask kernels, objectness logits and the activation maps.
        """
        return self.predict(self.inst_convs(features))

    def predict(self, features: torch.Tensor) -> InstanceBranchOutput:
        """Predict from the output (B, dim, H, W) of the 3x3 convolutions."""
        iam_logits = self.iam_conv(features)
        if self.iam_normalization == "softmax":
            iam_logits = iam_logits + self.softmax_bias
        vectors = pool_instances(normalize_iams(iam_logits, self.iam_normalization), features)
        # Map g * N + n is group g of instance n; the vectors of an instance are concatenated in group order.
        vectors = vectors.unflatten(1, (self.num_groups, -1)).transpose(1, 2).flatten(2)
        if self.fc is not None:
            vectors = F.relu(self.fc(vectors))
        return InstanceBranchOutput(
            self.cls_score(vectors), self.mask_kernel(vectors), self.objectness(vectors), iam_logits
        )


class MaskBranch(nn.Module):
    """Compute mask features, which are multiplied with the mask kernels.

    Args:
        in_channels: channels of the encoder's map, without coordinates.
        dim: channels of the convolutions.
        num_convs: 3x3 convolutions.
        kernel_dim: D.
        norm: norm of the 3x3 convolutions, "" for none as published.
    """

    def __init__(
        self, *, in_channels: int, dim: int = 256, num_convs: int = 4, kernel_dim: int = 128, norm: str = ""
    ) -> None:
        super().__init__()
        self.mask_convs = conv_stack(in_channels + 2, dim, num_convs, norm)
        self.projection = nn.Conv2d(dim, kernel_dim, 1)
        c2_msra_fill(self.projection)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return mask features (B, D, H, W) of a map (B, 2 + C, H, W) with coordinates first."""
        return self.projection(self.mask_convs(features))


def instance_branch_arguments(cfg: CfgNode, input_shape: ShapeSpec) -> dict:
    """Return the arguments that instance branches of all decoders share."""
    decoder = cfg.MODEL.SPARSE_INST.DECODER
    return {
        "in_channels": input_shape.channels,
        "dim": decoder.INST.DIM,
        "num_convs": decoder.INST.CONVS,
        "num_masks": decoder.NUM_MASKS,
        "num_classes": decoder.NUM_CLASSES,
        "kernel_dim": decoder.KERNEL_DIM,
        "norm": decoder.NORM,
    }


def mask_branch_arguments(cfg: CfgNode, input_shape: ShapeSpec) -> dict:
    """Return the arguments of the mask branch."""
    decoder = cfg.MODEL.SPARSE_INST.DECODER
    return {
        "in_channels": input_shape.channels,
        "dim": decoder.MASK.DIM,
        "num_convs": decoder.MASK.CONVS,
        "kernel_dim": decoder.KERNEL_DIM,
        "norm": decoder.NORM,
    }


def dynamic_masks(mask_kernels: torch.Tensor, mask_features: torch.Tensor) -> torch.Tensor:
    """Return the products (B, N, H, W) of kernels (B, N, D) and features (B, D, H, W)."""
    return torch.bmm(mask_kernels, mask_features.flatten(2)).unflatten(2, mask_features.shape[-2:])


@SPARSE_INST_DECODER_REGISTRY.register()
class BaseIAMDecoder(nn.Module):
    """Decode with one activation map per instance, normalized by a sigmoid and its sum (paper, section 3.2).

    Args:
        inst_branch: instance branch.
        mask_branch: mask branch, of the same kernel dimension.
        scale_factor: mask grid over decoder grid.
    """

    @configurable
    def __init__(
        self,
        *,
        inst_branch: InstanceBranch,
        mask_branch: MaskBranch,
        scale_factor: float = 2.0,
    ) -> None:
        super().__init__()
        self.inst_branch = inst_branch
        self.mask_branch = mask_branch
        self.scale_factor = scale_factor

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        return {
            "inst_branch": cls.build_instance_branch(cfg, input_shape),
            "mask_branch": MaskBranch(**mask_branch_arguments(cfg, input_shape)),
            "scale_factor": cfg.MODEL.SPARSE_INST.DECODER.SCALE_FACTOR,
        }

    @classmethod
    def build_instance_branch(cls, cfg: CfgNode, input_shape: ShapeSpec) -> nn.Module:
        """Build the instance branch."""
        return InstanceBranch(**instance_branch_arguments(cfg, input_shape), **cls.instance_branch_variant(cfg))

    @staticmethod
    def instance_branch_variant(cfg: CfgNode) -> dict:
        """Return the arguments of InstanceBranch that distinguish the registered decoders."""
        return {}

    @property
    def num_masks(self) -> int:
        """Return N, the predictions for each image."""
        return self.inst_branch.num_masks

    def forward(self, features: torch.Tensor, with_iams: bool = False) -> dict[str, torch.Tensor]:
        """Decode the encoder's map (B, C, H, W) into the dict of `SparseInst.network`, with ``pred_iam`` if asked."""
        features = append_coordinates(features)
        return self.combine(self.inst_branch(features), self.mask_branch(features), with_iams)

    def combine(
        self, instances: InstanceBranchOutput, mask_features: torch.Tensor, with_iams: bool = False
    ) -> dict[str, torch.Tensor]:
        """Combine the outputs of both branches, mask features (B, D, H, W), into the decoder's dict."""
        outputs = {
            "pred_logits": instances.class_logits,
            "pred_masks": self.mask_logits(instances, mask_features),
            "pred_scores": instances.objectness_logits,
        }
        if with_iams:
            outputs["pred_iam"] = self._to_mask_grid(instances.iam_logits)
        return outputs

    def mask_logits(self, instances: InstanceBranchOutput, mask_features: torch.Tensor) -> torch.Tensor:
        """Return the masks (B, N, Hm, Wm) of mask features (B, D, H, W)."""
        return self._to_mask_grid(dynamic_masks(instances.mask_kernels, mask_features))

    def fuse(self) -> nn.Module:
        """Return an equal, cheaper module for inference, or this one where a norm or a subclass prevents it."""
        if type(self) not in (BaseIAMDecoder, GroupIAMDecoder, GroupIAMSoftDecoder):
            return self
        convs = self.inst_branch.inst_convs[0], self.mask_branch.mask_convs[0]
        return self if any(conv.norm is not None for conv in convs) else FusedDecoder(self)

    def _to_mask_grid(self, maps: torch.Tensor) -> torch.Tensor:
        return F.interpolate(maps, scale_factor=self.scale_factor, mode="bilinear", align_corners=False)


@SPARSE_INST_DECODER_REGISTRY.register()
class GroupIAMDecoder(BaseIAMDecoder):
    """Decode with DECODER.GROUPS activation maps per instance, and concatenate their vectors (paper, section 3.2)."""

    @staticmethod
    def instance_branch_variant(cfg: CfgNode) -> dict:
        return {"num_groups": cfg.MODEL.SPARSE_INST.DECODER.GROUPS, "with_fc": True}


@SPARSE_INST_DECODER_REGISTRY.register()
class GroupIAMSoftDecoder(GroupIAMDecoder):
    """Decode as a GroupIAMDecoder does, with each map normalized by a softmax."""

    @staticmethod
    def instance_branch_variant(cfg: CfgNode) -> dict:
        return {**GroupIAMDecoder.instance_branch_variant(cfg), "iam_normalization": "softmax"}


def conv_stack(in_channels: int, dim: int, num_convs: int, norm: str) -> nn.Sequential:
    """Return 3x3 convolutions, each with a ReLU, of one of the decoder's branches. Raise ValueError without any."""
    if num_convs < 1:
        raise ValueError(
            f"A decoder branch has {num_convs} convolutions; MODEL.SPARSE_INST.DECODER.INST.CONVS and MASK.CONVS must "
            "be at least 1"
        )
    layers: list[nn.Module] = []
    for index in range(num_convs):
        conv = Conv2d(in_channels if index == 0 else dim, dim, 3, padding=1, bias=not norm, norm=get_norm(norm, dim))
        c2_msra_fill(conv)
        layers += [conv, nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def build_sparse_inst_decoder(
    cfg: CfgNode, input_shape: ShapeSpec, backbone_shapes: Mapping[str, ShapeSpec]
) -> nn.Module:
    """Build the decoder named by MODEL.SPARSE_INST.DECODER.NAME.

    Args:
        cfg: config.
        input_shape: of the encoder's map.
        backbone_shapes: of the backbone's features; MASK.DETAIL_FEATURE names one.

    Raises:
        ValueError: the decoder takes no detail, or the backbone has no such feature.
    """
    decoder = registered(SPARSE_INST_DECODER_REGISTRY, cfg, "MODEL.SPARSE_INST.DECODER.NAME")
    detail = cfg.MODEL.SPARSE_INST.DECODER.MASK.DETAIL_FEATURE
    if not detail:
        return decoder(cfg, input_shape)
    key = f"MODEL.SPARSE_INST.DECODER.MASK.DETAIL_FEATURE is {detail}"
    if not getattr(decoder, "takes_detail", False):
        raise ValueError(f'{key}, but {decoder.__name__} takes no such feature; set it to ""')
    if detail not in backbone_shapes:
        raise ValueError(f"{key}; the backbone's features are {', '.join(backbone_shapes)}: see OUT_FEATURES")
    return decoder(cfg, input_shape, backbone_shapes[detail])

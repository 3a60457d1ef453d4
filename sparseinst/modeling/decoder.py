"""The IAM decoder: instance activation maps, the vectors they pool, and the masks. Letters: see structures.py."""

import math
from typing import NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.utils.registry import Registry
from fvcore.nn.weight_init import c2_msra_fill, c2_xavier_fill
from torch import nn
from torch.nn import functional as F

from sparseinst.config import registered
from sparseinst.modeling.places import location_prior, window_logits
from sparseinst.modeling.precision import no_autocast

SPARSE_INST_DECODER_REGISTRY = Registry("SPARSE_INST_DECODER")
SPARSE_INST_DECODER_REGISTRY.__doc__ = """
Decoders: modules called with the encoder's map (B, C, H, W); return the dict that structures.py describes. Built as
``Name(cfg, input_shape)`` with the encoder's ShapeSpec.
"""

# Probability that a class, or a cell of an activation map, starts with.
PRIOR_PROB = 0.01
IAM_SUM_FLOOR = 1e-6


def append_coordinates(features: torch.Tensor) -> torch.Tensor:
    """Put two coordinate channels, x then y, before the features.

    Each runs from -1 at the first to +1 at the last column or row; a single column or row is at -1.

    Args:
        features: (B, C, H, W).

    Returns:
        (B, 2 + C, H, W).
    """
    batch, _, height, width = features.shape
    x = torch.linspace(-1, 1, width, dtype=features.dtype, device=features.device)
    y = torch.linspace(-1, 1, height, dtype=features.dtype, device=features.device)
    x = x.expand(batch, 1, height, width)
    y = y[:, None].expand(batch, 1, height, width)
    return torch.cat([x, y, features], dim=1)


def normalize_iams(iam_logits: torch.Tensor, normalization: str = "sigmoid") -> torch.Tensor:
    """Activation maps that sum to 1 (paper, section 3.2), in float32 whatever the autocast.

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

    In float32, whatever the autocast: over a large map the weights leave float16's range.

    Args:
        iam_weights: (B, R, H, W) float32, each map summing to 1.
        features: (B, C, H, W).

    Returns:
        (B, R, C) float32.
    """
    with no_autocast(features.device):
        return torch.bmm(iam_weights.flatten(2), features.float().flatten(2).transpose(1, 2))


class InstanceBranchOutput(NamedTuple):
    """What the instance branch predicts.

    Attributes:
        class_logits: (B, N, K).
        mask_kernels: (B, N, D).
        objectness_logits: (B, N, 1).
        iam_logits: (B, G * N, H, W), group-major.
        iam_weights: (B, G * N, H, W) float32, the maps that the features were pooled with; each sums to 1.
        windows: (B, N, 2), see :func:`window_logits`; None without windows.
    """

    class_logits: torch.Tensor
    mask_kernels: torch.Tensor
    objectness_logits: torch.Tensor
    iam_logits: torch.Tensor
    iam_weights: torch.Tensor
    windows: torch.Tensor | None


class InstanceBranch(nn.Module):
    """Activation maps, and what the vectors that they pool say: class, mask kernel, objectness.

    Args:
        in_channels: channels of the encoder's map, without the coordinates.
        dim: channels of the convolutions.
        num_convs: 3x3 convolutions before the maps.
        num_masks: instances, N.
        num_classes: K.
        kernel_dim: D.
        num_groups: maps per instance, G; they are the groups of ``iam_conv`` too.
        iam_normalization: "sigmoid" or "softmax", see :func:`normalize_iams`.
        with_fc: put a linear layer and ReLU between the pooled vectors and the heads.
        norm: norm of the 3x3 convolutions, "" for none as published.
        iam_init_std: standard deviation of ``iam_conv``'s initial weights.
        location_prior: factor of :func:`location_prior`, which is added to the logits; 0 for none as published.
        mask_window: sharpness that the windows of :func:`window_logits` start with; 0 for none as published.

    Raises:
        ValueError: ``dim`` cannot be divided by ``num_groups``; an unknown normalisation.
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
        iam_init_std: float = 0.01,
        location_prior: float = 0.0,
        mask_window: float = 0.0,
    ) -> None:
        super().__init__()
        if num_groups < 1 or dim % num_groups:
            raise ValueError(
                f"MODEL.SPARSE_INST.DECODER.INST.DIM is {dim}, which MODEL.SPARSE_INST.DECODER.GROUPS, {num_groups}, "
                "does not divide"
            )
        if iam_normalization not in ("sigmoid", "softmax"):
            raise ValueError(f'iam_normalization is {iam_normalization!r}; it must be "sigmoid" or "softmax"')
        self.num_groups = num_groups
        self.iam_normalization = iam_normalization
        self.location_prior = location_prior

        self.inst_convs = _conv_stack(in_channels + 2, dim, num_convs, norm)
        self.iam_conv = nn.Conv2d(dim, num_groups * num_masks, 3, padding=1, groups=num_groups)
        vector_dim = num_groups * dim
        self.fc = nn.Linear(vector_dim, vector_dim) if with_fc else None
        self.cls_score = nn.Linear(vector_dim, num_classes)
        self.mask_kernel = nn.Linear(vector_dim, kernel_dim)
        self.objectness = nn.Linear(vector_dim, 1)
        self.mask_window = nn.Linear(vector_dim, 2) if mask_window > 0 else None
        if iam_normalization == "softmax":
            # The softmax cancels it; it exists because the released checkpoints hold it.
            self.softmax_bias = nn.Parameter(torch.ones(1))

        prior_bias = -math.log((1 - PRIOR_PROB) / PRIOR_PROB)
        nn.init.normal_(self.iam_conv.weight, std=iam_init_std)
        nn.init.constant_(self.iam_conv.bias, prior_bias)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.constant_(self.cls_score.bias, prior_bias)
        nn.init.normal_(self.mask_kernel.weight, std=0.01)
        nn.init.zeros_(self.mask_kernel.bias)
        if self.fc is not None:
            c2_xavier_fill(self.fc)
        if self.mask_window is not None:
            nn.init.normal_(self.mask_window.weight, std=0.01)
            # The inverse of softplus.
            self.mask_window.bias.data = torch.tensor([math.log(math.expm1(mask_window)), 0.0])

    def forward(self, features: torch.Tensor) -> InstanceBranchOutput:
        """Predict the instances.

        Args:
            features: (B, 2 + C, H, W), coordinates first.

        Returns:
            Class logits, mask kernels, objectness logits and the activation maps.
        """
        return self.predict(self.inst_convs(features))

    def predict(self, features: torch.Tensor) -> InstanceBranchOutput:
        """What follows the 3x3 convolutions, whose output (B, dim, H, W) is given."""
        iam_logits = self.iam_conv(features)
        if self.iam_normalization == "softmax":
            iam_logits = iam_logits + self.softmax_bias
        if self.location_prior > 0:
            num_masks = iam_logits.shape[1] // self.num_groups
            prior = location_prior(num_masks, *iam_logits.shape[-2:], device=iam_logits.device)
            iam_logits = iam_logits + self.location_prior * prior.repeat(self.num_groups, 1, 1)
        iam_weights = normalize_iams(iam_logits, self.iam_normalization)
        vectors = pool_instances(iam_weights, features)
        # Map g * N + n is group g of instance n; an instance's vectors are joined in group order.
        vectors = vectors.unflatten(1, (self.num_groups, -1)).transpose(1, 2).flatten(2)
        if self.fc is not None:
            vectors = F.relu(self.fc(vectors))
        windows = None
        if self.mask_window is not None:
            sharpness, bias = self.mask_window(vectors).unbind(2)
            windows = torch.stack([F.softplus(sharpness), bias], dim=2)
        return InstanceBranchOutput(
            self.cls_score(vectors),
            self.mask_kernel(vectors),
            self.objectness(vectors),
            iam_logits,
            iam_weights,
            windows,
        )


class MaskBranch(nn.Module):
    """Mask features, which the mask kernels are multiplied with.

    Args:
        in_channels: channels of the encoder's map, without the coordinates.
        dim: channels of the convolutions.
        num_convs: 3x3 convolutions.
        kernel_dim: D.
        norm: norm of the 3x3 convolutions, "" for none as published.
    """

    def __init__(
        self, *, in_channels: int, dim: int = 256, num_convs: int = 4, kernel_dim: int = 128, norm: str = ""
    ) -> None:
        super().__init__()
        self.mask_convs = _conv_stack(in_channels + 2, dim, num_convs, norm)
        self.projection = nn.Conv2d(dim, kernel_dim, 1)
        c2_msra_fill(self.projection)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, 2 + C, H, W), coordinates first, to mask features (B, D, H, W)."""
        return self.projection(self.mask_convs(features))


@SPARSE_INST_DECODER_REGISTRY.register()
class BaseIAMDecoder(nn.Module):
    """One activation map per instance, sigmoid normalised (paper, section 3.2).

    Args:
        inst_branch: instance branch.
        mask_branch: mask branch, of the same kernel dimension.
        scale_factor: mask grid over decoder grid.
        output_iam: return ``pred_iam`` too.
    """

    @configurable
    def __init__(
        self,
        *,
        inst_branch: InstanceBranch,
        mask_branch: MaskBranch,
        scale_factor: float = 2.0,
        output_iam: bool = False,
    ) -> None:
        super().__init__()
        self.inst_branch = inst_branch
        self.mask_branch = mask_branch
        self.scale_factor = scale_factor
        self.output_iam = output_iam

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        decoder = cfg.MODEL.SPARSE_INST.DECODER
        return {
            "inst_branch": InstanceBranch(
                in_channels=input_shape.channels,
                dim=decoder.INST.DIM,
                num_convs=decoder.INST.CONVS,
                num_masks=decoder.NUM_MASKS,
                num_classes=decoder.NUM_CLASSES,
                kernel_dim=decoder.KERNEL_DIM,
                norm=decoder.NORM,
                iam_init_std=decoder.IAM_INIT_STD,
                location_prior=decoder.LOCATION_PRIOR,
                mask_window=decoder.MASK_WINDOW,
                **cls.instance_branch_variant(cfg),
            ),
            "mask_branch": MaskBranch(
                in_channels=input_shape.channels,
                dim=decoder.MASK.DIM,
                num_convs=decoder.MASK.CONVS,
                kernel_dim=decoder.KERNEL_DIM,
                norm=decoder.NORM,
            ),
            "scale_factor": decoder.SCALE_FACTOR,
            "output_iam": decoder.OUTPUT_IAM,
        }

    @staticmethod
    def instance_branch_variant(cfg: CfgNode) -> dict:
        """Arguments of InstanceBranch that make the registered decoders differ."""
        return {}

    def forward(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """Decode the encoder's map (B, C, H, W) into the dict that structures.py describes."""
        features = append_coordinates(features)
        return self.combine(self.inst_branch(features), self.mask_branch(features))

    def combine(self, instances: InstanceBranchOutput, mask_features: torch.Tensor) -> dict[str, torch.Tensor]:
        """What both branches gave, mask features (B, D, H, W), as the decoder's dict."""
        mask_logits = torch.bmm(instances.mask_kernels, mask_features.flatten(2)).unflatten(2, mask_features.shape[-2:])
        if instances.windows is not None:
            mask_logits = mask_logits + window_logits(instances.windows, instances.iam_weights)
        outputs = {
            "pred_logits": instances.class_logits,
            "pred_masks": self._to_mask_grid(mask_logits),
            "pred_scores": instances.objectness_logits,
        }
        if self.training:
            outputs["iam_weights"] = instances.iam_weights
        if self.output_iam:
            outputs["pred_iam"] = self._to_mask_grid(instances.iam_logits)
        return outputs

    def _to_mask_grid(self, maps: torch.Tensor) -> torch.Tensor:
        return F.interpolate(maps, scale_factor=self.scale_factor, mode="bilinear", align_corners=False)


@SPARSE_INST_DECODER_REGISTRY.register()
class GroupIAMDecoder(BaseIAMDecoder):
    """DECODER.GROUPS activation maps per instance, whose vectors are joined (paper, section 3.2)."""

    @staticmethod
    def instance_branch_variant(cfg: CfgNode) -> dict:
        return {"num_groups": cfg.MODEL.SPARSE_INST.DECODER.GROUPS, "with_fc": True}


@SPARSE_INST_DECODER_REGISTRY.register()
class GroupIAMSoftDecoder(GroupIAMDecoder):
    """As GroupIAMDecoder, with a softmax over the map in place of the sigmoid and its sum."""

    @staticmethod
    def instance_branch_variant(cfg: CfgNode) -> dict:
        return {**GroupIAMDecoder.instance_branch_variant(cfg), "iam_normalization": "softmax"}


def _conv_stack(in_channels: int, dim: int, num_convs: int, norm: str) -> nn.Sequential:
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


def build_sparse_inst_decoder(cfg: CfgNode, input_shape: ShapeSpec) -> nn.Module:
    """Build the decoder that MODEL.SPARSE_INST.DECODER.NAME names."""
    return registered(SPARSE_INST_DECODER_REGISTRY, cfg, "MODEL.SPARSE_INST.DECODER.NAME")(cfg, input_shape)

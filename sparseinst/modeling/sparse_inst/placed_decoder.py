"""The IAM decoder whose activation maps stand at the peaks of a heat map (not in the paper).

Learned maps must find the objects, and matching tells each map which one: on a few hundred images that takes most of
the training. Here a heat map with a loss on every cell, that of CenterNet (arXiv 1904.07850), finds the centers of the
objects and their classes. Each of its highest peaks places one activation map. Letters: sparseinst.structures.
"""

import math

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from torch import nn
from torch.nn import functional as F

from sparseinst.modeling.sparse_inst.decoder import (
    PRIOR_PROB,
    SPARSE_INST_DECODER_REGISTRY,
    BaseIAMDecoder,
    InstanceBranchOutput,
    conv_stack,
    instance_branch_arguments,
    normalize_iams,
    pool_instances,
)
from sparseinst.modeling.sparse_inst.location_prior import WindowHead
from sparseinst.ops.coordinates import append_coordinates

# Standard deviation of the Gaussian of each activation map, in cells.
MAP_RADIUS = 1.5
# Cells that are no peaks rank behind those that are.
NOT_A_PEAK = 100.0


class PlacedInstanceBranch(nn.Module):
    """Find the peaks of a class heat map, pool a vector around each, and predict mask kernel and objectness from it.

    Args:
        in_channels: channels of the encoder's map, without coordinates.
        dim: channels of the convolutions.
        num_convs: 3x3 convolutions before the heat map.
        num_masks: peaks, N.
        num_classes: K.
        kernel_dim: D.
        norm: norm of the 3x3 convolutions, "" for none.
        mask_window: initial sharpness of the windows of `WindowHead`; 0 for none.
    """

    iam_normalization = "softmax"

    def __init__(
        self,
        *,
        in_channels: int,
        dim: int = 256,
        num_convs: int = 4,
        num_masks: int = 100,
        num_classes: int = 80,
        kernel_dim: int = 128,
        norm: str = "",
        mask_window: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_masks = num_masks
        self.inst_convs = conv_stack(in_channels + 2, dim, num_convs, norm)
        self.heatmap = nn.Conv2d(dim, num_classes, 3, padding=1)
        self.saliency = nn.Conv2d(dim, 1, 3, padding=1)
        self.peak_fc = nn.Linear(dim, dim)
        self.mask_kernel = nn.Linear(dim, kernel_dim)
        self.objectness = nn.Linear(dim, 1)
        self.mask_window = WindowHead(dim, mask_window) if mask_window > 0 else None

        for layer in (self.heatmap, self.saliency, self.mask_kernel):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(self.heatmap.bias, -math.log((1 - PRIOR_PROB) / PRIOR_PROB))

    def forward(self, features: torch.Tensor) -> tuple[InstanceBranchOutput, torch.Tensor]:
        """Predict the instances.

        Args:
            features: (B, 2 + C, H, W), coordinates first.

        Returns:
            The predictions of the peaks, and the heat map's logits (B, K, H, W).
        """
        features = self.inst_convs(features)
        heat_logits = self.heatmap(features)
        cells = highest_peaks(heat_logits, self.num_masks)
        iam_logits = self.saliency(features) + placed_maps(cells, *features.shape[-2:])
        iam_weights = normalize_iams(iam_logits, self.iam_normalization)
        own, class_logits = (
            maps.flatten(2).gather(2, cells[:, None].expand(-1, maps.shape[1], -1)).transpose(1, 2)
            for maps in (features, heat_logits)
        )
        vectors = F.relu(pool_instances(iam_weights, features) + self.peak_fc(own))
        windows = None if self.mask_window is None else self.mask_window(vectors)
        predictions = InstanceBranchOutput(
            class_logits, self.mask_kernel(vectors), self.objectness(vectors), iam_logits, iam_weights, windows
        )
        return predictions, heat_logits


@torch.no_grad()
def highest_peaks(heat_logits: torch.Tensor, num_peaks: int) -> torch.Tensor:
    """Return (B, N) int64: the cells of the N highest peaks of a heat map (B, K, H, W), in any class, best first.

    A peak is not lower than its eight neighbors. Where there are too few, the highest other cells follow, and where the
    map has fewer than N cells, its last cell again.
    """
    best = heat_logits.float().amax(1, keepdim=True)
    is_peak = F.max_pool2d(best, 3, stride=1, padding=1) == best
    ranked = torch.where(is_peak, best, best - NOT_A_PEAK).flatten(1)
    num_cells = ranked.shape[1]
    # Padded, so that an exported graph holds for small images, too.
    cells = F.pad(ranked, (0, num_peaks), value=-torch.inf).topk(num_peaks, dim=1).indices
    return cells.clamp(max=num_cells - 1)


def placed_maps(cells: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return logits (B, N, height, width) that fall with the squared distance from each cell; cells (B, N) int64."""
    rows, columns = cells // width, cells % width
    y = torch.arange(height, device=cells.device) - rows[..., None]
    x = torch.arange(width, device=cells.device) - columns[..., None]
    scale = -1 / (2 * MAP_RADIUS**2)
    return scale * y.square()[..., :, None] + scale * x.square()[..., None, :]


@SPARSE_INST_DECODER_REGISTRY.register()
class PlacedIAMDecoder(BaseIAMDecoder):
    """Decode with one activation map at each peak of a heat map.

    Measured in docs/own_data.md. The heat map is trained by the item "heatmap" of LOSS.ITEMS, in place of "labels".

    Args:
        inst_branch: instance branch.
        mask_branch: mask branch, of the same kernel dimension.
        scale_factor: mask grid over decoder grid.
    """

    @classmethod
    def build_instance_branch(cls, cfg: CfgNode, input_shape: ShapeSpec) -> nn.Module:
        return PlacedInstanceBranch(**instance_branch_arguments(cfg, input_shape))

    def forward(self, features: torch.Tensor, with_iams: bool = False) -> dict[str, torch.Tensor]:
        """Decode as the base class does; in training with ``heat_logits`` (B, K, H, W)."""
        features = append_coordinates(features)
        instances, heat_logits = self.inst_branch(features)
        outputs = self.combine(instances, self.mask_branch(features), with_iams)
        if self.training:
            outputs["heat_logits"] = heat_logits
        return outputs

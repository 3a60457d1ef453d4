"""The IAM decoder whose activation maps stand at the peaks of a heat map (not in the paper).

Learned maps must find the objects, and matching tells each map which one: on a few hundred images that takes most of
the training. Here a heat map with a loss on every cell, that of CenterNet (arXiv 1904.07850), finds the centers of the
objects and their classes. Each of its highest peaks places one activation map; in training the centers of the ground
truth do, so nothing is matched. A box at the center, with a loss of its own, and a quadratic in the box's coordinates
give the mask its location and first shape, an ellipse. The mask features add the outline. Letters:
sparseinst.structures.
"""

import math
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from torch import nn
from torch.nn import functional as F

from sparseinst.modeling.sparse_inst.decoder import (
    PRIOR_PROB,
    SPARSE_INST_DECODER_REGISTRY,
    BaseIAMDecoder,
    MaskBranch,
    conv_stack,
    dynamic_masks,
    instance_branch_arguments,
    mask_branch_arguments,
    normalize_iams,
    pool_instances,
)
from sparseinst.modeling.sparse_inst.matcher import SPARSE_INST_MATCHER_REGISTRY, MatchedPairs
from sparseinst.ops.coordinates import append_coordinates, relative_centers
from sparseinst.ops.losses import center_cells, masks_on_grid
from sparseinst.ops.precision import no_autocast
from sparseinst.structures.targets import InstanceTargets

# Standard deviation of the Gaussian of each activation map, in cells.
MAP_RADIUS = 1.5
# Initial factors of 1, v, u, v ** 2, u ** 2, u * v, see `ellipse_logits`: 0 on the ellipse in the box, 2 in its center.
ELLIPSE = (2.0, 0.0, 0.0, -2.0, -2.0, 0.0)
# Coordinates of boxes end here, in halves of a box, so that logits stay finite in float16.
FARTHEST = 3.0
MAX_LOG_SIZE = 4.0
# Subtracted from other cells, so that they rank behind the peaks.
NOT_A_PEAK = 100.0


class PlacedInstanceBranch(nn.Module):
    """Predict a class heat map, pool a vector around cells of it, and predict mask kernel and objectness from it.

    Args:
        in_channels: channels of the encoder's map, without coordinates.
        dim: channels of the convolutions.
        num_convs: 3x3 convolutions before the heat map.
        num_masks: cells, N: the decoder chooses them.
        num_classes: K.
        kernel_dim: D.
        norm: norm of the 3x3 convolutions, "" for none.
        ellipse_size: initial height and width of the boxes, as a share of the map's.
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
        ellipse_size: float = 0.25,
    ) -> None:
        super().__init__()
        self.num_masks = num_masks
        self.inst_convs = conv_stack(in_channels + 2, dim, num_convs, norm)
        self.heatmap = nn.Conv2d(dim, num_classes, 3, padding=1)
        self.saliency = nn.Conv2d(dim, 1, 3, padding=1)
        self.peak_fc = nn.Linear(dim, dim)
        self.mask_kernel = nn.Linear(dim, kernel_dim)
        self.objectness = nn.Linear(dim, 1)
        self.ellipse_size = ellipse_size
        self.box = nn.Linear(dim, 4)
        self.ellipse = nn.Linear(dim, len(ELLIPSE))

        for layer in (self.heatmap, self.saliency, self.mask_kernel, self.box, self.ellipse):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        self.ellipse.bias.data = torch.tensor(ELLIPSE)
        nn.init.constant_(self.heatmap.bias, -math.log((1 - PRIOR_PROB) / PRIOR_PROB))

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features (B, dim, H, W) and the heat map's logits (B, K, H, W) of a map (B, 2 + C, H, W)."""
        features = self.inst_convs(features)
        return features, self.heatmap(features)

    def predict(
        self, features: torch.Tensor, heat_logits: torch.Tensor, cells: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        """Predict the instances at cells of the map.

        Args:
            features, heat_logits: what `forward` returned.
            cells: (B, N) int64, in [0, H * W).

        Returns:
            ``pred_logits`` and ``pred_scores`` of `SparseInst.network` with ``pred_iam`` (B, N, H, W); the mask kernels
            (B, N, D); the ellipses (B, N, 10) of `ellipse_logits`.
        """
        iam_logits = self.saliency(features) + placed_maps(cells, *features.shape[-2:])
        own, class_logits = (
            maps.flatten(2).gather(2, cells[:, None].expand(-1, maps.shape[1], -1)).transpose(1, 2)
            for maps in (features, heat_logits)
        )
        pooled = pool_instances(normalize_iams(iam_logits, self.iam_normalization), features)
        vectors = F.relu(pooled + self.peak_fc(own))
        ellipses = torch.cat([self._boxes(vectors, cells, *features.shape[-2:]), self.ellipse(vectors).float()], dim=2)
        outputs = {"pred_logits": class_logits, "pred_scores": self.objectness(vectors), "pred_iam": iam_logits}
        return outputs, self.mask_kernel(vectors), ellipses

    def _boxes(self, vectors: torch.Tensor, cells: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Return boxes (B, N, 4) float32: center y, x, height, width in shares of the map, near the cells."""
        with no_autocast(vectors.device):
            y, x = (relative_centers(size, cells.device) for size in (height, width))
            centers = torch.stack([y[cells // width], x[cells % width]], dim=2)
            offsets, log_sizes = self.box(vectors.float()).split(2, dim=2)
            sizes = self.ellipse_size * log_sizes.clamp(max=MAX_LOG_SIZE).exp()
            return torch.cat([centers + self.ellipse_size * offsets, sizes], dim=2)


def ellipse_logits(ellipses: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return mask logits that are quadratic in the coordinates of each instance's box.

    Args:
        ellipses: (B, N, 10) float32: the box (center y, x, height, width in shares of the map), and the factors of 1,
            v, u, v ** 2, u ** 2 and u * v, where v and u are -1 and 1 at the edges of the box.
        height, width: of the masks.

    Returns:
        (B, N, height, width) float32.
    """
    center_y, center_x, box_height, box_width, *factors = ellipses[..., None].unbind(2)
    v = 2 * (relative_centers(height, ellipses.device) - center_y) / box_height
    u = 2 * (relative_centers(width, ellipses.device) - center_x) / box_width
    v, u = v.clamp(-FARTHEST, FARTHEST), u.clamp(-FARTHEST, FARTHEST)
    rows = factors[0] + factors[1] * v + factors[3] * v.square()
    columns = factors[2] * u + factors[4] * u.square()
    return rows[..., None] + columns[..., None, :] + (factors[5] * v)[..., None] * u[..., None, :]


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


class SubpixelMaskBranch(MaskBranch):
    """Compute mask features on a finer grid than the decoder's.

    Args:
        upscale: the finer grid over the decoder's, a whole number.
        kernel_dim: D.
        kwargs: as those of `MaskBranch`.

    Raises:
        ValueError: ``upscale`` is not a whole number.
    """

    def __init__(self, *, upscale: float, kernel_dim: int, **kwargs: Any) -> None:
        if upscale != int(upscale):
            raise ValueError(
                f"MODEL.SPARSE_INST.DECODER.SCALE_FACTOR is {upscale}; a PlacedIAMDecoder needs a whole number"
            )
        self.upscale = int(upscale)
        super().__init__(kernel_dim=kernel_dim * self.upscale**2, **kwargs)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return mask features (B, D, Hm, Wm) of a map (B, 2 + C, H, W) with coordinates first."""
        return F.pixel_shuffle(super().forward(features), self.upscale)


@SPARSE_INST_DECODER_REGISTRY.register()
class PlacedIAMDecoder(BaseIAMDecoder):
    """Decode with one activation map at each peak of a heat map, in training at each center of the ground truth.

    Measured in docs/own_data.md. It needs MATCHER.NAME CenterMatcher, and "heatmap" in place of "labels" in LOSS.ITEMS;
    "boxes" trains the boxes. Mask features are on the mask grid (sub-pixel convolution, arXiv 1609.05158).

    Args:
        inst_branch: instance branch.
        mask_branch: mask branch, of the same kernel dimension.
        scale_factor: mask grid over decoder grid.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict:
        decoder, loss = cfg.MODEL.SPARSE_INST.DECODER, cfg.MODEL.SPARSE_INST.LOSS
        matcher = cfg.MODEL.SPARSE_INST.MATCHER.NAME
        if (matcher, loss.NAME) == ("SparseInstMatcher", "SparseInstCriterion") or "labels" in loss.ITEMS:
            raise ValueError(
                f"MODEL.SPARSE_INST has DECODER.NAME {decoder.NAME} with MATCHER.NAME {matcher} and LOSS.ITEMS "
                f"{tuple(loss.ITEMS)}; set MATCHER.NAME to CenterMatcher and LOSS.ITEMS to "
                "('heatmap', 'boxes', 'masks') there"
            )
        return {
            "inst_branch": PlacedInstanceBranch(
                **instance_branch_arguments(cfg, input_shape), ellipse_size=decoder.ELLIPSE_SIZE
            ),
            "mask_branch": SubpixelMaskBranch(**mask_branch_arguments(cfg, input_shape), upscale=decoder.SCALE_FACTOR),
            "scale_factor": decoder.SCALE_FACTOR,
        }

    def forward(self, features: torch.Tensor, with_iams: bool = False) -> dict[str, torch.Tensor]:
        """Decode as the base class does; in training return the maps that `training_outputs` reads."""
        features = append_coordinates(features)
        mask_features = self.mask_branch(features)
        features, heat_logits = self.inst_branch(features)
        if self.training:
            return {"inst_features": features, "heat_logits": heat_logits, "mask_features": mask_features}
        outputs, _ = self._decode(features, heat_logits, mask_features, highest_peaks(heat_logits, self.num_masks))
        iam_logits = outputs.pop("pred_iam")
        if with_iams:
            outputs["pred_iam"] = self._to_mask_grid(iam_logits)
        return outputs

    def training_outputs(
        self, outputs: dict[str, torch.Tensor], targets: list[InstanceTargets]
    ) -> dict[str, torch.Tensor]:
        """Decode at the centers of the ground truth.

        Args:
            outputs: what `forward` returned in training.
            targets: ground truth of each image. Of more than N instances in an image the first N count.

        Returns:
            The dict of `SparseInst.network` with ``heat_logits`` (B, K, H, W) and ``boxes`` (B, N, 4); prediction i is
            that of instance i, with as many as the image with the most instances has, and at least one.
        """
        heat_logits = outputs["heat_logits"]
        cells = [
            center_cells(masks_on_grid(target.gt_masks[: self.num_masks], tuple(heat_logits.shape[-2:])))
            for target in targets
        ]
        most = max(1, *(len(image_cells) for image_cells in cells))
        padded = torch.stack([F.pad(image_cells, (0, most - len(image_cells))) for image_cells in cells])
        decoded, boxes = self._decode(outputs["inst_features"], heat_logits, outputs["mask_features"], padded)
        return {**decoded, "heat_logits": heat_logits, "boxes": boxes}

    def _decode(
        self, features: torch.Tensor, heat_logits: torch.Tensor, mask_features: torch.Tensor, cells: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return the dict, with ``pred_iam`` on the decoder's grid, and the boxes (B, N, 4)."""
        outputs, mask_kernels, ellipses = self.inst_branch.predict(features, heat_logits, cells)
        shapes = ellipse_logits(ellipses, *mask_features.shape[-2:])
        return {**outputs, "pred_masks": dynamic_masks(mask_kernels, mask_features) + shapes}, ellipses[..., :4]


@SPARSE_INST_MATCHER_REGISTRY.register()
class CenterMatcher:
    """Pair prediction i with instance i: a `PlacedIAMDecoder` predicts at the centers of the instances."""

    def __init__(self, cfg: CfgNode | None = None) -> None:
        pass

    def __call__(self, outputs: dict[str, torch.Tensor], targets: list[InstanceTargets]) -> list[MatchedPairs]:
        """Return the pairs of each image: at most as many as there are predictions."""
        class_logits = outputs["pred_logits"]
        steps = torch.arange(class_logits.shape[1], device=class_logits.device)
        return [MatchedPairs(*[steps[: len(target.gt_classes)]] * 2) for target in targets]

"""The IAM decoder whose activation maps stand at the peaks of a heat map (not in the paper).

Learned maps must find the objects, and matching tells each map which one: on a few hundred images that takes most of
the training. Here a heat map with a loss on every cell, that of CenterNet (arXiv 1904.07850), finds the centers of the
objects and their classes. Each of its highest peaks places one activation map; in training the center of each object
and the cell next to it do, so nothing is matched. placed_levels.py has the cells of all sizes, T, and placed_masks.py
makes the masks. Letters: sparseinst.structures.
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
    conv_stack,
    instance_branch_arguments,
    mask_branch_arguments,
    normalize_iams,
    pool_instances,
)
from sparseinst.modeling.sparse_inst.placed_levels import (
    COARSEST_STRIDE,
    LevelCells,
    halved_maps,
    heatmap_of_levels,
    highest_peaks,
    levels_of,
    on_finest_level,
    placed_maps,
    split_levels,
)
from sparseinst.modeling.sparse_inst.placed_masks import (
    SubpixelMaskBranch,
    crop,
    cut_to_windows,
    enlarged,
    map_size,
    placed_masks,
)
from sparseinst.ops.coordinates import append_coordinates
from sparseinst.ops.masks import masks_to_boxes
from sparseinst.ops.precision import no_autocast
from sparseinst.structures.targets import InstanceTargets

# Initial factors of 1, v, u, v ** 2, u ** 2, u * v, see `ellipse_forms`: 0 on the ellipse in the box, 2 in its center.
ELLIPSE = (2.0, 0.0, 0.0, -2.0, -2.0, 0.0)
# Logarithm of a box's size over its initial size, in both directions: the quadratic of a smaller box loses digits.
MAX_LOG_SIZE = 4.0
# Cells at which an instance is trained: its center, and those next to it, where its peak may be found, too.
NUM_CELLS = 2
# Logit of the classes that a peak is not of.
OTHER_CLASS = -30.0


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
        num_levels: most levels of cells, DECODER.NUM_LEVELS.
        max_levels: most levels whose cells are not too large.
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
        num_levels: int = 4,
        max_levels: int = 6,
    ) -> None:
        super().__init__()
        self.num_masks = num_masks
        self.inst_convs = conv_stack(in_channels + 2, dim, num_convs, norm)
        self.heatmap = nn.Conv2d(dim, num_classes, 3, padding=1)
        self.saliency = nn.Conv2d(dim, 1, 3, padding=1)
        self.peak_fc = nn.Linear(dim, dim)
        self.mask_kernel = nn.Linear(dim, kernel_dim)
        self.objectness = nn.Linear(dim, 1)
        self.num_levels = min(num_levels, max_levels)
        # In the state dict, because no other tensor's shape tells the DECODER.NUM_LEVELS of a checkpoint.
        self.register_buffer("levels", torch.arange(num_levels))
        self.level_box = nn.Linear(dim, 4)
        self.ellipse = nn.Linear(dim, len(ELLIPSE))

        for layer in (self.heatmap, self.saliency, self.mask_kernel, self.level_box, self.ellipse):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        self.ellipse.bias.data = torch.tensor(ELLIPSE)
        nn.init.constant_(self.heatmap.bias, -math.log((1 - PRIOR_PROB) / PRIOR_PROB))

    def forward(self, features: torch.Tensor) -> dict[str, Any]:
        """Run the convolutions on all levels of a map (B, 2 + C, H, W).

        Returns:
            ``features`` (B, dim, T), ``heat_logits`` (B, K, T), ``saliency`` (B, 1, T), and ``sizes``, height and width
            of each level.
        """
        levels = halved_maps(features, self.num_levels)
        sizes = [level.shape[-2:] for level in levels]
        # Convolutions, each with a ReLU.
        for conv in self.inst_convs[::2]:
            levels = convolve(conv, levels)
        joined = {
            name: torch.cat([layer(level).flatten(2) for level in levels], dim=2)
            for name, layer in (("features", nn.Identity()), ("heat_logits", self.heatmap), ("saliency", self.saliency))
        }
        return {**joined, "sizes": sizes}

    def predict(
        self,
        features: torch.Tensor,
        heat_logits: torch.Tensor,
        saliency: torch.Tensor,
        sizes: list[tuple[int, int]],
        cells: torch.Tensor,
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        """Predict the instances at cells of the levels.

        Args:
            features, heat_logits, saliency, sizes: what `forward` returned.
            cells: (B, N) int64, in [0, T).

        Returns:
            ``pred_logits`` and ``pred_scores`` of `SparseInst.network` with ``pred_iam`` (B, N, T); the mask kernels
            (B, N, D); the ellipses (B, N, 10) of `ellipse_forms`.
        """
        grid = LevelCells.of(sizes, cells.device)
        iam_logits = saliency + placed_maps(cells, grid)
        own, class_logits = (
            maps.gather(2, cells[:, None].expand(-1, maps.shape[1], -1)).transpose(1, 2)
            for maps in (features, heat_logits)
        )
        # All cells form one row.
        weights = normalize_iams(iam_logits[:, :, None], self.iam_normalization)
        vectors = F.relu(pool_instances(weights, features[:, :, None]) + self.peak_fc(own))
        ellipses = torch.cat([self._boxes(vectors, cells, grid), self.ellipse(vectors).float()], dim=2)
        outputs = {"pred_logits": class_logits, "pred_scores": self.objectness(vectors), "pred_iam": iam_logits}
        return outputs, self.mask_kernel(vectors), ellipses

    def _boxes(self, vectors: torch.Tensor, cells: torch.Tensor, grid: LevelCells) -> torch.Tensor:
        """Return boxes (B, N, 4) float32: center y, x, height, width in shares of the map, near the cells."""
        with no_autocast(vectors.device):
            # RUNTIME.PRECISION stores the weights in 16 bits.
            boxes = F.linear(vectors.float(), self.level_box.weight.float(), self.level_box.bias.float())
            offsets, log_sizes = boxes.split(2, dim=2)
            unit = grid.object_size[cells]
            sizes = unit * log_sizes.clamp(-MAX_LOG_SIZE, MAX_LOG_SIZE).exp()
            return torch.cat([grid.centers[cells] + unit * offsets, sizes], dim=2)


def convolve(conv: nn.Module, levels: list[torch.Tensor]) -> list[torch.Tensor]:
    """Run a convolution with its norm and a ReLU on each level (B, C, h, w).

    In training a norm of batches takes the statistics of all levels together: those that it uses in inference.
    """
    # Optimization for inference replaces the convolution.
    norm = getattr(conv, "norm", None)
    if not (conv.training and isinstance(norm, nn.modules.batchnorm._BatchNorm)):
        return [F.relu(conv(level)) for level in levels]
    maps = [F.conv2d(level, conv.weight, padding=conv.padding) for level in levels]
    # Channels last, the order in memory that SOLVER.CHANNELS_LAST gives the maps.
    rows = torch.cat([each.permute(0, 2, 3, 1).flatten(1, 2) for each in maps], dim=1)
    joined = F.relu(norm(rows.transpose(1, 2)[:, :, None]))
    return split_levels(joined[:, :, 0], [each.shape[-2:] for each in maps])


@SPARSE_INST_DECODER_REGISTRY.register()
class PlacedIAMDecoder(BaseIAMDecoder):
    """Decode with one activation map at each peak of a heat map, in training at the centers of the ground truth.

    Measured in docs/own_data.md. LOSS.NAME PlacedCriterion trains the decoder. Mask features are on the mask grid
    (sub-pixel convolution, arXiv 1609.05158), and see the backbone feature DECODER.MASK.DETAIL_FEATURE.

    Args:
        inst_branch: instance branch.
        mask_branch: mask branch, of the same kernel dimension.
        scale_factor: mask grid over decoder grid.
    """

    takes_detail = True
    ranks_instances = True

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec, detail_shape: ShapeSpec | None = None) -> dict:
        decoder = cfg.MODEL.SPARSE_INST.DECODER
        if detail_shape is not None and detail_shape.stride * decoder.SCALE_FACTOR != input_shape.stride:
            raise ValueError(
                f"MODEL.SPARSE_INST.DECODER.MASK.DETAIL_FEATURE {decoder.MASK.DETAIL_FEATURE} has stride "
                f"{detail_shape.stride}; the masks have {input_shape.stride / decoder.SCALE_FACTOR:g}, the stride of "
                "ENCODER.IN_FEATURES[0] over DECODER.SCALE_FACTOR"
            )
        if cfg.MODEL.SPARSE_INST.LOSS.NAME == "SparseInstCriterion":
            raise ValueError(
                f"MODEL.SPARSE_INST.LOSS.NAME is SparseInstCriterion with DECODER.NAME {decoder.NAME}; set it to "
                "PlacedCriterion"
            )
        # A backbone of a user may not know its strides.
        levels_of_stride = 1 + int(math.log2(max(COARSEST_STRIDE / (input_shape.stride or 1), 1)))
        levels = {"num_levels": decoder.NUM_LEVELS, "max_levels": levels_of_stride}
        return {
            "inst_branch": PlacedInstanceBranch(**instance_branch_arguments(cfg, input_shape), **levels),
            "mask_branch": SubpixelMaskBranch(
                **mask_branch_arguments(cfg, input_shape),
                upscale=decoder.SCALE_FACTOR,
                detail_channels=0 if detail_shape is None else detail_shape.channels,
            ),
            "scale_factor": decoder.SCALE_FACTOR,
        }

    def forward(
        self, features: torch.Tensor, with_iams: bool = False, detail: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Decode as the base class does; in training return the maps that `training_outputs` reads.

        ``detail`` is the backbone feature that the mask branch takes.
        """
        features = append_coordinates(features)
        mask_features, displacements = self.mask_branch(features, detail)
        levels = self.inst_branch(features)
        if self.training:
            return {"levels": levels, "mask_features": mask_features, "displacements": displacements}
        cells, classes = highest_peaks(levels["heat_logits"], levels["sizes"], self.num_masks)
        outputs, mask_kernels, ellipses = self.inst_branch.predict(**levels, cells=cells)
        is_of_peak = torch.arange(levels["heat_logits"].shape[1], device=classes.device) == classes[..., None]
        outputs["pred_logits"] = torch.where(is_of_peak, outputs["pred_logits"], OTHER_CLASS)
        iam_logits = outputs.pop("pred_iam")
        mask_logits = placed_masks(mask_kernels, ellipses, mask_features, displacements)
        outputs["pred_masks"] = cut_to_windows(mask_logits, ellipses)
        if with_iams:
            grid = LevelCells.of(levels["sizes"], cells.device)
            outputs["pred_iam"] = self._to_mask_grid(on_finest_level(iam_logits, cells, grid, levels["sizes"]))
        return outputs

    def training_outputs(
        self, outputs: dict[str, torch.Tensor], targets: list[InstanceTargets]
    ) -> dict[str, torch.Tensor]:
        """Decode at cells of the ground truth: each instance at its center and at the covered cells next to it.

        Args:
            outputs: what `forward` returned in training.
            targets: ground truth of each image. Of more than N instances in an image the first N get masks and boxes.

        Returns:
            For P cells of all instances of all images, one image after another: ``pred_scores`` (P,); ``boxes`` and
            ``gt_boxes`` (P, 4) float32 x0, y0, x1, y1 in shares of the map; ``pred_masks`` and ``gt_masks`` (P, S, S)
            float32 logits and targets on a grid over the true box, enlarged. ``heat_logits``, ``heat`` and
            ``is_center`` (B, K, T), see `center_heatmap`.
        """
        heat_logits, sizes = (outputs["levels"][name] for name in ("heat_logits", "sizes"))
        heats, cells, boxes = [], [], []
        with no_autocast(heat_logits.device):
            for target in targets:
                gt_masks = target.gt_masks
                # An object that covers no cell by half has a box, too.
                is_inside = gt_masks > 0.5 * gt_masks.flatten(1).amax(1)[:, None, None]
                gt_boxes = masks_to_boxes(is_inside) / map_size(gt_masks)
                # The heat map learns all instances: the others would be its background.
                *heat, of_instances = heatmap_of_levels(
                    gt_masks,
                    target.gt_classes,
                    levels_of(gt_boxes, sizes[0], len(sizes)),
                    sizes,
                    heat_logits.shape[1],
                    NUM_CELLS,
                )
                heats.append(heat)
                cells.append(of_instances[: self.num_masks].flatten())
                boxes.append(gt_boxes[: self.num_masks])
        most = max(map(len, cells))
        padded = torch.stack([F.pad(each, (0, most - len(each))) for each in cells])
        decoded, mask_kernels, ellipses = self.inst_branch.predict(**outputs["levels"], cells=padded)
        pairs = []
        for image, target in enumerate(targets):
            of_image = slice(image, image + 1), slice(len(cells[image]))
            masks = placed_masks(
                mask_kernels[of_image],
                ellipses[of_image],
                outputs["mask_features"][of_image[0]],
                outputs["displacements"][of_image[0]],
                in_training=True,
            )
            with no_autocast(heat_logits.device):
                gt_masks, gt_boxes = target.gt_masks[: self.num_masks], boxes[image]
                windows = enlarged(gt_boxes, map_size(gt_masks))
                gt_crops = crop(gt_masks[None], windows[None])[0]
                gt_boxes, windows, gt_crops = (
                    each.repeat_interleave(NUM_CELLS, dim=0) for each in (gt_boxes, windows, gt_crops)
                )
                center, size = (ellipses[image, of_image[1], part].flip(-1) for part in (slice(2), slice(2, 4)))
                pairs.append(
                    {
                        "pred_scores": decoded["pred_scores"][image, of_image[1], 0],
                        "boxes": torch.cat([center - size / 2, center + size / 2], dim=1),
                        "gt_boxes": gt_boxes,
                        "pred_masks": crop(masks, windows[None])[0],
                        "gt_masks": gt_crops,
                    }
                )
        heat, is_center = (torch.stack(parts) for parts in zip(*heats))
        joined = {name: torch.cat([each[name] for each in pairs]) for name in pairs[0]}
        return {**joined, "heat_logits": heat_logits, "heat": heat, "is_center": is_center}

"""The IAM decoder whose activation maps stand at the peaks of a heat map (not in the paper).

Learned maps must find the objects, and matching tells each map which one: on a few hundred images that takes most of
the training. Here a heat map with a loss on every cell, that of CenterNet (arXiv 1904.07850), finds the centers of the
objects and their classes. Each of its highest peaks places one activation map; in training the center of each object
and the cell next to it do, so nothing is matched. placed_masks.py makes the masks. Letters: sparseinst.structures.
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
    conv_stack,
    instance_branch_arguments,
    mask_branch_arguments,
    normalize_iams,
    pool_instances,
)
from sparseinst.modeling.sparse_inst.placed_masks import (
    SubpixelMaskBranch,
    crop,
    cut_to_windows,
    enlarged,
    map_size,
    placed_masks,
)
from sparseinst.ops.coordinates import append_coordinates, relative_centers
from sparseinst.ops.losses import center_heatmap, masks_on_grid
from sparseinst.ops.masks import masks_to_boxes
from sparseinst.ops.precision import no_autocast
from sparseinst.structures.targets import InstanceTargets

# Standard deviation of the Gaussian of each activation map, in cells.
MAP_RADIUS = 1.5
# Initial factors of 1, v, u, v ** 2, u ** 2, u * v, see `ellipse_forms`: 0 on the ellipse in the box, 2 in its center.
ELLIPSE = (2.0, 0.0, 0.0, -2.0, -2.0, 0.0)
# Logarithm of a box's size over its initial size, in both directions: the quadratic of a smaller box loses digits.
MAX_LOG_SIZE = 4.0
# Cells at which an instance is trained: its center, and those next to it, where its peak may be found, too.
NUM_CELLS = 2
# Subtracted from other cells, so that they rank behind the peaks.
NOT_A_PEAK = 100.0
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
            (B, N, D); the ellipses (B, N, 10) of `ellipse_forms`.
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
            rows, columns = rows_and_columns(cells, height, width)
            centers = torch.stack([y[rows], x[columns]], dim=2)
            # RUNTIME.PRECISION stores the weights in 16 bits.
            boxes = F.linear(vectors.float(), self.box.weight.float(), self.box.bias.float())
            offsets, log_sizes = boxes.split(2, dim=2)
            sizes = self.ellipse_size * log_sizes.clamp(-MAX_LOG_SIZE, MAX_LOG_SIZE).exp()
            return torch.cat([centers + self.ellipse_size * offsets, sizes], dim=2)


@torch.no_grad()
def highest_peaks(heat_logits: torch.Tensor, num_peaks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the N highest peaks of a heat map (B, K, H, W), best first: cells and classes (B, N) int64.

    A peak is not lower than its eight neighbors in the map of its class, so one cell can have peaks of several classes.
    Where there are too few, the highest other values follow, and where the map has fewer than N, its last value again.
    """
    heat_logits = heat_logits.float()
    is_peak = F.max_pool2d(heat_logits, 3, stride=1, padding=1) == heat_logits
    ranked = torch.where(is_peak, heat_logits, heat_logits - NOT_A_PEAK).flatten(1)
    # Padded, so that an exported graph holds for small images, too.
    peaks = F.pad(ranked, (0, num_peaks), value=-torch.inf).topk(num_peaks, dim=1).indices
    num_classes, height, width = heat_logits.shape[1:]
    classes, cells = rows_and_columns(peaks.clamp(max=ranked.shape[1] - 1), num_classes, height * width)
    return cells, classes


def rows_and_columns(cells: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows and the columns of cells (int64, any shape) of a map.

    Looked up: ONNX's exporter has no remainder by a size that is data.
    """
    rows, columns = (torch.arange(size, device=cells.device) for size in (height, width))
    return rows[:, None].expand(-1, width).flatten()[cells], columns.expand(height, -1).flatten()[cells]


def placed_maps(cells: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return logits (B, N, height, width) that fall with the squared distance from each cell; cells (B, N) int64."""
    rows, columns = rows_and_columns(cells, height, width)
    y = torch.arange(height, device=cells.device) - rows[..., None]
    x = torch.arange(width, device=cells.device) - columns[..., None]
    scale = -1 / (2 * MAP_RADIUS**2)
    return scale * y.square()[..., :, None] + scale * x.square()[..., None, :]


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
        return {
            "inst_branch": PlacedInstanceBranch(
                **instance_branch_arguments(cfg, input_shape), ellipse_size=decoder.ELLIPSE_SIZE
            ),
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
        features, heat_logits = self.inst_branch(features)
        if self.training:
            return {
                "inst_features": features,
                "heat_logits": heat_logits,
                "mask_features": mask_features,
                "displacements": displacements,
            }
        cells, classes = highest_peaks(heat_logits, self.num_masks)
        outputs, mask_kernels, ellipses = self.inst_branch.predict(features, heat_logits, cells)
        is_of_peak = torch.arange(heat_logits.shape[1], device=classes.device) == classes[..., None]
        outputs["pred_logits"] = torch.where(is_of_peak, outputs["pred_logits"], OTHER_CLASS)
        iam_logits = outputs.pop("pred_iam")
        mask_logits = placed_masks(mask_kernels, ellipses, mask_features, displacements)
        outputs["pred_masks"] = cut_to_windows(mask_logits, ellipses)
        if with_iams:
            outputs["pred_iam"] = self._to_mask_grid(iam_logits)
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
            ``is_center`` (B, K, H, W), see `center_heatmap`.
        """
        heat_logits = outputs["heat_logits"]
        heats, cells = [], []
        with no_autocast(heat_logits.device):
            for target in targets:
                # The heat map learns all instances: the others would be its background.
                coarse = masks_on_grid(target.gt_masks, tuple(heat_logits.shape[-2:]))
                heat, is_center, nearest = center_heatmap(coarse, target.gt_classes, heat_logits.shape[1], NUM_CELLS)
                heats.append((heat, is_center))
                cells.append(nearest[: self.num_masks].flatten())
        most = max(map(len, cells))
        padded = torch.stack([F.pad(each, (0, most - len(each))) for each in cells])
        decoded, mask_kernels, ellipses = self.inst_branch.predict(outputs["inst_features"], heat_logits, padded)
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
                gt_masks = target.gt_masks[: self.num_masks]
                # An object that covers no cell by half has a box, too.
                is_inside = gt_masks > 0.5 * gt_masks.flatten(1).amax(1)[:, None, None]
                gt_boxes = masks_to_boxes(is_inside) / map_size(gt_masks)
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

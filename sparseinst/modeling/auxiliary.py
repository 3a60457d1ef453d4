"""Parts that families of models share: building a backbone, semantic segmentation, drawing objects for benchmarks."""

import math
from collections.abc import Mapping, Sequence

import torch
from detectron2 import modeling
from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.utils import comm
from torch import nn

from sparseinst.config import registered
from sparseinst.ops.losses import masks_on_grid, sem_seg_loss, semantic_masks
from sparseinst.ops.precision import no_autocast

# Standard deviations of the logarithms of the areas and aspect ratios of drawn objects.
AREA_SPREAD = 1.0
ASPECT_SPREAD = 0.4
# Mask logits are this inside a drawn object and minus this outside; they change sign over about a cell.
MASK_LOGIT = 6.0


def build_backbone(cfg: CfgNode) -> Backbone:
    """Build the backbone named by MODEL.BACKBONE.NAME.

    Raises:
        ValueError: the name is not registered, or Detectron2 refuses the backbone's keys.
        ImportError: it needs Detectron2's compiled operators and they are missing; the message names the replacement.
    """
    registered(BACKBONE_REGISTRY, cfg, "MODEL.BACKBONE.NAME")
    try:
        return modeling.build_backbone(cfg)
    except ImportError as error:
        if "detectron2._C" not in str(error):
            raise
        raise ImportError(
            f"MODEL.RESNETS.DEFORM_ON_PER_STAGE is {cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE}, and MODEL.BACKBONE.NAME "
            f"{cfg.MODEL.BACKBONE.NAME} needs Detectron2's compiled operators, which are missing here. Set "
            "MODEL.BACKBONE.NAME to build_resnet_dcn_backbone: the same ResNet and the same weights, with "
            "torchvision's operator"
        ) from error
    # Detectron2's builders assert what a config must hold, and look names up.
    except (AssertionError, KeyError) as error:
        raise ValueError(
            f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME} cannot be built with these keys: "
            f"{' '.join(str(error).split()) or type(error).__name__}"
        ) from error


class SemSegHead(nn.Module):
    """Predict semantic segmentation by a 1x1 convolution, for an auxiliary loss in training (YOLACT, section 4).

    Args:
        in_channels: of the feature map.
        num_classes: K.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.predictor = nn.Conv2d(in_channels, num_classes, 1)
        nn.init.xavier_uniform_(self.predictor.weight)
        nn.init.zeros_(self.predictor.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) to logits (B, K, H, W)."""
        return self.predictor(features)

    def loss(
        self,
        sem_seg_logits: torch.Tensor,
        targets: Sequence[tuple[torch.Tensor, torch.Tensor]],
        counts: Mapping[str, torch.Tensor] | None,
    ) -> torch.Tensor:
        """Return the loss of one batch, a mean over images, in float32.

        Args:
            sem_seg_logits: (B, K, H, W).
            targets: of each image the objects' masks (M, h, w), bool or in [0, 1], and classes (M,).
            counts: ``num_images`` of the whole step; None: those of this batch.
        """
        _, num_classes, *size = sem_seg_logits.shape
        with no_autocast(sem_seg_logits.device):
            expected = torch.stack(
                [
                    semantic_masks(masks_on_grid(masks.float(), tuple(size)) > 0.5, classes, num_classes)
                    for masks, classes in targets
                ]
            )
            num_images = len(targets) if counts is None else float(counts["num_images"])
            return sem_seg_loss(sem_seg_logits.float(), expected) / num_images


def divisor_sums(
    counts: Mapping[str, torch.Tensor], names: Sequence[str], device: torch.device, is_global: bool
) -> tuple[list[float], int]:
    """Return divisors of losses, and the number of ranks that they were summed over.

    Gradients are averaged over the ranks, so a loss of all ranks is divided by the sum over the number of ranks.

    Args:
        counts: of this process.
        names: of the counts to return, in this order.
        device: where the ranks exchange the numbers.
        is_global: sum over all ranks, which call this together; else 1 rank.
    """
    values = [float(counts[name]) for name in names]
    num_ranks = comm.get_world_size() if is_global else 1
    if num_ranks > 1:
        total = torch.tensor(values, device=device)
        torch.distributed.all_reduce(total)
        values = total.tolist()
    return values, num_ranks


def with_every_parameter(losses: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Return equal losses whose backward pass gives every parameter a gradient, if need be 0.

    DistributedDataParallel waits for all gradients, and a part of a model may have nothing to learn from a batch.
    """
    # Sums of empty slices.
    unused = sum(parameter.flatten()[:0].sum() for parameter in model.parameters() if parameter.requires_grad)
    return {name: loss + unused for name, loss in losses.items()}


def draw_mask_logits(shape: tuple[int, int, int, int], median_area: float) -> torch.Tensor:
    """Return mask logits of ellipses, the same in each call, for `InstanceSegmenter.example_outputs`.

    Args:
        shape: (B, n, Hm, Wm): n objects in each image.
        median_area: median of the objects' areas over the image's area; from 1 on every object fills the image.

    Returns:
        ``shape`` float32, in [-MASK_LOGIT, MASK_LOGIT].
    """
    generator = torch.Generator().manual_seed(0)
    *counts, height, width = shape
    counts = (*counts, 1, 1)
    area = height * width * median_area * (AREA_SPREAD * torch.randn(counts, generator=generator)).exp()
    aspect = (ASPECT_SPREAD * torch.randn(counts, generator=generator)).exp()
    half_y, half_x = (area / math.pi * aspect).sqrt(), (area / math.pi / aspect).sqrt()
    y = torch.arange(height)[:, None] - height * torch.rand(counts, generator=generator)
    x = torch.arange(width) - width * torch.rand(counts, generator=generator)
    # In cells from the outline, positive inside.
    distance = (1 - torch.hypot(y / half_y, x / half_x)) * torch.minimum(half_y, half_x)
    if median_area >= 1:
        distance = torch.ones_like(distance)
    return distance.clamp(-1, 1) * MASK_LOGIT

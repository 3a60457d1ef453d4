"""The masks of a PlacedIAMDecoder (not in the paper): kernel products, and an ellipse in displaced coordinates.

A box with a loss of its own and a quadratic in the box's coordinates give a mask its location and first shape, an
ellipse; the kernel's product with the mask features adds the outline. A product alone cannot separate two touching
objects of one kind, and neither can the ellipse, whose border is smooth. So each pixel also predicts a displacement,
which moves its coordinates toward the center of its own object (as the embeddings of arXiv 1906.11109), and the
quadratic is computed there. Letters: sparseinst.structures.
"""

from typing import Any

import torch
from fvcore.nn.weight_init import c2_msra_fill
from torch import nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from sparseinst.modeling.sparse_inst.decoder import MaskBranch, conv_stack, dynamic_masks
from sparseinst.ops.coordinates import relative_centers
from sparseinst.ops.precision import no_autocast

# Masks are trained on a grid of this many rows and columns over the instance's box, as Mask R-CNN's are: for a small
# object the mean over the image would hide the outline, and for many objects it takes longer. The box is enlarged on
# each side by this share of its size, and by this many cells.
CROP_SIZE = 28
CROP_MARGIN, MIN_CROP_MARGIN = 0.25, 2.0
# Logit of a mask outside of its window.
OUTSIDE = -30.0


class SubpixelMaskBranch(MaskBranch):
    """Compute mask features and displacements on a finer grid than the decoder's (sub-pixel convolution, 1609.05158).

    Args:
        upscale: the finer grid over the decoder's, a whole number.
        kernel_dim: D.
        norm: norm of the 3x3 convolutions, "" for none.
        detail_channels: of a backbone feature on the finer grid that a 3x3 convolution adds; 0: none.
        kwargs: as those of `MaskBranch`.

    Raises:
        ValueError: ``upscale`` is not a whole number.
    """

    def __init__(
        self, *, upscale: float, kernel_dim: int, norm: str = "", detail_channels: int = 0, **kwargs: Any
    ) -> None:
        if upscale != int(upscale):
            raise ValueError(
                f"MODEL.SPARSE_INST.DECODER.SCALE_FACTOR is {upscale}; a PlacedIAMDecoder needs a whole number"
            )
        self.upscale = int(upscale)
        super().__init__(kernel_dim=kernel_dim * self.upscale**2, norm=norm, **kwargs)
        if detail_channels:
            self.detail = nn.Sequential(*conv_stack(kernel_dim + detail_channels, kernel_dim, 1, norm))
            self.detail_projection = nn.Conv2d(kernel_dim, kernel_dim, 1)
            c2_msra_fill(self.detail_projection)
            self.displacement = nn.Conv2d(kernel_dim, 2, 1)
        else:
            self.detail = None
            self.displacement = nn.Conv2d(self.projection.in_channels, 2 * self.upscale**2, 1)
        # A layer of its own, because INT8 would round displacements in steps of the much larger mask features.
        nn.init.zeros_(self.displacement.weight)
        nn.init.zeros_(self.displacement.bias)

    def forward(self, features: torch.Tensor, detail: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mask features (B, D, Hm, Wm), and displacements (B, 2, Hm, Wm) of y and x in shares of the map.

        Args:
            features: (B, 2 + C, H, W) with coordinates first.
            detail: (B, detail_channels, Hm, Wm), where the branch has one.
        """
        features = self.mask_convs(features)
        fine = F.pixel_shuffle(self.projection(features), self.upscale)
        if self.detail is None:
            return fine, F.pixel_shuffle(self.displacement(features), self.upscale)
        fine = self.detail(torch.cat([fine, detail], dim=1))
        return self.detail_projection(fine), self.displacement(fine)


def placed_masks(
    mask_kernels: torch.Tensor,
    ellipses: torch.Tensor,
    mask_features: torch.Tensor,
    displacements: torch.Tensor,
    in_training: bool = False,
) -> torch.Tensor:
    """Return mask logits (B, N, H, W) in float32.

    Args:
        mask_kernels: (B, N, D).
        ellipses: (B, N, 10), see `ellipse_forms`.
        mask_features: (B, D, H, W).
        displacements: (B, 2, H, W) of y and x in shares of the map.
        in_training: multiply the quadratic out, which needs a fifth of the memory for the gradient, but loses digits.
    """
    products = dynamic_masks(mask_kernels, mask_features)
    with no_autocast(displacements.device):
        y, x = (relative_centers(size, displacements.device) for size in displacements.shape[-2:])
        y, x = y[:, None] + displacements[:, 0].float(), x + displacements[:, 1].float()
        logits = (multiplied_out_logits if in_training else ellipse_logits)(ellipses, y, x)
        return products.float() + logits


def ellipse_forms(ellipses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a quadratic in the coordinates of each instance's box as one + v * a + u * b.

    v and u are -1 and 1 at the edges of the box; they, a and b are linear in the position.

    Args:
        ellipses: (B, N, 10) float32: the box (center y, x, height, width in shares of the map), and the factors of 1,
            v, u, v ** 2, u ** 2 and u * v.

    Returns:
        one (B, N); the linear forms v, a, u, b (B, N, 4, 3), as factors of 1, y and x in shares of the map.
    """
    center_y, center_x, height, width, one, v_factor, u_factor, vv, uu, uv = ellipses.unbind(2)
    zero, scale_y, scale_x = torch.zeros_like(one), 2 / height, 2 / width
    v = torch.stack([-scale_y * center_y, scale_y, zero], dim=2)
    u = torch.stack([-scale_x * center_x, zero, scale_x], dim=2)
    constant = torch.tensor([1.0, 0.0, 0.0], device=ellipses.device)
    a = v_factor[..., None] * constant + vv[..., None] * v + uv[..., None] * u
    b = u_factor[..., None] * constant + uu[..., None] * u
    return one, torch.stack([v, a, u, b], dim=2)


def ellipse_logits(ellipses: torch.Tensor, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return mask logits that are quadratic in the coordinates of each instance's box.

    The linear forms lose few digits in 16 bits or TF32, which engines choose by themselves.

    Args:
        ellipses: see `ellipse_forms`.
        y, x: (B, H, W) float32, the position that each pixel stands for, in shares of the map.

    Returns:
        (B, N, H, W) float32.
    """
    one, forms = ellipse_forms(ellipses)
    positions = torch.stack([torch.ones_like(y), y, x], dim=1)
    v, a, u, b = dynamic_masks(forms.flatten(1, 2), positions).unflatten(1, forms.shape[1:3]).unbind(2)
    return one[..., None, None] + v * a + u * b


def multiplied_out_logits(ellipses: torch.Tensor, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return `ellipse_logits` by one product of matrices, bounded by `OUTSIDE`.

    Terms as large as the square of the map over the box are subtracted, so float32 is needed.
    """
    one, forms = ellipse_forms(ellipses)
    v, a, u, b = forms.unbind(2)
    # Factors of all products of two of 1, y and x.
    factors = (v[..., None] * a[..., None, :] + u[..., None] * b[..., None, :]).flatten(2)
    positions = torch.stack([torch.ones_like(y), y, x], dim=1)
    products = (positions[:, :, None] * positions[:, None]).flatten(1, 2)
    return (dynamic_masks(factors, products) + one[..., None, None]).clamp(OUTSIDE, -OUTSIDE)


def cut_to_windows(mask_logits: torch.Tensor, ellipses: torch.Tensor) -> torch.Tensor:
    """Return mask logits (B, N, H, W) that are `OUTSIDE` beyond the instance's box, enlarged as in training.

    Masks are trained in such windows alone.

    Args:
        mask_logits: (B, N, H, W).
        ellipses: (B, N, 10), see `ellipse_forms`.
    """
    centers_and_sizes = (ellipses[..., :2, None], ellipses[..., 2:4, None])
    inside = []
    for axis, size in enumerate(mask_logits.shape[-2:]):
        positions = relative_centers(size, mask_logits.device)
        center, box_size = (part[..., axis, :] for part in centers_and_sizes)
        # The first position lies half a cell from the edge.
        margin = torch.maximum(CROP_MARGIN * box_size, 2 * MIN_CROP_MARGIN * positions[0])
        inside.append((positions - center).abs() <= box_size / 2 + margin)
    return torch.where(inside[0][..., None] & inside[1][..., None, :], mask_logits, OUTSIDE)


def map_size(masks: torch.Tensor) -> torch.Tensor:
    """Return width, height, width, height of maps (..., H, W), for boxes in cells."""
    height, width = masks.shape[-2:]
    return torch.tensor([width, height, width, height], dtype=torch.float32, device=masks.device)


def enlarged(boxes: torch.Tensor, map_size: torch.Tensor) -> torch.Tensor:
    """Enlarge boxes (..., 4) on each side by a quarter of their size, and by two cells at least, inside the map.

    Args:
        boxes: x0, y0, x1, y1 in shares of the map.
        map_size: width, height, width, height in cells.
    """
    size = (boxes[..., 2:] - boxes[..., :2]).repeat_interleave(2, -1)[..., [0, 2, 1, 3]]
    margin = torch.maximum(CROP_MARGIN * size, MIN_CROP_MARGIN / map_size)
    return (boxes + margin * margin.new_tensor([-1.0, -1.0, 1.0, 1.0])).clamp(0, 1)


def crop(masks: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
    """Sample masks on a grid over their windows, bilinearly.

    Args:
        masks: (B, N, H, W) float32.
        windows: (B, N, 4) x0, y0, x1, y1 in shares of the map.

    Returns:
        (B, N, S, S) float32.
    """
    batch, num_masks = masks.shape[:2]
    rois = (windows * map_size(masks)).flatten(0, 1)
    rois = torch.cat([torch.arange(len(rois), dtype=rois.dtype, device=rois.device)[:, None], rois], dim=1)
    # One sample in the middle of each of S x S bins.
    crops = roi_align(masks.flatten(0, 1)[:, None], rois, CROP_SIZE, sampling_ratio=1, aligned=True)
    return crops[:, 0].unflatten(0, (batch, num_masks))

"""3x3 convolutions with a quarter of the multiplications (Lavin and Gray, arXiv 1509.09308).

In the letters of that paper, F(4x4, 3x3): the output is cut into tiles of 4x4 pixels, and each tile needs a window of
6x6 pixels of the input. B transforms the window, G the weights; they are multiplied (36 products for each pair of
channels in place of 16 * 9), and A transforms the products back. The polynomials are evaluated at 0, 3/4, -3/4, 3/2,
-3/2 and infinity, which has a quarter of the float32 rounding error of the paper's 0, 1, -1, 2, -2, and little more
than direct summation.
"""

import math
from collections.abc import Sequence

import numpy
import torch
from detectron2 import layers
from torch import library, nn
from torch.nn import functional as F

TILE = 4
# Side of a tile's window in the input, for a kernel of 3 pixels.
WINDOW = TILE + 2
# Infinity is the sixth point.
_POINTS = (0, 0.75, -0.75, 1.5, -1.5)
# With fewer channels the transforms cost more than the products save.
MIN_CHANNELS = 128
# With fewer tiles reading the transformed weights costs more than the products save.
MIN_TILES = 24
# Bytes of transformed windows, or products, that are worked on at once: with less, the weights are read too often; with
# more, the shared cache does not hold them.
CHUNK_BYTES = 16 * 2**20


class WinogradConv2d(nn.Module):
    """Compute what a convolution computes with fewer multiplications, on the CPU in float32, channels last.

    Args:
        conv: accepted by :func:`can_be_winograd`; computes images of few tiles.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        kernel, window, tile = transform_matrices()
        weight = torch.einsum("ai,ocij,bj->abco", kernel, conv.weight.detach().double(), kernel)
        dtype = conv.weight.dtype
        self.register_buffer("weight", weight.flatten(0, 1).to(dtype).contiguous(), persistent=False)
        bias = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()
        self.register_buffer("bias", bias, persistent=False)
        # Both directions at once: (36, 36) for windows, (16, 36) from products to tiles.
        self.register_buffer("transform", torch.kron(window, window).to(dtype), persistent=False)
        self.register_buffer("transform_back", torch.kron(tile, tile).to(dtype), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve (B, C, H, W) to (B, O, H, W), in channels-last layout."""
        arguments = (x, self.weight, self.bias, self.transform, self.transform_back)
        if torch.jit.is_tracing():
            # A trace records neither loops nor branches.
            return winograd_convolution(*arguments, chunk_bytes=None)
        batch, _, height, width = x.shape
        # A compiled program would be compiled again for each side of this comparison.
        if not torch.compiler.is_compiling() and batch * -(-height // TILE) * -(-width // TILE) < MIN_TILES:
            return self.conv(x)
        # The compiler would take minutes for the loop and gain little.
        convolve = _opaque_convolution if torch.compiler.is_compiling() else winograd_convolution
        return convolve(*arguments)


def winograd_convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    transform: torch.Tensor,
    transform_back: torch.Tensor,
    chunk_bytes: int | None = CHUNK_BYTES,
) -> torch.Tensor:
    """Compute the convolution of :class:`WinogradConv2d` in five operators for a few rows of tiles.

    Each transform is one matrix product. Sums of pixels have fewer operations, but take dozens of operators, and at the
    end of each one the threads wait for the last one: beside other programs they made a convolution twice as slow.

    Args:
        x: (B, C, H, W).
        weight: (36, C, O), transformed.
        bias: (O,).
        transform: (36, 36), of a window.
        transform_back: (16, 36), from products to a tile.
        chunk_bytes: of windows, or products, that are worked on at once; None: all, as an engine's graph needs it.

    Returns:
        (B, O, H, W), dense, channels last.
    """
    batch, channels, height, width = x.shape
    rows, columns = (height + TILE - 1) // TILE, (width + TILE - 1) // TILE
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, TILE * columns + 1 - width, 1, TILE * rows + 1 - height))

    def convolve(strip: torch.Tensor) -> torch.Tensor:
        # Windows (B, rows, columns, C, 6, 6) to tiles (B, rows, 4, columns, 4, O).
        windows = strip.unfold(1, WINDOW, TILE).unfold(2, WINDOW, TILE)
        windows = windows.permute(4, 5, 0, 1, 2, 3).reshape(WINDOW**2, -1)
        products = torch.bmm((transform @ windows).reshape(WINDOW**2, -1, channels), weight)
        tiles = transform_back @ products.reshape(WINDOW**2, -1)
        return tiles.reshape(TILE, TILE, batch, -1, columns, weight.shape[-1]).permute(2, 3, 0, 4, 1, 5)

    if chunk_bytes is None:
        output = convolve(padded) + bias
    else:
        output = x.new_empty(batch, rows, TILE, columns, TILE, len(bias))
        row_bytes = len(weight) * batch * columns * max(weight.shape[1:]) * x.element_size()
        step = -(-rows // -(-rows * row_bytes // chunk_bytes))
        for first in range(0, rows, step):
            strip = padded[:, TILE * first : TILE * (first + step) + 2]
            torch.add(convolve(strip), bias, out=output[:, first : first + step])
    output = output.reshape(batch, TILE * rows, TILE * columns, -1)[:, :height, :width]
    return output.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def transform_matrices() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return G, B and A of one direction, float64: (6, 3) for kernels, (6, 6) for windows, (4, 6) to tiles."""
    kernel, window, tile = (torch.zeros(shape, dtype=torch.float64) for shape in ((6, 3), (6, 6), (4, 6)))
    for index, point in enumerate(_POINTS):
        others = [other for other in _POINTS if other != point]
        powers = torch.tensor([float(point) ** exponent for exponent in range(TILE)], dtype=torch.float64)
        kernel[index] = powers[:3] / math.prod(point - other for other in others)
        window[index, :-1] = _polynomial(others)
        tile[:, index] = powers
    kernel[-1, -1] = tile[-1, -1] = 1
    window[-1] = _polynomial(_POINTS)
    return kernel, window, tile


def _polynomial(roots: Sequence[float]) -> torch.Tensor:
    """Return the coefficients of the product of (x - root), the constant first, float64."""
    return torch.from_numpy(numpy.polynomial.polynomial.polyfromroots(roots))


_opaque_convolution = library.custom_op(
    "sparseinst::winograd_convolution", winograd_convolution, mutates_args=(), device_types="cpu"
)


@_opaque_convolution.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, *_: object) -> torch.Tensor:
    shape = (x.shape[0], weight.shape[-1], *x.shape[-2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def can_be_winograd(module: nn.Module) -> bool:
    """Return whether a module is a 3x3 convolution that takes less time as a WinogradConv2d."""
    return (
        type(module) in (nn.Conv2d, layers.Conv2d)
        and getattr(module, "norm", None) is None
        and getattr(module, "activation", None) is None
        and module.kernel_size == (3, 3)
        and module.padding == (1, 1)
        and module.padding_mode == "zeros"
        and module.stride == module.dilation == (1, 1)
        and module.groups == 1
        and min(module.in_channels, module.out_channels) >= MIN_CHANNELS
    )


def use_winograd(module: nn.Module) -> int:
    """Replace the convolutions inside a module that `can_be_winograd` accepts, in place; return their number."""
    count = 0
    for parent in list(module.modules()):
        if isinstance(parent, WinogradConv2d):
            continue
        for name, child in parent.named_children():
            if can_be_winograd(child):
                setattr(parent, name, WinogradConv2d(child))
                count += 1
    return count

"""3x3 convolutions with a quarter of the multiplications (Lavin and Gray, arXiv 1509.09308).

In the letters of that paper, F(4x4, 3x3): the output is cut into tiles of 4x4 pixels, and each tile needs a window of
6x6 pixels of the input. B transforms the window, G the weights; they are multiplied (36 products for each pair of
channels in place of 16 * 9), and A transforms the products back. The polynomials are evaluated at 0, 3/4, -3/4, 3/2,
-3/2 and infinity, which has a quarter of the float32 rounding error of the paper's 0, 1, -1, 2, -2, and little more
than direct summation.
"""

from collections.abc import Sequence

import torch
from detectron2 import layers
from torch import library, nn
from torch.nn import functional as F

TILE = 4
# Side of a tile's window in the input, for a kernel of 3 pixels.
_WINDOW = TILE + 2
# The points are 0, +-_P, +-2 _P and infinity.
_P = 0.75
_P2, _Q, _Q2 = _P**2, 2 * _P, (2 * _P) ** 2
# A row for each point: 1, the point and its square, over the product of the distances to the other points.
_G = tuple(
    (1 / distances, point / distances, point**2 / distances)
    for point, distances in (
        (0, _P2 * _Q2),
        (_P, 2 * _P2 * (_P2 - _Q2)),
        (-_P, 2 * _P2 * (_P2 - _Q2)),
        (_Q, 2 * _Q2 * (_Q2 - _P2)),
        (-_Q, 2 * _Q2 * (_Q2 - _P2)),
    )
) + ((0, 0, 1 / _P**3),)
# With fewer channels the transforms cost more than the products save.
MIN_CHANNELS = 128
# With fewer tiles reading the transformed weights costs more than the products save.
MIN_TILES = 24
# Bytes of transformed windows, or products, that are worked on at once: with less, the weights are read too often; with
# more, the shared cache does not hold them.
_CHUNK_BYTES = 16 * 2**20


class WinogradConv2d(nn.Module):
    """Compute what a convolution computes with fewer multiplications, on the CPU in float32, channels last.

    Args:
        conv: accepted by :func:`can_be_winograd`; computes images of few tiles.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        g = torch.tensor(_G, dtype=torch.float64)
        weight = torch.einsum("ai,ocij,bj->abco", g, conv.weight.detach().double(), g)
        self.register_buffer("weight", weight.flatten(0, 1).to(conv.weight.dtype).contiguous(), persistent=False)
        bias = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()
        self.register_buffer("bias", bias, persistent=False)
        scale = _P ** torch.arange(TILE)
        self.register_buffer("pixel_scale", scale[:, None, None, None] * scale[:, None], persistent=False)
        self.matrices = [matrix.to(self.weight.dtype) for matrix in transform_matrices()]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve (B, C, H, W) to (B, O, H, W), in channels-last layout."""
        if torch.jit.is_tracing():
            # A trace records neither loops nor branches.
            return winograd_convolution_of_products(x, self.weight, self.bias, *self.matrices)
        batch, _, height, width = x.shape
        # A compiled program would be compiled again for each side of this comparison.
        if not torch.compiler.is_compiling() and batch * -(-height // TILE) * -(-width // TILE) < MIN_TILES:
            return self.conv(x)
        # The compiler would take minutes for the loop and gain little.
        convolve = _opaque_convolution if torch.compiler.is_compiling() else winograd_convolution
        return convolve(x, self.weight, self.bias, self.pixel_scale)


def winograd_convolution(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, pixel_scale: torch.Tensor
) -> torch.Tensor:
    """Compute the convolution of :class:`WinogradConv2d`, a few rows of tiles at a time.

    Args:
        x: (B, C, H, W).
        weight: (36, C, O), transformed.
        bias: (O,).
        pixel_scale: (4, 1, 4, 1), the remaining factor of each pixel of a tile.

    Returns:
        (B, O, H, W), dense, channels last.
    """
    batch, channels, height, width = x.shape
    rows, columns = -(-height // TILE), -(-width // TILE)
    padded = F.pad(x, (1, TILE * columns + 1 - width, 1, TILE * rows + 1 - height)).permute(0, 2, 3, 1)
    num_outputs = weight.shape[-1]
    output = x.new_empty(batch, rows, TILE, columns, TILE, num_outputs)
    row_bytes = len(weight) * batch * columns * max(channels, num_outputs) * x.element_size()
    num_chunks = -(-rows * row_bytes // _CHUNK_BYTES)
    step = -(-rows // num_chunks)
    for first in range(0, rows, step):
        chunk = output[:, first : first + step]
        strip = padded[:, TILE * first : TILE * (first + chunk.shape[1]) + 2]
        windows = _transform_windows(strip, chunk.shape[1], columns)
        products = torch.bmm(windows.view(_WINDOW**2, -1, channels), weight)
        products = products.view(*windows.shape[:-1], num_outputs)
        # First the tile's rows, then its columns.
        half = products.new_empty(TILE, *products.shape[1:])
        _transform_back(half, products)
        _transform_back(chunk.permute(4, 2, 0, 1, 3, 5), half.transpose(0, 1))
    torch.addcmul(bias, output, pixel_scale, out=output)
    output = output.view(batch, TILE * rows, TILE * columns, num_outputs)[:, :height, :width]
    return output.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def winograd_convolution_of_products(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    transform: torch.Tensor,
    transform_back: torch.Tensor,
) -> torch.Tensor:
    """Compute the same in a dozen operators, for an engine's graph: all windows at once, each transform one product.

    `winograd_convolution` sums less, in more operators.

    Args:
        x, weight, bias: see `winograd_convolution`.
        transform, transform_back: returned by :func:`transform_matrices`.

    Returns:
        (B, O, H, W).
    """
    batch, channels, height, width = x.shape
    rows, columns = (height + TILE - 1) // TILE, (width + TILE - 1) // TILE
    padded_height, padded_width = TILE * rows + 2, TILE * columns + 2
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, padded_width - 1 - width, 1, padded_height - 1 - height))
    # Index of each pixel of each window: (6, 6, B, rows, columns).
    pixels = torch.arange(_WINDOW, device=x.device)
    pixel_rows = TILE * torch.arange(rows, device=x.device) + pixels[:, None]
    pixel_columns = TILE * torch.arange(columns, device=x.device) + pixels[:, None]
    images = padded_height * padded_width * torch.arange(batch, device=x.device)
    cells = images[:, None, None] + padded_width * pixel_rows[:, None, None, :, None] + pixel_columns[:, None, None, :]
    windows = padded.reshape(-1, channels).index_select(0, cells.flatten())

    windows = torch.matmul(transform, windows.reshape(_WINDOW**2, -1)).reshape(_WINDOW**2, -1, channels)
    products = torch.matmul(windows, weight).reshape(_WINDOW**2, -1)
    tiles = torch.matmul(transform_back, products).reshape(TILE, TILE, batch, rows, columns, -1)
    output = tiles.permute(2, 3, 0, 4, 1, 5).reshape(batch, TILE * rows, TILE * columns, -1)
    return (output[:, :height, :width] + bias).permute(0, 3, 1, 2)


def transform_matrices() -> tuple[torch.Tensor, torch.Tensor]:
    """Return B and A for both directions at once, float64: (36, 36) for windows, (16, 36) from products to tiles."""
    window = torch.eye(_WINDOW, dtype=torch.float64)
    transform, transform_back = torch.empty_like(window), window.new_empty(TILE, _WINDOW)
    _transform(transform, window)
    _transform_back(transform_back, window)
    transform_back *= (_P ** torch.arange(TILE, dtype=torch.float64))[:, None]
    return torch.kron(transform, transform), torch.kron(transform_back, transform_back)


_opaque_convolution = library.custom_op(
    "sparseinst::winograd_convolution", winograd_convolution, mutates_args=(), device_types="cpu"
)


@_opaque_convolution.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, pixel_scale: torch.Tensor) -> torch.Tensor:
    shape = (x.shape[0], weight.shape[-1], *x.shape[-2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _transform_windows(strip: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Transform padded pixels (B, 4 * rows + 2, 4 * columns + 2, C) to windows (6, 6, B, rows, columns, C)."""
    batch, _, width, channels = strip.shape
    half = strip.new_empty(_WINDOW, batch, rows, width, channels)
    _transform(half, [strip[:, i : i + TILE * (rows - 1) + 1 : TILE] for i in range(_WINDOW)])
    windows = strip.new_empty(_WINDOW, _WINDOW, batch, rows, columns, channels)
    lines = [half[:, :, :, i : i + TILE * (columns - 1) + 1 : TILE] for i in range(_WINDOW)]
    _transform(windows.transpose(0, 1), lines)
    return windows


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


def _transform(out: torch.Tensor, x: Sequence[torch.Tensor]) -> None:
    """Apply B to six pixels in a line; write six numbers along the first axis of ``out``."""
    even, odd = torch.sub(x[4], x[2], alpha=_Q2), torch.sub(x[3], x[1], alpha=_Q2)
    torch.add(even, odd, alpha=_P, out=out[1])
    torch.sub(even, odd, alpha=_P, out=out[2])
    # x4 - (P2 + Q2) x2 + P2 Q2 x0, and the same one pixel further, from these differences.
    torch.sub(x[2], x[0], alpha=_Q2, out=out[0])
    torch.sub(even, out[0], alpha=_P2, out=out[0])
    torch.sub(x[5], x[3], alpha=_Q2, out=out[5])
    out[5].sub_(odd, alpha=_P2)
    torch.sub(x[4], x[2], alpha=_P2, out=even)
    torch.sub(x[3], x[1], alpha=_P2, out=odd)
    torch.add(even, odd, alpha=_Q, out=out[3])
    torch.sub(even, odd, alpha=_Q, out=out[4])


def _transform_back(out: torch.Tensor, x: Sequence[torch.Tensor]) -> None:
    """Apply A to six numbers; write four pixels of a tile in a line, pixel i over P^i, along axis 0 of ``out``."""
    near, far = x[1] + x[2], x[3] + x[4]
    torch.add(x[0], near, out=out[0])
    out[0].add_(far)
    torch.add(near, far, alpha=4, out=out[2])
    torch.sub(x[1], x[2], out=near)
    torch.sub(x[3], x[4], out=far)
    torch.add(near, far, alpha=2, out=out[1])
    torch.add(near, far, alpha=8, out=out[3])
    out[3].add_(x[5])

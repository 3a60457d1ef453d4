"""What a model costs: parameters, multiply-adds and activations, part by part."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torchvision  # noqa: F401  registers torch.ops.torchvision
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling import build_model
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sparseinst.modeling.sparse_inst import SparseInst

# Height and width of COCO's most frequent photograph.
PHOTOGRAPH_SIZE = (480, 640)

# Operators that count as zero without a word, besides those that work element by element.
FREE_OPERATORS = frozenset(
    """
    alias as_strided cat clone constant_pad_nd copy detach expand flip gather index index_select lift_fresh
    masked_fill permute pixel_shuffle pixel_unshuffle reflection_pad2d repeat roll select slice split split_with_sizes
    squeeze stack t transpose unbind unfold unsqueeze view _reshape_alias _to_copy _unsafe_index _unsafe_view
    arange empty empty_like fill full full_like linspace new_empty new_full new_ones new_zeros ones ones_like
    scalar_tensor zero zeros zeros_like
    all amax amin any argmax argmin cumsum linalg_vector_norm max mean min sum var var_mean
    floor_divide glu hardsigmoid hardswish hardtanh leaky_relu prelu _prelu_kernel _log_softmax _safe_softmax _softmax
    cudnn_batch_norm native_batch_norm native_group_norm native_layer_norm
    _native_batch_norm_legit _native_batch_norm_legit_no_training
    adaptive_max_pool2d avg_pool2d max_pool2d_with_indices upsample_nearest2d _adaptive_avg_pool2d
    """.split()
)
BRANCH_NAMES = {"inst_branch": "instance branch", "mask_branch": "mask branch"}


class Cost(NamedTuple):
    """What a model or a part of it costs for one image.

    Attributes:
        parameters: elements of ``module.parameters()``: what can be trained, frozen or not.
        multiply_adds: half the floating-point operations.
        activations: elements of what convolutions, linear layers and matrix products return.
    """

    parameters: int
    multiply_adds: int
    activations: int


class Analysis(NamedTuple):
    """A model's cost for one image.

    Attributes:
        size: height and width of the padded image, pixels.
        parts: cost by part; no part is in another. "mask product" is what the decoder computes outside its branches.
        total: their sum.
        uncounted: operators that ran, are not known to be free, and count as zero.
    """

    size: tuple[int, int]
    parts: dict[str, Cost]
    total: Cost
    uncounted: tuple[str, ...]


class _Network(nn.Module):
    """Has the parts of a model run below one root, by whose name the counters know them."""

    def __init__(self, model: SparseInst) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.model.network(images)


class _RecordingRegistry(dict):
    """Formulas by operator, which remembers the operators that it was asked for in vain."""

    def __init__(self, formulas: dict) -> None:
        super().__init__(formulas)
        self.missed: set[str] = set()

    def __contains__(self, operator: object) -> bool:
        found = super().__contains__(operator)
        # Looked for are an operator's overloads, and where it cannot be decomposed the operator itself.
        if not found and hasattr(operator, "overloads") and not _is_free(operator):
            self.missed.add(str(operator))
        return found


def _is_free(operator) -> bool:
    # In place or not.
    if str(operator).removeprefix("aten.").removesuffix("_") in FREE_OPERATORS:
        return True
    return any(torch.Tag.pointwise in getattr(operator, overload).tags for overload in operator.overloads())


def _elements(*_, out_shape, **__) -> int:
    return out_shape.numel()


def _deform_conv_flops(_, weight_shape, *__, out_shape, **___) -> int:
    # The products alone, as for a convolution: not the sampling of the input, not the mask.
    return 2 * out_shape.numel() * weight_shape[1:].numel()


def _vector_product_flops(first_shape, *_, **__) -> int:
    return 2 * first_shape.numel()


# What PyTorch's own counter takes for zero. Four products for each element that is resized bilinearly: with them the
# sums are those that were published for the models of the paper.
_BILINEAR = torch.ops.aten.upsample_bilinear2d
_FORMULAS = {
    torch.ops.torchvision.deform_conv2d: _deform_conv_flops,
    torch.ops.aten.mv: _vector_product_flops,
    torch.ops.aten.dot: _vector_product_flops,
    _BILINEAR: lambda *_, out_shape, **__: 8 * out_shape.numel(),
}


def analyze(model: SparseInst, size: Sequence[int]) -> Analysis:
    """Run a model's network on one random image and count what it costs.

    Multiply-adds are those of convolutions (deformable ones too), linear layers, matrix products, attention, which is
    two matrix products, and bilinear resizing. A convolution's bias, norms, activation functions and pooling are free,
    and so is what stands before and after the network. Parameters are those of ``model.parameters()``, so that a frozen
    batch norm, which has buffers only, has none: this is the reading in which the R50 G-IAM model has the 32.79 M
    parameters that were published for it (with the four buffers of each norm it would be 32.90 M).

    Args:
        model: in eval mode; the image is run through it, on its device.
        size: height and width of the image, pixels; it is padded as the model pads images.

    Raises:
        ValueError: the model is of another meta-architecture, or in training mode, or the size is not positive.
    """
    if not isinstance(model, SparseInst):
        raise ValueError(f"The model is a {type(model).__name__}; MODEL.META_ARCHITECTURE must be SparseInst")
    if model.training:
        raise ValueError("The model is in training mode, in which norms would learn from the random image: call eval()")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"The size is {tuple(size)}; it must be a height and a width of at least 1 pixel each")
    image = 255 * torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    flops = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    registry = flops.flop_registry = _RecordingRegistry(flops.flop_registry)
    products = registry.keys() - {_BILINEAR}
    activations = FlopCounterMode(display=False, custom_mapping=dict.fromkeys(products, _elements))
    with torch.no_grad():
        images = model.preprocess_image([{"image": image}]).tensor
        # The fused kernels of attention are operators of their own on each device; the plain one is matrix products.
        with sdpa_kernel(SDPBackend.MATH), flops, activations:
            _Network(model)(images)

    flops_by_module, activations_by_module = flops.get_flop_counts(), activations.get_flop_counts()

    def cost(name: str = "") -> Cost:
        key = f"{_Network.__name__}.model.{name}" if name else "Global"
        return Cost(
            sum(parameter.numel() for parameter in model.get_submodule(name).parameters()),
            sum(flops_by_module.get(key, {}).values()) // 2,
            sum(activations_by_module.get(key, {}).values()),
        )

    total = cost()
    names = [name for name, _ in model.decoder.named_children()]
    branches = {f"decoder: {BRANCH_NAMES.get(name, name)}": cost(f"decoder.{name}") for name in names}
    parts = {"backbone": cost("backbone"), "encoder": cost("encoder"), **branches}
    parts["decoder: mask product"] = _difference(cost("decoder"), branches.values())
    other = _difference(total, parts.values())
    if any(other):
        parts["other"] = other
    return Analysis(tuple(images.shape[-2:]), parts, total, tuple(sorted(registry.missed)))


def _difference(whole: Cost, parts: Iterable[Cost]) -> Cost:
    return Cost(*(value - sum(values) for value, *values in zip(whole, *parts)))


def analyze_config(cfg: CfgNode, size: Sequence[int] | None = None) -> Analysis:
    """:func:`analyze` a config's model, built on the CPU with random weights; MODEL.WEIGHTS and DEVICE are not read.

    Args:
        cfg: of a SparseInst; not changed.
        size: height and width of the image, pixels. None: what INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST make of COCO's
            most frequent photograph, 480 x 640.

    Raises:
        ValueError: as :func:`analyze`, and what building the model raises.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    if size is None:
        size = PHOTOGRAPH_SIZE
        if cfg.INPUT.MIN_SIZE_TEST:
            size = ResizeShortestEdge.get_output_shape(*size, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    return analyze(build_model(cfg).eval(), size)

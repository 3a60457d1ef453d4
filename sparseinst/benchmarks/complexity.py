"""Count parameters, multiply-adds and activations of a model with fvcore."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis, parameter_count
from fvcore.nn.jit_handles import generic_activation_jit, get_shape

from sparseinst.benchmarks.settings import check_segmenter
from sparseinst.data.augmentations import photograph_input
from sparseinst.modeling.meta_arch import InstanceSegmenter
from sparseinst.ops.pooling import AdaptiveAveragePool
from sparseinst.runtime.export import ExportableNetwork

# fvcore counts these; the published figures do not, because norms are folded into convolutions.
FREE = ("batch_norm", "group_norm", "instance_norm", "layer_norm", "adaptive_avg_pool2d")


class Cost(NamedTuple):
    """The cost of a model, or of a part of it, for one image.

    Attributes:
        parameters: elements of ``module.parameters()``, frozen ones included, without buffers.
        multiply_adds: half the floating-point operations.
        activations: elements of the outputs of convolutions, linear layers and matrix products.
    """

    parameters: int
    multiply_adds: int
    activations: int


class Complexity(NamedTuple):
    """The cost of a model for one image.

    Attributes:
        size: height and width of the padded image, pixels.
        modules: cost by module name, down to the second level; a module includes the modules below it, "" is the whole.
        uncounted: operators that ran and count as zero multiply-adds.
    """

    size: tuple[int, int]
    modules: dict[str, Cost]
    uncounted: tuple[str, ...]


def _count_deform_conv(inputs: list, outputs: list) -> int:
    """Count the products of a deformable convolution, as for a convolution; sampling and mask are free."""
    return math.prod(get_shape(outputs[0])) * math.prod(get_shape(inputs[1])[1:])


def _count_matmul(inputs: list, outputs: list) -> int:
    """Count the products of a matrix product; fvcore's own handle fails for vectors."""
    return math.prod(get_shape(outputs[0])) * get_shape(inputs[0])[-1]


def _count_attention(inputs: list, outputs: list) -> int:
    """Count the two matrix products of scaled dot-product attention."""
    query, key, value = map(get_shape, inputs[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _attention_activations(inputs: list, outputs: list) -> int:
    """Count the attention weights and the output."""
    query, key, value = map(get_shape, inputs[:3])
    return math.prod(query[:-1]) * (key[-2] + value[-1])


def analyze(model: InstanceSegmenter, size: Sequence[int]) -> Complexity:
    """Run a model's network on one random image and count its cost with fvcore.

    Bilinear resizing counts four multiply-adds for each output element; norms, biases, activation functions and pooling
    count zero. With these rules the models of the paper have the published figures.

    Args:
        model: in eval mode.
        size: height and width of the image, pixels; the model pads it.

    Raises:
        ValueError: the model is not an InstanceSegmenter or is in training mode, or the size is not positive.
    """
    check_segmenter(model)
    if model.training:
        raise ValueError("The model is in training mode, where norms learn from the random image: call eval()")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"The size is {tuple(size)}; it must be a height and a width of at least 1 pixel each")
    image = 255 * torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    network = ExportableNetwork(model)
    with torch.no_grad():
        images = model.preprocess([{"image": image}]).tensor
        flops, activations = FlopCountAnalysis(network, images), ActivationCountAnalysis(network, images)
        deform_conv, attention = "torchvision::deform_conv2d", "aten::scaled_dot_product_attention"
        flops.set_op_handle(deform_conv, _count_deform_conv, attention, _count_attention, "aten::matmul", _count_matmul)
        flops.set_op_handle(**{f"aten::{name}": lambda *_: 0 for name in FREE})
        activations.set_op_handle(deform_conv, generic_activation_jit(), attention, _attention_activations)
        for analysis in (flops, activations):
            analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        names = ["model", *(f"model.{name}" for name, _ in model.named_modules() if name and name.count(".") < 2)]
        parameters = parameter_count(network)
        # Pooling is free, also where it is a product.
        poolings = [f"model.{name}" for name, part in model.named_modules() if isinstance(part, AdaptiveAveragePool)]
        costs = {
            name: Cost(
                parameters[name],
                int(flops.total(name) - sum(flops.total(part) for part in poolings if part.startswith(f"{name}."))),
                int(activations.total(name)),
            )
            for name in names
        }
    modules = {name[len("model.") :]: cost for name, cost in costs.items() if any(cost)}
    return Complexity(tuple(images.shape[-2:]), modules, tuple(sorted(flops.unsupported_ops())))


def analyze_config(cfg: CfgNode, size: Sequence[int] | None = None) -> Complexity:
    """Call `analyze` for the model of a config, on the CPU with random weights; MODEL.WEIGHTS is not read.

    Args:
        cfg: not changed.
        size: height and width of the image, pixels. None: a photograph of 480 x 640, resized by INPUT.MIN_SIZE_TEST and
            MAX_SIZE_TEST.

    Raises:
        ValueError: as `analyze`; building the model can raise others.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    if size is None:
        size = photograph_input(cfg)["image"].shape[-2:]
    return analyze(build_model(cfg).eval(), size)

"""Fold batch norms that no longer learn into the convolutions before them."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils import fuse_conv_bn_weights

# Tensors of a batch norm. The frozen norms of Detectron2 and timm have no base class in common with nn.BatchNorm2d.
_STATISTICS = ("running_mean", "running_var")


def fold_norms(module: nn.Module, run: Callable[[], object]) -> int:
    """Fold each batch norm into the convolution whose output it reads, in place.

    Args:
        module: in eval mode.
        run: runs the module once, to find which convolution feeds which norm.

    Returns:
        The number of folded norms. A norm that reads something else stays, and so does the norm of a convolution whose
        output several modules read.
    """
    # Detectron2's convolutions hold their norm.
    count = 0
    for conv in module.modules():
        norm = getattr(conv, "norm", None)
        if _is_conv(conv) and _is_norm(norm):
            _fold(conv, norm)
            conv.norm = None
            count += 1

    producers: dict[int, nn.Module] = {}
    consumers: dict[nn.Module, list[nn.Module]] = {}
    # Outputs stay referenced, so that no other tensor gets the same id.
    alive: list[torch.Tensor] = []

    def note_input(consumer: nn.Module, inputs: tuple) -> None:
        for value in inputs:
            if isinstance(value, torch.Tensor) and id(value) in producers:
                consumers[producers[id(value)]].append(consumer)

    def note_output(conv: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        producers[id(output)] = conv
        consumers.setdefault(conv, [])
        alive.append(output)

    leaves = [part for part in module.modules() if not any(part.children()) or _is_norm(part)]
    handles = [part.register_forward_pre_hook(note_input) for part in leaves]
    handles += [part.register_forward_hook(note_output) for part in module.modules() if _is_conv(part)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    for conv, users in consumers.items():
        if len(users) == 1 and _is_norm(users[0]):
            _fold(conv, users[0])
            _replace(module, users[0], _without_norm(users[0]))
            count += 1
    return count


def _is_norm(module: nn.Module | None) -> bool:
    return all(isinstance(getattr(module, name, None), torch.Tensor) for name in _STATISTICS)


def _is_conv(module: nn.Module) -> bool:
    """Return whether a module is a convolution whose weight has its output channels first, deformable ones too."""
    weight = getattr(module, "weight", None)
    return (
        isinstance(weight, torch.Tensor)
        and weight.dim() == 4
        and len(weight) == getattr(module, "out_channels", None)
        and not isinstance(module, nn.ConvTranspose2d)
    )


def _fold(conv: nn.Module, norm: nn.Module) -> None:
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    conv.requires_grad_(False)


def _without_norm(norm: nn.Module) -> nn.Module:
    """Return the rest of a norm: timm's norms have an activation of their own."""
    rest = [getattr(norm, name) for name in ("drop", "act") if isinstance(getattr(norm, name, None), nn.Module)]
    return nn.Sequential(*rest) if rest else nn.Identity()


def _replace(module: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new)

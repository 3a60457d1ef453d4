"""Define what a table of names holds, and the renamings that tables are written with."""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import nn

# From names of a file, in order, and the model's names, to names of the model; "" for a tensor to leave out.
Renaming = Callable[[list[str], set[str]], list[str]]
State = Mapping[str, torch.Tensor]


def _explain_nothing(_: nn.Module, __: str) -> str:
    return ""


def _adapt_nothing(_: State, __: State) -> dict[str, torch.Tensor | None]:
    return {}


class Recipe(NamedTuple):
    """How the released models of a source were trained; weights are wrong under another setting.

    Attributes:
        image_format: INPUT.FORMAT.
        pixel_mean: MODEL.PIXEL_MEAN.
        pixel_std: MODEL.PIXEL_STD.
        stride_in_1x1: MODEL.RESNETS.STRIDE_IN_1X1, for blocks with 1x1 convolutions.
    """

    image_format: str
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]
    stride_in_1x1: bool


class Source(NamedTuple):
    """Tensor names of one kind of network, as one library writes them.

    Names of SOURCES are relative to the backbone, those of MODELS are of the whole model. A renaming of a whole model
    leaves the part after ``backbone.bottom_up.`` to the source of the backbone.

    Attributes:
        family: the source in words, for reports.
        signs: names that identify the source; a file with all of them is of this source.
        renamings: by the family of the network that the names are translated to.
        explain: returns why the weights do not fit a backbone of a family although names and shapes do; "" where they
            fit.
        adapt: returns tensors to add to the renamed file, or to put in place of its own, given the model's state dict;
            None removes a tensor.
        recipe: of the released models.
    """

    family: str
    signs: frozenset[str]
    renamings: Mapping[str, Renaming] = {}
    explain: Callable[[nn.Module, str], str] = _explain_nothing
    adapt: Callable[[State, State], dict[str, torch.Tensor | None]] = _adapt_nothing
    recipe: Recipe | None = None


class KeyHint(NamedTuple):
    """A config key that gives tensors of a model their shape, or decides whether a model has them.

    Attributes:
        pattern: regular expression, searched in the tensor's name.
        key: of the config, or several in words.
        first_axis: whether the key gives only the size of the first axis.
        is_presence: whether the key decides whether the tensor exists, and not its shape.
    """

    pattern: str
    key: str
    first_axis: bool = False
    is_presence: bool = False


def by_patterns(*patterns: tuple[str, str | Callable[[re.Match], str]]) -> Renaming:
    """Return a renaming that replaces each pattern in each name, in this order."""

    def rename(names: list[str], _: set[str]) -> list[str]:
        for pattern, replacement in patterns:
            names = [re.sub(pattern, replacement, name) for name in names]
        return names

    return rename


def each(rename: Callable[[str], str]) -> Renaming:
    """Return a renaming of names one by one."""
    return lambda names, _: [rename(name) for name in names]


def number(template: str, shift: int) -> Callable[[re.Match], str]:
    """Return a replacement that puts the matched number, shifted, in place of {}."""
    return lambda match: template.format(int(match[1]) + shift)


# Patterns from mmdetection's names of backbone and pyramid, before 1.0 too, to those of Detectron2's FPN.
MMDETECTION_PYRAMID = (
    (r"^backbone\.", "backbone.bottom_up."),
    (r"\.conv2\.conv_offset(_mask)?\.", ".conv2_offset."),
    (r"^neck\.lateral_convs\.(\d)\.conv\.", number("backbone.fpn_lateral{}.", 2)),
    (r"^neck\.fpn_convs\.(\d)\.conv\.", number("backbone.fpn_output{}.", 2)),
)

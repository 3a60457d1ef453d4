"""Define what a table of names holds, and the renamings that tables are written with."""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import nn

# From names of a file, in order, and the model's names, to names of the model.
Renaming = Callable[[list[str], set[str]], list[str]]
State = Mapping[str, torch.Tensor]


def _explain_nothing(_: nn.Module, __: str) -> str:
    return ""


def _add_nothing(_: State, __: State) -> dict[str, torch.Tensor]:
    return {}


class Source(NamedTuple):
    """Tensor names of one kind of network, as one library writes them. Names are relative to the backbone.

    Attributes:
        family: the source in words, for reports.
        signs: names that identify the source; a file with all of them is of this source.
        renamings: by the family of the model that the names are translated to.
        explain: returns why the weights do not fit a backbone of a family although names and shapes do; "" where they
            fit.
        add: returns tensors that the renamed file lacks and that follow from the others, given the model's state dict.
    """

    family: str
    signs: frozenset[str]
    renamings: Mapping[str, Renaming] = {}
    explain: Callable[[nn.Module, str], str] = _explain_nothing
    add: Callable[[State, State], dict[str, torch.Tensor]] = _add_nothing


class KeyHint(NamedTuple):
    """A config key that gives tensors of a model their shape.

    Attributes:
        pattern: regular expression, searched in the tensor's name.
        key: of the config, or several in words.
        first_axis: whether the key gives only the size of the first axis.
    """

    pattern: str
    key: str
    first_axis: bool = False


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

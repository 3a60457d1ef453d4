"""Translate the tensor names of a weights file to those of a model.

Each source of names has a file here with its table: ``SOURCES`` names the networks and their renamings, ``KEY_HINTS``
the config keys behind a model's shapes. A new table joins by its entry in ``_TABLES``.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import nn

from sparseinst.checkpoint.names import detectron2, efficientnet_lite, sparse_inst, timm, torchvision
from sparseinst.checkpoint.names.source import KeyHint, Source

BACKBONE = "backbone."
UNKNOWN = "names of no known family"

_TABLES = (detectron2, timm, torchvision, efficientnet_lite, sparse_inst)
_SOURCES: dict[str, Source] = {
    source.family: source for source in chain.from_iterable(getattr(table, "SOURCES", ()) for table in _TABLES)
}
_KEY_HINTS: tuple[KeyHint, ...] = tuple(chain.from_iterable(getattr(table, "KEY_HINTS", ()) for table in _TABLES))
# With a feature pyramid Detectron2 has the backbone one level deeper.
_BACKBONE_PREFIXES = (BACKBONE + "bottom_up.", BACKBONE)
# Layers of classifiers that backbones do not have.
_CLASSIFIER = re.compile(r"(stem\.fc|_?fc|fc1000|pred|head|head_dist|classifier|last_linear|_?conv_head|_bn1|bn2)[._]")


class Converted(NamedTuple):
    """A file's tensors under the model's names.

    Attributes:
        tensors: the tensors, including those that the model does not have.
        origins: the file's name of each.
        family: source of the file's backbone names.
        target_family: source of the model's backbone names.
    """

    tensors: dict[str, torch.Tensor]
    origins: dict[str, str]
    family: str
    target_family: str


def family_of(names: Iterable[str]) -> str:
    """Return the source of the names of a backbone, or of a model with its backbone under ``backbone.``."""
    names = list(names)
    prefix = _backbone_prefix(names)
    backbone = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    return next((family for family, source in _SOURCES.items() if source.signs <= backbone), UNKNOWN)


def _backbone_prefix(names: Iterable[str]) -> str:
    return next((prefix for prefix in _BACKBONE_PREFIXES if any(name.startswith(prefix) for name in names)), "")


def convert(tensors: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> Converted:
    """Give a file's tensors the names of a model.

    A file with names under ``backbone.`` is a model; any other is a backbone or a classifier. Names stay as they are
    where no table has a renaming.

    Args:
        tensors: of the file.
        target: the model's state dict.
    """
    family, target_family = family_of(tensors), family_of(target)
    source = _SOURCES.get(family, Source(family, frozenset()))
    new_names = {name: name for name in tensors}
    if target_prefix := _backbone_prefix(target):
        prefix = _backbone_prefix(tensors)
        inner = [name for name in tensors if name.startswith(prefix)]
        renamed = [name.removeprefix(prefix) for name in inner]
        if rename := source.renamings.get(target_family):
            renamed = rename(
                renamed, {name.removeprefix(target_prefix) for name in target if name.startswith(target_prefix)}
            )
        new_names.update(zip(inner, (target_prefix + name for name in renamed)))
    converted = {new: tensors[name] for name, new in new_names.items()}
    converted.update(source.add(converted, target))
    return Converted(converted, {new: name for name, new in new_names.items()}, family, target_family)


def is_classifier(name: str) -> bool:
    """Return whether a tensor, by its name in the file, belongs to a classifier behind the backbone."""
    return bool(_CLASSIFIER.match(name))


def explain_mismatch(family: str, backbone: nn.Module, target_family: str) -> str:
    """Return why weights do not fit a backbone although names and shapes may; "" where they fit.

    Args:
        family: of the file.
        backbone: the module that the weights would go to.
        target_family: of the backbone.
    """
    source = _SOURCES.get(family)
    if source is None:
        return ""
    if target_family not in (UNKNOWN, family, *source.renamings):
        return f"its names are of another network, {family}, and the backbone's of {target_family}"
    return source.explain(backbone, target_family)


def likely_key(name: str, found: Sequence[int], expected: Sequence[int]) -> str:
    """Return the config key whose value makes a tensor differ in shape; "" where none is known.

    Args:
        name: of the model's tensor.
        found: its shape in the file.
        expected: its shape in the model.
    """
    if len(found) != len(expected):
        return ""
    hints = (hint for hint in _KEY_HINTS if not hint.first_axis or found[:1] != expected[:1])
    return next((hint.key for hint in hints if re.search(hint.pattern, name)), "")

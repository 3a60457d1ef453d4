"""Translate the tensor names of a weights file to those of a model.

Each source of names has a file here with its table: ``SOURCES`` names backbones and their renamings, ``MODELS`` whole
models, ``KEY_HINTS`` the config keys behind a model's tensors. A new table joins by its entry in ``_TABLES``.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import nn

from sparseinst.checkpoint.names import detectron2, efficientnet_lite, solo, sparse_inst, timm, torchvision, yolact
from sparseinst.checkpoint.names.source import KeyHint, Recipe, Renaming, Source

BACKBONE = "backbone."
UNKNOWN = "names of no known family"

_TABLES = (detectron2, timm, torchvision, efficientnet_lite, sparse_inst, solo, yolact)
_SOURCES: dict[str, Source] = {
    source.family: source for source in chain.from_iterable(getattr(table, "SOURCES", ()) for table in _TABLES)
}
_MODELS: dict[str, Source] = {
    source.family: source for source in chain.from_iterable(getattr(table, "MODELS", ()) for table in _TABLES)
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
        model_family: source of the file's names as a whole model; UNKNOWN for those of a backbone alone.
    """

    tensors: dict[str, torch.Tensor]
    origins: dict[str, str]
    family: str
    target_family: str
    model_family: str = UNKNOWN


def family_of(names: Iterable[str]) -> str:
    """Return the source of the names of a backbone, or of a model with its backbone under ``backbone.``."""
    names = list(names)
    prefix = backbone_prefix(names)
    return _family(_SOURCES, {name.removeprefix(prefix) for name in names if name.startswith(prefix)})


def model_family_of(names: Iterable[str]) -> str:
    """Return the source of the names of a whole model, UNKNOWN where no table has it."""
    return _family(_MODELS, set(names))


def describe_names(names: Iterable[str]) -> str:
    """Return the sources of a file's names in words: of the whole model, and of the backbone."""
    names = list(names)
    return join_families(model_family_of(names), family_of(names))


def join_families(*families: str) -> str:
    """Return the known ones of these families in words, UNKNOWN if none is known."""
    return "; ".join(family for family in families if family != UNKNOWN) or UNKNOWN


def _family(sources: Mapping[str, Source], names: set[str]) -> str:
    return next((family for family, source in sources.items() if source.signs <= names), UNKNOWN)


def backbone_prefix(names: Iterable[str]) -> str:
    """Return the prefix of a model's backbone, without its feature pyramid; "" for the names of a backbone."""
    names = list(names)
    return next((prefix for prefix in _BACKBONE_PREFIXES if any(name.startswith(prefix) for name in names)), "")


def convert(tensors: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> Converted:
    """Give a file's tensors the names of a model.

    A file with names under ``backbone.`` is a model; any other is a backbone or a classifier. Names stay as they are
    where no table has a renaming.

    Args:
        tensors: of the file.
        target: the model's state dict.
    """
    model_family = model_family_of(tensors)
    new_names = {name: name for name in tensors}
    if rename := _renaming(_MODELS, model_family, model_family_of(target)):
        new_names = {name: new for name, new in zip(tensors, rename(list(tensors), set(target))) if new}
    family, target_family = family_of(new_names.values()), family_of(target)
    if target_prefix := backbone_prefix(target):
        prefix = backbone_prefix(new_names.values())
        inner = [name for name, new in new_names.items() if new.startswith(prefix)]
        renamed = [new_names[name].removeprefix(prefix) for name in inner]
        if rename := _renaming(_SOURCES, family, target_family):
            renamed = rename(
                renamed, {name.removeprefix(target_prefix) for name in target if name.startswith(target_prefix)}
            )
        new_names.update(zip(inner, (target_prefix + name for name in renamed)))
    converted = {new: tensors[name] for name, new in new_names.items()}
    origins = {new: name for name, new in new_names.items()}
    for sources, source in ((_MODELS, model_family), (_SOURCES, family)):
        changed = sources[source].adapt(converted, target) if source in sources else {}
        converted.update(changed)
        for name in [name for name, value in changed.items() if value is None]:
            del converted[name], origins[name]
    return Converted(converted, origins, family, target_family, model_family)


def _renaming(sources: Mapping[str, Source], family: str, target_family: str) -> Renaming | None:
    return sources[family].renamings.get(target_family) if family in sources else None


def recipe_of(model_family: str) -> Recipe | None:
    """Return how the released models of a source were trained, None where no table says."""
    return _MODELS[model_family].recipe if model_family in _MODELS else None


def is_classifier(name: str) -> bool:
    """Return whether a tensor, by its name in the file, belongs to a classifier behind the backbone."""
    return bool(_CLASSIFIER.match(name))


def explain_mismatch(family: str, backbone: nn.Module, target_family: str) -> str:
    """Return why weights do not fit a backbone although names and shapes may; "" where they fit.

    Args:
        family: of the file.
        backbone: the module that the weights would go to; with a feature pyramid the backbone in it is meant.
        target_family: of the backbone.
    """
    source = _SOURCES.get(family)
    if source is None:
        return ""
    if target_family not in (UNKNOWN, family, *source.renamings):
        return f"its names are of another network, {family}, and the backbone's of {target_family}"
    return source.explain(getattr(backbone, "bottom_up", backbone), target_family)


def likely_key(name: str, found: Sequence[int], expected: Sequence[int]) -> str:
    """Return the config key whose value makes a tensor differ in shape; "" where none is known.

    Args:
        name: of the model's tensor.
        found: its shape in the file.
        expected: its shape in the model.
    """
    if len(found) != len(expected):
        return ""
    return _hinted(
        name,
        (hint for hint in _KEY_HINTS if not hint.is_presence and (not hint.first_axis or found[:1] != expected[:1])),
    )


def deciding_keys(names: Iterable[str]) -> list[str]:
    """Return the config keys that decide whether a model has these tensors, as far as they are known.

    Args:
        names: of tensors, in names of the model.
    """
    hints = [hint for hint in _KEY_HINTS if hint.is_presence]
    return list(filter(None, dict.fromkeys(_hinted(name, hints) for name in names)))


def _hinted(name: str, hints: Iterable[KeyHint]) -> str:
    return next((hint.key for hint in hints if re.search(hint.pattern, name)), "")

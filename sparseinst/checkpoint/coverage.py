"""Measure how much of a model a weights file fills, and report it."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import nn

from sparseinst.checkpoint.names import (
    BACKBONE,
    UNKNOWN,
    Converted,
    backbone_prefix,
    is_classifier,
    join_families,
    likely_key,
)

NAMES_SHOWN = 3
# A step counter, which no forward pass needs.
_UNCOUNTED = ".num_batches_tracked"
# Buffers of older checkpoints; the values now come from the config.
_OBSOLETE = ("pixel_mean", "pixel_std")
# Predict the offsets of deformable convolutions. Without weights they are zero, so the convolution is ordinary.
_OFFSETS = re.compile(r"[._]offset\.\w+$")


class ShapeMismatch(NamedTuple):
    """A tensor whose shapes in the file and in the model differ."""

    name: str
    found: tuple[int, ...]
    expected: tuple[int, ...]

    def text(self) -> str:
        """Return the name, both shapes and the config key that probably differs."""
        key = likely_key(self.name, self.found, self.expected)
        return f"{self.name} is {self.found} in the file and {self.expected} in the model" + (
            f" ({key})" if key else ""
        )


class Coverage(NamedTuple):
    """The tensors of a model that a weights file fills. Step counters of norms are left out everywhere.

    Attributes:
        source: MODEL.WEIGHTS.
        family: source of the file's names.
        filled: the model's tensors that the file has.
        missing: the model's tensors that the file lacks.
        mismatched: the model's tensors that the file has in another shape; they are missing too.
        left_over: the file's tensors, by its own names, that the model does not take, without ``classifier``.
        classifier: the file's tensors of a classifier behind the backbone.
        extra: ``left_over`` by the names that these tensors would have in the model.
    """

    source: str
    family: str
    filled: list[str]
    missing: list[str]
    mismatched: list[ShapeMismatch]
    left_over: list[str]
    classifier: list[str]
    extra: list[str]

    def of_backbone(self) -> tuple[int, int]:
        """Return how many of the backbone's tensors are filled, and how many it has.

        A feature pyramid and missing offsets do not count: files of pretrained backbones do not have them.
        """
        prefix = backbone_prefix(self.filled + self.missing)
        if not prefix:
            return 0, 0
        filled = sum(name.startswith(prefix) for name in self.filled)
        missing = [name for name in self.missing if name.startswith(prefix)]
        return filled, filled + len(missing) - len(offsets(missing))

    @property
    def backbone_share(self) -> float:
        """Return the share of `of_backbone` that is filled, 0 to 1; 1 for a model without a backbone."""
        filled, total = self.of_backbone()
        return filled / total if total else 1.0

    def text(self) -> str:
        """Return the report, a few lines."""
        filled = Counter(map(_part, self.filled))
        total = filled + Counter(map(_part, self.missing))
        lines = [f"From {self.source} ({self.family}):"]
        lines += [f"  {part}: {count} of {total[part]} tensors" for part, count in filled.items()]
        if untouched := [part for part in total if part not in filled]:
            lines.append(f"  nothing for {', '.join(untouched)}: initial values")
        partly = [name for name in self.missing if _part(name) in filled]
        for what, names in (
            ("not filled", partly),
            ("left over in the file", self.left_over),
            ("left out, the classifier", self.classifier),
        ):
            if names:
                lines.append(f"  {what}: {first_names(names)}")
        return "\n".join(lines)


def measure_coverage(source: str, converted: Converted, target: Mapping[str, torch.Tensor]) -> Coverage:
    """Compare a file's tensors, under the model's names, with the model.

    Args:
        source: MODEL.WEIGHTS.
        converted: the file's tensors.
        target: the model's state dict.
    """
    found = converted.tensors
    counted = [name for name in target if not name.endswith(_UNCOUNTED)]
    filled = [name for name in counted if name in found and found[name].shape == target[name].shape]
    have = set(filled)
    rest = {
        name: converted.origins[name]
        for name in found
        if name not in target and not name.endswith(_UNCOUNTED) and name not in _OBSOLETE and name in converted.origins
    }
    # Models of a known source have no classifier behind the backbone; their heads can have a name like it.
    may_have_classifier = converted.model_family == UNKNOWN
    classifier = [name for name, origin in rest.items() if may_have_classifier and is_classifier(origin)]
    extra = [name for name in rest if name not in classifier]
    return Coverage(
        source=source,
        family=join_families(converted.model_family, converted.family),
        filled=filled,
        missing=[name for name in counted if name not in have],
        mismatched=[
            ShapeMismatch(name, tuple(found[name].shape), tuple(target[name].shape))
            for name in counted
            if name in found and name not in have
        ],
        left_over=[rest[name] for name in extra],
        classifier=[rest[name] for name in classifier],
        extra=extra,
    )


def offsets(names: Iterable[str]) -> list[str]:
    """Return the names that are of offsets of deformable convolutions."""
    return [name for name in names if _OFFSETS.search(name)]


def count_nonfinite(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Return the number of NaN and Inf values of each tensor that has any."""
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    counts = {name: tensor.numel() - int(tensor.isfinite().sum()) for name, tensor in floating.items()}
    return {name: count for name, count in counts.items() if count}


def frozen_tensors(model: nn.Module) -> list[str]:
    """Return the backbone's tensors that training does not change, by their names in the model's state dict."""
    frozen = {id(parameter) for parameter in model.parameters() if not parameter.requires_grad}
    for module in model.modules():
        buffers = dict(module.named_buffers(recurse=False))
        # A norm that trains has its weight among the parameters.
        if buffers.get("weight") is not None and buffers.get("running_mean") is not None:
            frozen.update(id(buffer) for buffer in buffers.values())
    return [
        name
        for name, tensor in model.state_dict(keep_vars=True).items()
        if id(tensor) in frozen and name.startswith(BACKBONE) and not name.endswith(_UNCOUNTED)
    ]


def _part(name: str) -> str:
    return name.partition(".")[0]


def first_names(names: Iterable[str]) -> str:
    """Return the number of names and the first of them: ``5, the first: a, b, c``."""
    names = list(names)
    shown = ", ".join(names[:NAMES_SHOWN])
    return f"{len(names)} ({shown})" if len(names) <= NAMES_SHOWN else f"{len(names)}, the first: {shown}"

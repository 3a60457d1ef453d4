"""How much of a model a weights file fills, and what it says about it."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import nn

from sparseinst.checkpoint.converters import BACKBONE, Converted, is_classifier

NAMES_SHOWN = 3
# Counts steps, and is not needed.
_UNCOUNTED = ".num_batches_tracked"
# Buffers of older checkpoints; today they come from the config.
_OBSOLETE = ("pixel_mean", "pixel_std")
_DECODER_KEY = "MODEL.SPARSE_INST.DECODER."
# What gives a tensor of a decoder's layer its size along the first axis.
_FIRST_AXIS_KEYS = {
    "cls_score": "NUM_CLASSES",
    "iam_conv": "NUM_MASKS or GROUPS",
    "mask_kernel": "KERNEL_DIM",
    "projection": "KERNEL_DIM",
}
_POOLED_LAYERS = ("cls_score", "iam_conv", "mask_kernel", "objectness", "fc")


class ShapeMismatch(NamedTuple):
    """A tensor that file and model have in different shapes."""

    name: str
    found: tuple[int, ...]
    expected: tuple[int, ...]

    def text(self) -> str:
        """Name, both shapes, and the key that may be behind it."""
        key = likely_key(self)
        return f"{self.name} is {self.found} in the file and {self.expected} in the model" + (
            f" ({key})" if key else ""
        )


class Coverage(NamedTuple):
    """What of a model a weights file fills.

    Attributes:
        source: MODEL.WEIGHTS.
        family: what the file's backbone is.
        filled: names of the model's tensors that the file has; step counters of norms count nowhere.
        missing: those that it has not.
        mismatched: those that it has in another shape; among the missing too.
        left_over: the file's own names of what the model does not take, without classifier and step counters.
        classifier: those of a classifier behind the backbone.
    """

    source: str
    family: str
    filled: list[str]
    missing: list[str]
    mismatched: list[ShapeMismatch]
    left_over: list[str]
    classifier: list[str]

    def of_part(self, prefix: str) -> tuple[int, int]:
        """Tensors filled, and all, of those whose names start so."""
        filled = sum(name.startswith(prefix) for name in self.filled)
        return filled, filled + sum(name.startswith(prefix) for name in self.missing)

    @property
    def backbone_share(self) -> float:
        """Share of the backbone's tensors that are filled; 1 for a model without one."""
        filled, total = self.of_part(BACKBONE)
        return filled / total if total else 1.0

    def text(self) -> str:
        """The report, a few lines."""
        filled = Counter(map(_part, self.filled))
        total = filled + Counter(map(_part, self.missing))
        lines = [f"From {self.source} ({self.family}):"]
        lines += [f"  {part}: {count} of {total[part]} tensors" for part, count in filled.items()]
        if untouched := [part for part in total if part not in filled]:
            lines.append(f"  nothing for {', '.join(untouched)}: as initialised")
        partly = [name for name in self.missing if _part(name) in filled]
        for what, names in (
            ("not filled", partly),
            ("left over in the file", self.left_over),
            ("left out, the classifier", self.classifier),
        ):
            if names:
                lines.append(f"  {what}: {first_names(names)}")
        return "\n".join(lines)


def measure(source: str, converted: Converted, target: Mapping[str, torch.Tensor]) -> Coverage:
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
    rest = [
        converted.origins[name]
        for name in found
        if name not in target and not name.endswith(_UNCOUNTED) and name not in _OBSOLETE and name in converted.origins
    ]
    return Coverage(
        source=source,
        family=converted.family,
        filled=filled,
        missing=[name for name in counted if name not in have],
        mismatched=[
            ShapeMismatch(name, tuple(found[name].shape), tuple(target[name].shape))
            for name in counted
            if name in found and name not in have
        ],
        left_over=[name for name in rest if not is_classifier(name)],
        classifier=[name for name in rest if is_classifier(name)],
    )


def frozen_tensors(model: nn.Module, prefix: str = BACKBONE) -> list[str]:
    """Names, in the state dict, of tensors that no training changes: of frozen norms, and parameters that are frozen.

    Args:
        model: any model.
        prefix: only of tensors whose names start so.
    """
    frozen = {id(parameter) for parameter in model.parameters() if not parameter.requires_grad}
    for module in model.modules():
        buffers = dict(module.named_buffers(recurse=False))
        # A norm that trains has its weight among the parameters.
        if buffers.get("weight") is not None and buffers.get("running_mean") is not None:
            frozen.update(id(buffer) for buffer in buffers.values())
    return [
        name
        for name, tensor in model.state_dict(keep_vars=True).items()
        if id(tensor) in frozen and name.startswith(prefix) and not name.endswith(_UNCOUNTED)
    ]


def likely_key(mismatch: ShapeMismatch) -> str:
    """The config key whose value makes this tensor differ in shape; "" where none is known."""
    if mismatch.name.startswith("encoder."):
        return "MODEL.SPARSE_INST.ENCODER.NUM_CHANNELS, or another backbone"
    if not mismatch.name.startswith("decoder.") or len(mismatch.found) != len(mismatch.expected):
        return ""
    layer = mismatch.name.split(".")[-2]
    differs_first = mismatch.found[:1] != mismatch.expected[:1]
    if differs_first and layer in _FIRST_AXIS_KEYS:
        return _DECODER_KEY + _FIRST_AXIS_KEYS[layer]
    if layer in _POOLED_LAYERS:
        return f"{_DECODER_KEY}GROUPS or INST.DIM"
    return f"{_DECODER_KEY}INST.DIM or MASK.DIM, or MODEL.SPARSE_INST.ENCODER.NUM_CHANNELS"


def _part(name: str) -> str:
    return name.partition(".")[0]


def first_names(names: Iterable[str]) -> str:
    """How many names, and the first of them: ``5, the first: a, b, c``; all of a few."""
    names = list(names)
    shown = ", ".join(names[:NAMES_SHOWN])
    return f"{len(names)} ({shown})" if len(names) <= NAMES_SHOWN else f"{len(names)}, the first: {shown}"

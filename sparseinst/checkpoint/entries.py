"""Find the tensors in the content of a weights file: the raw weights, and their moving average (EMA)."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np
import torch

from sparseinst.checkpoint.files import WeightsFileError

RAW = "raw"
AVERAGED = "averaged"
# Entries of training scripts for the weights, and for their averages.
WRAPPERS = ("model", "state_dict", "model_state", "model_state_dict", "blobs")
AVERAGES = (
    "state_dict_ema", "model_ema", "ema_state_dict", "ema_state", "ema_model", "model_ema_state_dict", "ema",
)  # fmt: skip
# Entries that scripts put around an average's tensors.
_INNER = ("module", "state_dict", "model", "state", "shadow", "ema_state_dict")
# Prefixes of DistributedDataParallel, torch.compile and Lightning.
PREFIXES = ("module.", "_orig_mod.", "model.")
# Counters of the classes that average: PyTorch's AveragedModel, MMEngine's.
_COUNTERS = ("n_averaged", "steps")
# MMDetection's buffers: this and the name, with _ in place of points.
_BUFFER_PREFIX = "ema_"


class Weights(NamedTuple):
    """One set of weights of a file.

    Attributes:
        entry: the file's entry that holds them, "" where the content itself is the state dict.
        tensors: by name, without prefixes that all names share.
        place: the entry in words, for messages.
    """

    entry: str
    tensors: dict[str, torch.Tensor]
    place: str


def find_weight_sets(content: object, source: str = "The content") -> dict[str, Weights]:
    """Return the sets of weights that a file holds: RAW, AVERAGED or both.

    An average of the parameters alone is completed by the raw buffers, such as the statistics of norms. MMDetection and
    MMEngine exchange the two when they save: the average is the model, and the raw weights are its ``ema_`` buffers or
    ``ema_state_dict``.

    Args:
        content: of the file: a state dict, or a dict with one under WRAPPERS or AVERAGES.
        source: the file, for the error.

    Raises:
        WeightsFileError: the content has no tensors by name.
    """
    sets = {}
    if isinstance(content, Mapping):
        wrapper = _first_entry(content, WRAPPERS)
        average = _first_entry(content, AVERAGES)
        if wrapper or not average:
            sets[RAW] = _weights(wrapper, content[wrapper] if wrapper else content)
        if average:
            sets[AVERAGED] = _weights(average, _inner(content[average]))
    if not any(weights.tensors for weights in sets.values()):
        found = f"the entries {', '.join(map(str, list(content)[:8]))}" if isinstance(content, Mapping) else "none"
        raise WeightsFileError(
            f"{source} holds no tensors by name; a dict of tensors was expected, or one in an entry "
            f"{', '.join(WRAPPERS)}. Found a {type(content).__name__}, with {found}"
        )
    if len(sets) == 2:
        if sets[AVERAGED].entry == "ema_state_dict" and "steps" in content["ema_state_dict"]:
            sets = {RAW: sets[AVERAGED], AVERAGED: sets[RAW]}
        for mine, other in ((RAW, AVERAGED), (AVERAGED, RAW)):
            if set(sets[mine].tensors) < set(sets[other].tensors):
                sets[mine] = sets[mine]._replace(tensors={**sets[other].tensors, **sets[mine].tensors})
    elif RAW in sets:
        sets |= _split_buffers(sets[RAW])
    return sets


def extract_tensors(content: object, source: str = "The content") -> tuple[dict[str, torch.Tensor], str]:
    """Return the tensors of a weights file by name, and the entry they are in, "" where the content holds them.

    Averaged weights are preferred. Arguments and errors as :func:`find_weight_sets`.
    """
    sets = find_weight_sets(content, source)
    chosen = sets.get(AVERAGED) or sets[RAW]
    return chosen.tensors, chosen.entry


def _first_entry(content: Mapping, names: tuple[str, ...]) -> str:
    mappings = [name for name in names if isinstance(content.get(name), Mapping)]
    return next((name for name in mappings if _tensors(_inner(content[name]))), "")


def _inner(value: Mapping) -> Mapping:
    """Return the state dict in an entry: the entry itself, or a dict one level deeper."""
    inner = next((value[name] for name in _INNER if isinstance(value.get(name), Mapping)), None)
    return value if inner is None or not _tensors(inner) else inner


def _weights(entry: str, state: Mapping) -> Weights:
    tensors = _tensors(_inner(state))
    rest = {name: tensor for name, tensor in tensors.items() if name not in _COUNTERS}
    if len(rest) < len(tensors) and any(_all_have(rest, prefix) for prefix in PREFIXES):
        tensors = rest
    while prefix := next((prefix for prefix in PREFIXES if _all_have(tensors, prefix)), ""):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return Weights(entry, tensors, f"the entry {entry}" if entry else "the tensors of the file")


def _all_have(names: Collection[str], prefix: str) -> bool:
    return bool(names) and all(name.startswith(prefix) for name in names)


def _split_buffers(weights: Weights) -> dict[str, Weights]:
    """Return both sets of a state dict that holds MMDetection's buffers, else {}."""
    buffers = {name: _BUFFER_PREFIX + name.replace(".", "_") for name in weights.tensors}
    buffers = {name: buffer for name, buffer in buffers.items() if buffer in weights.tensors}
    if not buffers:
        return {}
    averaged = {name: tensor for name, tensor in weights.tensors.items() if name not in buffers.values()}
    raw = averaged | {name: weights.tensors[buffer] for name, buffer in buffers.items()}
    return {
        RAW: weights._replace(tensors=raw, place=f"the tensors {_BUFFER_PREFIX}*, where MMDetection saves them"),
        AVERAGED: weights._replace(tensors=averaged, place=f"the tensors without {_BUFFER_PREFIX}"),
    }


def _tensors(state: Mapping) -> dict[str, torch.Tensor]:
    tensors = {}
    # Shared memory is copied once, or a small file could fill the memory.
    copies: dict[tuple, torch.Tensor] = {}
    for name, value in state.items():
        # Caffe2's files hold the optimizer's momentum too.
        if not isinstance(name, str) or name.endswith("_momentum"):
            continue
        if isinstance(value, torch.Tensor):
            # Strides of quantized tensors can exceed their storage (torch 2.12).
            if value.layout is torch.strided and value.device.type == "cpu" and not value.is_quantized:
                tensors[name] = value
        elif isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
            key = (value.__array_interface__["data"][0], value.shape, value.strides, value.dtype.str)
            # A pickle's array may be read-only, or of another byte order.
            if key not in copies:
                copies[key] = torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))
            tensors[name] = copies[key]
    return tensors

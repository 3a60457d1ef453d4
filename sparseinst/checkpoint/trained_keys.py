"""Read class names and the keys that a model declares from the checkpoint of a trained model."""

import math
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode

from sparseinst import config
from sparseinst.checkpoint.entries import extract_tensors
from sparseinst.checkpoint.files import read_weights_file
from sparseinst.checkpoint.locations import find_weights
from sparseinst.checkpoint.names import convert

# Entries of the checkpoints that a training writes.
CLASSES = "classes"
KEYS = "model_keys"


def class_names(content: object) -> list[str] | None:
    """Return the class names in the content of a checkpoint; None where it has none."""
    classes = content.get(CLASSES) if isinstance(content, Mapping) else None
    names = classes.get("names") if isinstance(classes, Mapping) else None
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return list(names) if is_list and names else None


def trained_keys(cfg: CfgNode, weights: str) -> dict[str, float]:
    """Return the config keys that a weights file determines; empty where it has no instance decoder.

    The shapes of its tensors determine them; where these are not known, what the file says.

    Args:
        cfg: MODEL.META_ARCHITECTURE and TRUSTED_WEIGHTS are read.
        weights: as MODEL.WEIGHTS.

    Raises:
        ValueError: the file does not exist or cannot be read.
    """
    said, of_shapes = _read_keys(cfg, weights)
    return of_shapes or said


def follow_checkpoint(cfg: CfgNode, weights: str, *, for_training: bool = False) -> list[str]:
    """Set the declared keys to the values that a checkpoint was trained with, in place.

    Args:
        cfg: not frozen.
        weights: as MODEL.WEIGHTS.
        for_training: refuse other explicit numbers too that no tensor depends on, such as that of detections.

    Returns:
        Lines for the log, one for each key that was changed.

    Raises:
        ValueError: the user set another value; or as :func:`trained_keys`.
    """
    notes = []
    said, of_shapes = _read_keys(cfg, weights)
    detections = config.max_detections(cfg)
    # Where no shape is known, any other key may determine one.
    free = said.keys() - of_shapes.keys() if of_shapes else {detections[0]} if detections else set()
    for key, trained in {**said, **of_shapes}.items():
        value = config.value(cfg, key)
        if value == trained:
            continue
        if config.is_explicit(cfg, key):
            if key in free and not for_training:
                continue
            raise ValueError(
                f"{key} is {value}, but the checkpoint {weights} was trained with {trained}: set {key} {trained}, or "
                "leave the key out"
            )
        cfg.merge_from_list([key, trained])
        notes.append(f"{key} {trained}, from the checkpoint {weights} (the config file's value was {value})")
    return notes


def _read_keys(cfg: CfgNode, weights: str) -> tuple[dict[str, float], dict[str, float]]:
    """Return the keys that a weights file lists, and those that the shapes of its tensors determine."""
    if not weights:
        return {}, {}
    filename = find_weights(weights)
    content = read_weights_file(filename, cfg.MODEL.TRUSTED_WEIGHTS).content
    tensors, _ = extract_tensors(content, filename)
    model = config.meta_architecture(cfg)
    return _said(cfg, content), getattr(model, "trained_keys", lambda _: {})(convert(tensors, {}).tensors)


def _said(cfg: CfgNode, content: Any) -> dict[str, float]:
    """Return the declared keys that a checkpoint lists, where they are numbers above 0 of the config's type."""
    listed = content.get(KEYS) if isinstance(content, Mapping) else None
    listed = dict(listed) if isinstance(listed, Mapping) else {}
    names = class_names(content)
    if names and (declared := config.num_classes(cfg)):
        listed[declared[0]] = len(names)
    return {
        key: listed[key]
        for key, value in config.declared_values(cfg).items()
        if type(listed.get(key)) is type(value) and 0 < listed[key] < math.inf
    }

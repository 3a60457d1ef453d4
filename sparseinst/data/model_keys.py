"""Set the model's keys to what the training data need."""

import functools
from collections.abc import Callable, Iterable, Mapping
from itertools import chain

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from sparseinst import config
from sparseinst.data.coco_json import class_info
from sparseinst.data.crowded_images import MOST_INSTANCES, instances_of_images


def sides_in_training(cfg: CfgNode, sides: Iterable[list[list[float]]]) -> np.ndarray:
    """Return the sides of objects in pixels at the training's largest size, (N,).

    Args:
        cfg: INPUT is read.
        sides: of the objects of each image, see `Shapes.sides`.
    """
    sides, shorts, longs = np.array([*chain.from_iterable(sides)]).reshape(-1, 3).T
    if cfg.INPUT.SQUARE_SIZE:
        return sides * cfg.INPUT.SQUARE_SIZE / np.sqrt(shorts * longs)
    return sides * np.minimum(np.max(cfg.INPUT.MIN_SIZE_TRAIN) / shorts, cfg.INPUT.MAX_SIZE_TRAIN / longs)


def follow_data(cfg: CfgNode, trained: Callable[[], Mapping[str, int]]) -> list[str]:
    """Set the keys that the model declares to what DATASETS.TRAIN and TEST need, in place, where the user set none.

    The number of classes is that of the training data. The numbers of instances and of detections are raised, up to
    MOST_INSTANCES, only where the decoder starts from random weights, because other numbers do not fit a trained one.
    The keys of the model's `keys_for_sides` follow the weights, or else the data, where their objects are known.

    Args:
        cfg: not frozen; its data sets are registered.
        trained: returns the keys that MODEL.WEIGHTS determines; called where an answer depends on it.

    Returns:
        Lines for the log, one for each key that was changed.

    Raises:
        ValueError: a data set is not registered or has no classes; or of ``trained``.
    """
    if not cfg.DATASETS.TRAIN:
        return []
    notes = []

    def change(declared: tuple[str, int], value: int, reason: str) -> None:
        notes.append(_change(cfg, declared, value, reason))

    classes = config.num_classes(cfg)
    names = class_info(cfg.DATASETS.TRAIN[0]).names
    if classes and classes[1] != len(names) and not config.is_explicit(cfg, classes[0]):
        change(classes, len(names), f"the classes of DATASETS.TRAIN {cfg.DATASETS.TRAIN[0]!r}")

    trained = functools.cache(trained)
    notes += follow_sides(cfg, trained)

    needed = min(MOST_INSTANCES, max(instances_of_images(cfg).values(), default=0))
    instances, detections = config.max_instances(cfg), config.max_detections(cfg)
    limits = [declared for declared in (instances, detections) if declared]
    if all(value >= needed for _, value in limits) or set(trained()) & {key for key, _ in limits}:
        return notes
    reason = "the most objects in an image"
    if instances and instances[1] < needed and not config.is_explicit(cfg, instances[0]):
        change(instances, needed, reason)
    if instances:
        needed = min(needed, config.value(cfg, instances[0]))
    if detections and detections[1] < needed and not config.is_explicit(cfg, detections[0]):
        change(detections, needed, reason)
    return notes


def follow_sides(cfg: CfgNode, trained: Callable[[], Mapping[str, int]], section: str = "") -> list[str]:
    """Set the keys of the model's `keys_for_sides` as the data need, in place, where the user set none.

    Args:
        cfg: as for `follow_data`.
        trained: as for `follow_data`.
        section: only keys that begin with this; "": all.

    Returns:
        Lines for the log, one for each key that was changed.
    """
    sides = [MetadataCatalog.get(name).get("object_sides") for name in cfg.DATASETS.TRAIN]
    sides = [] if None in sides else chain.from_iterable(each.values() for each in sides)
    keys_for_sides = getattr(config.meta_architecture(cfg), "keys_for_sides", lambda *_: {})
    notes = []
    for key, (value, reason) in keys_for_sides(cfg, sides_in_training(cfg, sides)).items():
        if not key.startswith(section):
            continue
        if key in trained():
            value, reason = trained()[key], "as in MODEL.WEIGHTS"
        if (now := config.value(cfg, key)) != value and not config.is_explicit(cfg, key):
            notes.append(_change(cfg, (key, now), value, reason))
    return notes


def _change(cfg: CfgNode, declared: tuple[str, int], value: int, reason: str) -> str:
    """Set a key, given with its value before, and return the line for the log."""
    cfg.merge_from_list([declared[0], value])
    return f"{declared[0]} {value}, {reason} (the config file's value was {declared[1]})"

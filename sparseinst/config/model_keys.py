"""Read the keys that a model of any family declares."""

from collections.abc import Mapping
from functools import reduce

from detectron2.config import CfgNode

# The declarations that Detectron2's own classes lack.
_DETECTRON2_KEYS = {
    "GeneralizedRCNN": {
        "num_classes_key": "MODEL.ROI_HEADS.NUM_CLASSES",
        "max_detections_key": "TEST.DETECTIONS_PER_IMAGE",
    },
}


def registered(registry: Mapping, cfg: CfgNode, key: str) -> object:
    """Return what is registered under the name that a key holds.

    Args:
        registry: a registry of Detectron2 or SparseInst.
        cfg: the config.
        key: with points, such as "MODEL.BACKBONE.NAME".

    Raises:
        ValueError: nothing is registered under that name; the message lists the names.
    """
    name = value(cfg, key)
    if name not in registry:
        names = ", ".join(sorted(registered_name for registered_name, _ in registry))
        raise ValueError(f"{key} is {name!r}; it must be one of {names}. IMPORTS can import a module that adds others")
    return registry.get(name)


def meta_architecture(cfg: CfgNode) -> type:
    """Return the class of MODEL.META_ARCHITECTURE. Raise ValueError where it is not registered."""
    # Importing torch would slow down --help.
    from detectron2.modeling import META_ARCH_REGISTRY

    return registered(META_ARCH_REGISTRY, cfg, "MODEL.META_ARCHITECTURE")


def num_classes(cfg: CfgNode) -> tuple[str, int] | None:
    """Return the key that holds the model's number of classes and its value.

    A class of META_ARCH_REGISTRY declares the key as its attribute ``num_classes_key``. None: it declares no key, and
    the number of classes is not checked.

    Raises:
        ValueError: MODEL.META_ARCHITECTURE is not registered.
    """
    return _declared(cfg, "num_classes_key")


def max_instances(cfg: CfgNode) -> tuple[str, int] | None:
    """Return the key and the most instances per image that the model can learn; declared as ``max_instances_key``."""
    return _declared(cfg, "max_instances_key")


def max_detections(cfg: CfgNode) -> tuple[str, int] | None:
    """Return the key and the most instances per image that the model returns; declared as ``max_detections_key``."""
    return _declared(cfg, "max_detections_key")


def declared_values(cfg: CfgNode) -> dict[str, float]:
    """Return the keys of the numbers of classes, instances and detections, with their values.

    A checkpoint holds them, see :mod:`sparseinst.checkpoint.trained_keys`.
    """
    return dict(filter(None, (num_classes(cfg), max_instances(cfg), max_detections(cfg))))


def set_declared(cfg: CfgNode, attribute: str, value: object) -> None:
    """Set the key that the model's class declares under an attribute, such as ``mask_nms_key``.

    Raises:
        ValueError: the class declares no such key.
    """
    declared = _declared(cfg, attribute)
    if declared is None:
        name = attribute.removesuffix("_key")
        raise ValueError(f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE} has no {name}")
    cfg.merge_from_list([declared[0], value])


def dataset_mapper(cfg: CfgNode) -> tuple[str, str]:
    """Return the key and the name of the dataset mapper; the published key wins where it is not at its default."""
    published = cfg.MODEL.SPARSE_INST.DATASET_MAPPER
    if published != "SparseInstDatasetMapper":
        return "MODEL.SPARSE_INST.DATASET_MAPPER", published
    return "INPUT.DATASET_MAPPER", cfg.INPUT.DATASET_MAPPER


def _declared(cfg: CfgNode, attribute: str) -> tuple[str, int] | None:
    model_class = meta_architecture(cfg)
    key = getattr(model_class, attribute, _DETECTRON2_KEYS.get(model_class.__name__, {}).get(attribute))
    return None if key is None else (key, value(cfg, key))


def value(cfg: CfgNode, key: str) -> object:
    """Return the value of a key with points, such as "MODEL.BACKBONE.NAME"."""
    return reduce(lambda node, part: node[part], key.split("."), cfg)

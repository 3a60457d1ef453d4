"""Define the configuration keys, load configs, and read the keys that a model declares."""

from sparseinst.config.defaults import add_sparse_inst_config, get_config_file
from sparseinst.config.explicit import is_explicit, mark_explicit
from sparseinst.config.load import load_config, register_models, resolve_config_file
from sparseinst.config.model_keys import (
    dataset_mapper,
    declared_values,
    max_detections,
    max_instances,
    num_classes,
    registered,
    set_declared,
    value,
)

__all__ = [
    "add_sparse_inst_config",
    "dataset_mapper",
    "declared_values",
    "get_config_file",
    "is_explicit",
    "load_config",
    "mark_explicit",
    "max_detections",
    "max_instances",
    "num_classes",
    "register_models",
    "registered",
    "resolve_config_file",
    "set_declared",
    "value",
]

"""Define the configuration keys, load configs, and read the keys that a model declares."""

from sparseinst.config.defaults import add_sparse_inst_config, get_config_file
from sparseinst.config.load import load_config, register_models, resolve_config_file
from sparseinst.config.model_keys import (
    dataset_mapper,
    max_detections,
    max_instances,
    num_classes,
    registered,
    set_declared,
)

__all__ = [
    "add_sparse_inst_config",
    "dataset_mapper",
    "get_config_file",
    "load_config",
    "max_detections",
    "max_instances",
    "num_classes",
    "register_models",
    "registered",
    "resolve_config_file",
    "set_declared",
]

"""Define the configuration keys, load configs, and read the keys that a model declares.

The names are imported at their first use, so that `arguments` is available without Detectron2 and PyTorch.
"""

import importlib

_MODULES = {
    "defaults": ("add_sparse_inst_config", "get_config_file"),
    "explicit": ("is_explicit", "mark_explicit"),
    "load": ("choose_device", "load_config", "register_models", "resolve_config_file"),
    "model_keys": (
        "dataset_mapper",
        "declared_values",
        "max_detections",
        "max_instances",
        "meta_architecture",
        "num_classes",
        "registered",
        "set_declared",
        "value",
    ),
    "values": ("check_keys", "check_value", "check_values"),
}
__all__ = [name for names in _MODULES.values() for name in names]


def __getattr__(name: str) -> object:
    """Import the public functions at their first use (PEP 562)."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"sparseinst.config.{module}"), name)
    raise AttributeError(f"module 'sparseinst.config' has no attribute {name!r}")

"""SparseInst: real-time instance segmentation as a Detectron2 plugin.

`add_sparse_inst_config` adds the plugin's keys to a config and registers its models and backbones with Detectron2.
Importing this package alone imports neither Detectron2 nor PyTorch.
"""

import importlib
from importlib.util import find_spec

__version__ = "0.1.0"
__all__ = ["__version__", "add_sparse_inst_config", "get_config_file", "load_config"]

# Modules that register backbones and meta-architectures.
_REGISTERING = (
    "sparseinst.backbones",
    "sparseinst.modeling.sparse_inst.model",
    "sparseinst.modeling.solo.model",
    "sparseinst.modeling.yolact.model",
)

if find_spec("detectron2") is None:
    raise ImportError(
        "SparseInst is a plugin of Detectron2, which is not installed. Detectron2 has no release on "
        "PyPI under its own name. Install it as its guide says:\n"
        "    https://detectron2.readthedocs.io/en/latest/tutorials/install.html\n"
        "or, without a compiler, its redistribution (Python code only), then its requirements:\n"
        "    python -m pip install --no-deps --only-binary=:all: --python-version 3.10 "
        '--target "$(python -c \'import sysconfig; print(sysconfig.get_path("purelib"))\')" sal-detectron2==0.7.2\n'
        "    python -m pip install black cloudpickle hydra-core matplotlib omegaconf packaging "
        "'setuptools<81' tensorboard"
    )


def register() -> None:
    """Register the plugin's models and backbones with Detectron2, once."""
    for name in _REGISTERING:
        importlib.import_module(name)


def __getattr__(name: str) -> object:
    """Import the public functions and ``sparseinst.model_zoo`` at their first use (PEP 562)."""
    if name == "model_zoo":
        return importlib.import_module("sparseinst.model_zoo")
    if name in __all__:
        return getattr(importlib.import_module("sparseinst.config"), name)
    raise AttributeError(f"module 'sparseinst' has no attribute {name!r}")

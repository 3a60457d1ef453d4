"""SparseInst: real-time instance segmentation as a Detectron2 plugin.

Importing this package registers the model with Detectron2; :func:`add_sparse_inst_config` adds its keys to a config.
"""

__version__ = "0.1.0"

try:
    import detectron2  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"SparseInst is a plugin of Detectron2, which cannot be imported here ({error}). Detectron2 has no release on "
        "PyPI under its own name. Install it as its guide says:\n"
        "    https://detectron2.readthedocs.io/en/latest/tutorials/install.html\n"
        "or, without a compiler, its redistribution (Python code only), then what it needs:\n"
        "    python -m pip install --no-deps --only-binary=:all: --python-version 3.10 "
        '--target "$(python -c \'import sysconfig; print(sysconfig.get_path("purelib"))\')" sal-detectron2==0.7.2\n'
        "    python -m pip install black cloudpickle hydra-core matplotlib omegaconf packaging "
        "'setuptools<81' tensorboard"
    ) from error

from sparseinst import backbones, modeling  # noqa: F401  (registers backbones and model)
from sparseinst.config import add_sparse_inst_config, get_config_file, load_config

__all__ = ["__version__", "add_sparse_inst_config", "get_config_file", "load_config"]

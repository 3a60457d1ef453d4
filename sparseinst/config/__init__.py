"""Configuration: the keys with their defaults, and how a command's config is loaded."""

from sparseinst.config.defaults import add_sparse_inst_config, get_config_file
from sparseinst.config.load import load_config, resolve_config_file

__all__ = ["add_sparse_inst_config", "get_config_file", "load_config", "resolve_config_file"]

"""Keep ``sparseinst.engine.setup.load_config``, which README named until it moved to :mod:`sparseinst.config`."""

from sparseinst.config import load_config, resolve_config_file

__all__ = ["load_config", "resolve_config_file"]

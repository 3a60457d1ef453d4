"""Commands, each run as ``python -m sparseinst.tools.NAME``."""

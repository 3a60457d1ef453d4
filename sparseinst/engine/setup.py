"""From a config file's name and overrides to the config that a command runs with."""

import logging
import os
from collections.abc import Callable, Sequence

import torch
import yaml
from detectron2.config import CfgNode, get_cfg

from sparseinst.config import add_sparse_inst_config, get_config_file
from sparseinst.engine.config_files import check_config_file

logger = logging.getLogger(__name__)

# What yacs raises: it tells of unknown keys by KeyError and AssertionError, stumbles by TypeError over a key below a
# value (SOLVER.MAX_ITER.X), and has Python read values, which ends some in MemoryError or RecursionError ("-----...").
_MERGE_ERRORS = (KeyError, AssertionError, ValueError, TypeError, MemoryError, RecursionError)


def resolve_config_file(config_file: str) -> str:
    """Path of a config file that is named by its path, or by the name of one that comes with the package.

    Raises:
        ValueError: there is neither.
    """
    if os.path.isfile(config_file):
        return config_file
    try:
        return get_config_file(config_file)
    except OSError as error:
        raise ValueError(f"No config file can be named {config_file[:100]!r}: {error.strerror}") from error


def load_config(config_file: str, opts: Sequence[str] = ()) -> CfgNode:
    """Detectron2's and our defaults, then the file, then the overrides.

    The file runs no code, whoever wrote it: YAML that names Python code is refused, and so is a LazyConfig. Where
    ``MODEL.DEVICE`` asks for CUDA and there is none, it becomes "cpu", with one line in the log.

    Args:
        config_file: path of a YAML file, or the name of one that comes with the package.
        opts: KEY VALUE KEY VALUE ...

    Returns:
        The config, not frozen.

    Raises:
        ValueError: no such file, or one that is no config; a key that does not exist, or a value of the wrong type.
    """
    cfg = get_cfg()
    add_sparse_inst_config(cfg)
    path = resolve_config_file(config_file)
    check_config_file(path, cfg)
    _merge(lambda: cfg.merge_from_file(path, allow_unsafe=False), f"In the config file {path}")
    _merge(lambda: cfg.merge_from_list(list(opts)), "In the KEY VALUE overrides")
    # A training writes its config. Not every value that Python can read can be written.
    _merge(cfg.dump, f"The config of {path} and the KEY VALUE overrides cannot be written as YAML")
    if not isinstance(cfg.MODEL.DEVICE, str):
        raise ValueError(f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}; expected a device's name, as cpu or cuda")
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("MODEL.DEVICE is %s and there is no CUDA device: running on the CPU", cfg.MODEL.DEVICE)
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def _merge(merge: Callable[[], object], where: str) -> None:
    try:
        merge()
    except (*_MERGE_ERRORS, yaml.YAMLError) as error:
        text = str(error.args[0] if len(error.args) == 1 else error)
        if isinstance(error, MemoryError | RecursionError):
            text = "a value that is nested too deeply to be read"
        raise ValueError(f"{where}: {' '.join(text.split())[:500]}") from error

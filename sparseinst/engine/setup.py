"""From a config file's name and overrides to the config that a command runs with."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode, get_cfg

from sparseinst.config import add_sparse_inst_config, get_config_file

logger = logging.getLogger(__name__)


def resolve_config_file(config_file: str) -> str:
    """Path of a config file that is named by its path, or by the name of one that comes with the package.

    Raises:
        ValueError: there is neither.
    """
    return config_file if Path(config_file).is_file() else get_config_file(config_file)


def load_config(config_file: str, opts: Sequence[str] = ()) -> CfgNode:
    """Detectron2's and our defaults, then the file, then the overrides.

    Where ``MODEL.DEVICE`` asks for CUDA and there is none, it becomes "cpu", with one line in the log.

    Args:
        config_file: path of a YAML file, or the name of one that comes with the package.
        opts: KEY VALUE KEY VALUE ...

    Returns:
        The config, not frozen.

    Raises:
        ValueError: no such file; a key that does not exist, or a value of the wrong type.
    """
    cfg = get_cfg()
    add_sparse_inst_config(cfg)
    path = resolve_config_file(config_file)
    _merge(cfg.merge_from_file, path, f"In the config file {path}")
    _merge(cfg.merge_from_list, list(opts), "In the KEY VALUE overrides")
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("MODEL.DEVICE is %s and there is no CUDA device: running on the CPU", cfg.MODEL.DEVICE)
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def _merge(merge, source: str | list[str], where: str) -> None:
    try:
        merge(source)
    except (KeyError, AssertionError, ValueError) as error:
        # yacs tells of unknown keys by KeyError and AssertionError.
        raise ValueError(f"{where}: {error.args[0] if error.args else error}") from error

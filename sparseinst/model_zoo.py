"""Published models by the name of their config, in the manner of ``detectron2.model_zoo``.

``sparseinst.model_zoo.get("sparse_inst_r50_giam_aug", trained=True)`` returns the model with its published weights.
"""

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from sparseinst.checkpoint import checkpointer_from_config, find_weights
from sparseinst.checkpoint.downloads import find_download
from sparseinst.checkpoint.published import published_address
from sparseinst.config import get_config_file, load_config

__all__ = ["get", "get_checkpoint", "get_checkpoint_url", "get_config", "get_config_file"]


def get_checkpoint_url(config_path: str) -> str:
    """Return the https address of a config's published checkpoint; browsers and MODEL.WEIGHTS take it.

    Args:
        config_path: name of the config file, with or without ``.yaml``.

    Raises:
        ValueError: no checkpoint was published for it; the message lists the names.
    """
    return find_download(published_address(config_path)).address


def get_checkpoint(config_path: str) -> str:
    """Return the local path of a config's published checkpoint, downloaded if it is not cached.

    Args:
        config_path: as in :func:`get_checkpoint_url`.

    Raises:
        ValueError: no checkpoint was published for it, or it cannot be downloaded.
        ImportError: the package that downloads is not installed.
    """
    return find_weights(_weights(config_path))


def get_config(config_path: str, trained: bool = False) -> CfgNode:
    """Return a config of the package.

    Args:
        config_path: name of the config file, with or without ``.yaml``.
        trained: set MODEL.WEIGHTS to the published checkpoint, in place of the weights that a training starts from.

    Raises:
        ValueError: the config does not exist, or no checkpoint was published for it.
    """
    return load_config(config_path, ["MODEL.WEIGHTS", _weights(config_path)] if trained else [])


def get(config_path: str, trained: bool = False, device: str | None = None) -> nn.Module:
    """Return a model, in training mode.

    Args:
        config_path, trained: as in :func:`get_config`. Without ``trained`` the model starts as a training does.
        device: in place of MODEL.DEVICE; None uses a GPU if there is one.

    Raises:
        ValueError: as :func:`get_config`; or the weights cannot be downloaded, or do not fit.
        ImportError: the package that downloads is not installed.
    """
    cfg = get_config(config_path, trained)
    if device is not None:
        cfg.MODEL.DEVICE = device
    model = build_model(cfg)
    checkpointer_from_config(cfg, model, is_training=not trained).load(cfg.MODEL.WEIGHTS, checkpointables=[])
    return model


def _weights(config_path: str) -> str:
    published_address(config_path)
    return f"sparseinst://{config_path}"

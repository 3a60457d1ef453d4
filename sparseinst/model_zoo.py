"""Models by the names of their configs, in the manner of detectron2.model_zoo.

``get("sparse_inst_r50_giam_aug", trained=True)`` returns the model with its published checkpoint.
"""

from torch import nn

from sparseinst.checkpoint import checkpointer_from_config
from sparseinst.checkpoint.downloads import checkpoint_address
from sparseinst.config import get_config_file, load_config

__all__ = ["get", "get_checkpoint_url", "get_config", "get_config_file"]


def get_checkpoint_url(config_name: str) -> str:
    """Return the address of the published checkpoint of a config, for MODEL.WEIGHTS.

    Raises:
        ValueError: no checkpoint of this config is listed; the message has the names.
    """
    return checkpoint_address(config_name)


def get_config(config_name: str, trained: bool = False):
    """Return the config of a model.

    Args:
        config_name: path below ``configs/``, with or without ``.yaml``.
        trained: set MODEL.WEIGHTS to the published checkpoint; otherwise it names the weights a training starts from.
    """
    opts = ["MODEL.WEIGHTS", get_checkpoint_url(config_name)] if trained else []
    return load_config(config_name, opts)


def get(config_name: str, trained: bool = False, device: str | None = None) -> nn.Module:
    """Build a model in eval mode.

    Args:
        config_name, trained: as in `get_config`. Untrained models have random weights.
        device: replaces MODEL.DEVICE.
    """
    from detectron2.modeling import build_model

    cfg = get_config(config_name, trained)
    cfg.MODEL.DEVICE = device or cfg.MODEL.DEVICE
    model = build_model(cfg).eval()
    if trained:
        checkpointer_from_config(cfg, model).load(cfg.MODEL.WEIGHTS)
    return model

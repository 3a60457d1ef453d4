"""Compare a model with the setting that released weights were trained with."""

from collections.abc import Sequence

import torch
from torch import nn

from sparseinst.checkpoint.names import BACKBONE
from sparseinst.checkpoint.names.detectron2 import stride_in_1x1
from sparseinst.checkpoint.names.source import Recipe


def recipe_differences(recipe: Recipe, model: nn.Module, image_format: str | None = None) -> list[str]:
    """Return the config keys in which a model differs from a recipe, each with the recipe's value.

    Args:
        recipe: of the weights.
        model: its ``pixel_mean``, ``pixel_std`` and ``backbone`` are compared, where it has them.
        image_format: INPUT.FORMAT; None: unknown.
    """
    backbone = getattr(model, BACKBONE.removesuffix("."), None)
    stride = stride_in_1x1(backbone) if isinstance(backbone, nn.Module) else None
    rows = (
        ("INPUT.FORMAT", recipe.image_format, image_format in (None, recipe.image_format)),
        ("MODEL.PIXEL_MEAN", list(recipe.pixel_mean), _is_close(model, "pixel_mean", recipe.pixel_mean)),
        ("MODEL.PIXEL_STD", list(recipe.pixel_std), _is_close(model, "pixel_std", recipe.pixel_std)),
        ("MODEL.RESNETS.STRIDE_IN_1X1", recipe.stride_in_1x1, stride in (None, recipe.stride_in_1x1)),
    )
    return [f"{key} {value}" for key, value, is_equal in rows if not is_equal]


def _is_close(model: nn.Module, name: str, values: Sequence[float]) -> bool:
    buffer = getattr(model, name, None)
    if buffer is None or buffer.is_meta:
        return True
    found = buffer.flatten().float().cpu()
    return found.shape == (len(values),) and torch.allclose(found, torch.tensor(values), atol=0.01)

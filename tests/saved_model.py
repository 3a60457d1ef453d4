"""Build a model without drawing weights that are then filled; save it, load it, and compare its answers."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

RANDOM = ("normal_", "uniform_", "trunc_normal_", "kaiming_normal_", "kaiming_uniform_", "xavier_uniform_")


@contextlib.contextmanager
def no_random_weights() -> Iterator[None]:
    """Leave the weights of models that are built in the with statement as they are in memory."""
    with mock.patch.multiple(nn.init, **{name: lambda tensor, *_, **__: tensor for name in RANDOM}):
        yield


def save_and_load(model: nn.Module, x: dict, folder: Path) -> None:
    """Check that the model finds something of the input's size, and that its checkpoint gives the same answer."""
    instances = predict(model, x)
    assert len(instances) > 0 and instances.pred_masks.shape[1:] == (x["height"], x["width"])
    DetectionCheckpointer(model, str(folder)).save("model")
    for value in model.state_dict().values():
        value.zero_()
    DetectionCheckpointer(model).load(str(folder / "model.pth"))
    (folder / "model.pth").unlink()
    again = predict(model, x)
    for field in ("scores", "pred_classes", "pred_masks"):
        assert torch.equal(again.get(field), instances.get(field)), field


def predict(model: nn.Module, x: dict):
    with torch.no_grad():
        return model.eval()([x])[0]["instances"]

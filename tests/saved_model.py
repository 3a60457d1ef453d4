"""Save a model, load it, and compare their answers."""

import copy
from pathlib import Path

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn


def save_and_load(model: nn.Module, x: dict, folder: Path) -> nn.Module:
    """Check that the model finds something of the input's size, and that its checkpoint gives the same answer.

    Returns:
        The model that was loaded.
    """
    instances = predict(model, x)
    assert len(instances) > 0 and instances.pred_masks.shape[1:] == (x["height"], x["width"])
    DetectionCheckpointer(model, str(folder)).save("model")
    loaded = copy.deepcopy(model)
    for value in loaded.state_dict().values():
        value.zero_()
    DetectionCheckpointer(loaded).load(str(folder / "model.pth"))
    again = predict(loaded, x)
    for field in ("scores", "pred_classes", "pred_masks"):
        assert torch.equal(again.get(field), instances.get(field)), field
    return loaded


def predict(model: nn.Module, x: dict):
    with torch.no_grad():
        return model.eval()([x])[0]["instances"]

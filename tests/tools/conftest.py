import cv2
import numpy as np
import pytest
import torch

from tests.loggers import loggers_restored
from tests.red_segmenter import red_segmenter_config


@pytest.fixture
def loggers_as_before():
    with loggers_restored():
        yield


@pytest.fixture
def no_window(monkeypatch):
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(cv2, "currentUIFramework", lambda: "")


@pytest.fixture
def shown(monkeypatch):
    """A window that records; "q" is pressed at the third picture."""
    pictures = []
    monkeypatch.setattr(cv2, "currentUIFramework", lambda: "QT5")
    monkeypatch.setattr(cv2, "imshow", lambda title, picture: pictures.append((title, np.array(picture))))
    monkeypatch.setattr(cv2, "waitKey", lambda wait_ms: ord("q") if len(pictures) >= 3 else -1)
    return pictures


@pytest.fixture
def config_file(tmp_path):
    """The stub's config and weights."""
    cfg = red_segmenter_config()
    classes = {"names": ["red thing", "blue thing"], "category_ids": [3, 8]}
    torch.save({"model": {"scores": torch.tensor([0.9, 0.3])}, "classes": classes}, tmp_path / "model.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    path = tmp_path / "config.yaml"
    path.write_text(cfg.dump())
    return str(path)

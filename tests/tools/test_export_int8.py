"""`sparseinst export --precision int8`: AP decides, and the layers that lose it stay in float32."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

from sparseinst import load_config
from sparseinst.inference import Predictor
from sparseinst.runtime.exported_file import read_metadata
from sparseinst.tools import export_run
from tests.shapes_data import write_shapes
from tests.tools.exported import photos, run_export, save_tiny

for package in ("onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason=f"the package {package} is not installed")
pytestmark = pytest.mark.usefixtures("loggers_as_before")


@pytest.fixture
def flags(tmp_path):
    """Save the tiny model and calibration images; return the flags of an export."""
    save_tiny(tmp_path / "model", "MODEL.SPARSE_INST.DECODER.NUM_CLASSES", 4)
    content = torch.load(tmp_path / "model" / "model.pth")
    del content["classes"]
    torch.save(content, tmp_path / "model" / "model.pth")
    (tmp_path / "images").mkdir()
    for index, image in enumerate(photos()):
        Image.fromarray(image).save(tmp_path / "images" / f"{index}.png")
    json_file, images = write_shapes(tmp_path / "data", 2)
    data = ["--test-json", json_file, "--test-images", images, "--calibration", tmp_path / "images"]
    return ["--format", "onnx", "--precision", "int8", "--output", tmp_path / "out", *data]


def set_aps(monkeypatch, *values):
    aps = iter(values)
    monkeypatch.setattr(export_run, "_mask_ap", lambda cfg, model: next(aps))


def test_a_file_that_keeps_its_ap(flags, tmp_path, monkeypatch):
    set_aps(monkeypatch, 50.0, 49.5)
    assert run_export(tmp_path / "model", *flags) == 0
    path = tmp_path / "out" / "model.onnx"
    metadata = read_metadata(path)
    assert metadata.precision == "int8" and metadata.ap == {"model": 50.0, "file": 49.5}
    assert "bound" not in metadata.self_check and metadata.self_check["pred_masks"] > 1e-3
    assert not metadata.skipped_layers
    assert Predictor(path)(photos()[:1])[0].image_size == (50, 70)


def test_layers_that_lose_ap_stay_in_float32(flags, tmp_path, monkeypatch, capsys):
    """The additions are left in float32 first, then one layer, then two."""
    set_aps(monkeypatch, 50.0, 10.0, 20.0, 30.0, 49.0)
    assert run_export(tmp_path / "model", *flags) == 0
    skipped = read_metadata(tmp_path / "out" / "model.onnx").skipped_layers
    assert len(skipped) == 3 and skipped[0] == "additions"
    assert f"Left in float32: {', '.join(skipped)}\n" in capsys.readouterr().out


def test_a_file_that_loses_ap_is_not_written(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export_run, "by_error", lambda network, layers, images: layers[:2])
    set_aps(monkeypatch, 50.0, 10.0, 10.0, 10.0)
    assert run_export(tmp_path / "model", *flags) == 1
    assert "The file's AP is 10.00, the model's 50.00: 1.0 may be lost. Nothing" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_a_model_whose_ap_proves_nothing(flags, tmp_path, monkeypatch, capsys):
    set_aps(monkeypatch, 0.4, 0.0, 0.0, 0.0)
    assert run_export(tmp_path / "model", *flags) == 2
    assert "AP on --test-json" in (error := capsys.readouterr().err) and "is 0.40; INT8 is accepted by its AP" in error
    # Random weights serve to measure speed.
    assert run_export(tmp_path / "model", *flags, opts=("MODEL.WEIGHTS", "")) == 0
    assert "The weights are random, so the AP proves nothing" in capsys.readouterr().out


def test_a_batch_has_different_images(tmp_path):
    """Three images in batches of two: the first one fills the last batch."""
    save_tiny(tmp_path, "INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 64)
    for index, value in enumerate((10, 120, 250)):
        Image.fromarray(np.full((64, 64, 3), value, np.uint8)).save(tmp_path / f"{index}.png")
    cfg = load_config(str(tmp_path / "config.yaml"))
    model = SimpleNamespace(
        metadata=SimpleNamespace(batch=2, fit_size=None, size=None), preprocess=build_model(cfg).preprocess
    )
    batches = export_run._images(cfg, model, "--calibration", str(tmp_path / "*.png"), 8)
    levels = [[int(image.mean()) for image in images] for images in batches]
    assert [len(row) for row in levels] == [2, 2]
    assert levels[0][0] < levels[0][1] < levels[1][0] and levels[1][1] == levels[0][0]

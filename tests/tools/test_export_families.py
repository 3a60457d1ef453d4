"""`sparseinst export` of SOLO, SOLOv2 and YOLACT, with and without their post-processing. Slow."""

import pytest
import torch

from sparseinst import load_config
from sparseinst.inference import Predictor
from sparseinst.runtime.exported_file import read_metadata
from sparseinst.runtime.exported_model import open_network
from sparseinst.tools import export
from tests.modeling.dense import assert_dense_equals_postprocess
from tests.modeling.solo.tiny_solo import tiny_solo, tiny_solo_cfg
from tests.modeling.yolact.tiny_yolact import PLUS, spread_scores, tiny_yolact, tiny_yolact_cfg
from tests.tools.exported import assert_same_detections, photos

for package in ("onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(package, reason=f"the package {package} is not installed")
pytestmark = pytest.mark.usefixtures("loggers_as_before")
FILES = {"onnx": "model.onnx", "openvino": "model_openvino/model.xml"}
SIZES = {"solo": (64, 96), "decoupled": (64, 96), "solov2": (64, 96), "yolact": (64, 64), "yolact_plus": (256, 256)}
# Fewer than MAX_DETECTIONS.
NUM_DETECTIONS = 5


def save(folder, family):
    """Write config and weights; return the model."""
    if "solo" in family or family == "decoupled":
        model, cfg = tiny_solo(family), tiny_solo_cfg(family)
    else:
        opts = PLUS if family == "yolact_plus" else ()
        model, cfg = spread_scores(tiny_yolact(*opts)), tiny_yolact_cfg(*opts)
    (folder / "config.yaml").write_text(cfg.dump())
    torch.save({"model": model.state_dict()}, folder / "model.pth")
    return model


def run(folder, *flags):
    arguments = ["--config-file", folder / "config.yaml", "--output", folder, *flags]
    return export.main([*map(str, arguments), "MODEL.WEIGHTS", str(folder / "model.pth")])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("family", SIZES)
def test_end_to_end(tmp_path, family, name):
    model = save(tmp_path, family)
    flags = ("--format", name, "--size", *SIZES[family], "--end-to-end", NUM_DETECTIONS)
    assert run(tmp_path, *flags) == 0
    metadata = read_metadata(tmp_path / FILES[name])
    network = open_network(tmp_path / FILES[name], metadata, "torch", 1, ["CPUExecutionProvider"])
    images = torch.randn(3, 3, *SIZES[family], generator=torch.Generator().manual_seed(7))
    assert min(assert_dense_equals_postprocess(model, images, NUM_DETECTIONS, network)) > 1


@pytest.mark.parametrize("name", FILES)
def test_a_square_model(tmp_path, capsys, name):
    save(tmp_path, "yolact")
    assert run(tmp_path, "--format", name) == 2
    assert "--size is dynamic; this model supports 64 64, its own size, only" in capsys.readouterr().err
    assert run(tmp_path, "--format", name, "--size", 64, 64) == 0
    metadata = read_metadata(tmp_path / FILES[name])
    assert metadata.postprocessing["iou_threshold"] == 0.5 and metadata.size == [64, 64]
    expected = Predictor(load_config(str(tmp_path / "config.yaml"), ["MODEL.WEIGHTS", str(tmp_path / "model.pth")]))
    for found, wanted in zip(Predictor(tmp_path / FILES[name])(photos(), "RGB"), expected(photos(), "RGB")):
        assert_same_detections(found, wanted)

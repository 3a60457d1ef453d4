"""`sparseinst export` of a training with --val-share: its own data to evaluate on, and a file that has no share."""

import pytest
import yaml
from detectron2.data import DatasetCatalog

from sparseinst.data.evaluation_data import choose_evaluation_data
from sparseinst.runtime.exported_model import exported_config
from sparseinst.tools import export_run
from tests.runtime.test_exported_files import onnx_file
from tests.shapes_data import write_shapes
from tests.tiny_model import tiny_model
from tests.tools.exported import OPTS, run_export, save_tiny

pytestmark = pytest.mark.usefixtures("loggers_as_before")


def test_the_json_is_evaluated_on_and_the_file_has_no_share(tmp_path, monkeypatch):
    """Skip the conversion: the file is empty, and its network the model's own."""
    train, test = write_shapes(tmp_path, 8), write_shapes(tmp_path, 3, seed=1, split="test")
    data = ("DATASETS.TRAIN_JSON", train[0], "DATASETS.TRAIN_IMAGES", train[1], "DATASETS.VAL_SHARE", 0.25)
    save_tiny(tmp_path / "run", *data)
    evaluated, written = [], []
    write = lambda path, metadata: written.append(metadata) or path.write_text("")  # noqa: E731
    monkeypatch.setattr(export_run, "export_program", lambda *args: None)
    monkeypatch.setattr(export_run, "has_deform_conv", lambda program: False)
    monkeypatch.setattr(export_run, "open_network", lambda *args: tiny_model(*OPTS).network)
    monkeypatch.setattr(export_run, "converter", lambda *args: lambda quantization: write)
    monkeypatch.setattr(
        export_run, "evaluate", lambda cfg, model: evaluated.extend(cfg.DATASETS.TEST) or {"segm": {"AP": 40.0}}
    )
    flags = ("--format", "torch", "--output", tmp_path / "out", "--test-json", test[0], "--test-images", test[1])
    assert run_export(tmp_path / "run", *flags) == 0
    assert [len(DatasetCatalog.get(name)) for name in evaluated] == [3, 3]
    assert yaml.safe_load(written[-1].config)["DATASETS"]["VAL_SHARE"] == 0.0

    # Without --test-json.
    assert run_export(tmp_path / "run", *flags[:4]) == 0
    assert yaml.safe_load(written[-1].config)["DATASETS"]["VAL_SHARE"] == 0.0
    path = onnx_file(tmp_path / "m.onnx", config=written[-1].config)
    choose_evaluation_data(exported_config(path, ["DATASETS.TEST_JSON", test[0]]))

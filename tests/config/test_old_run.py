"""The config and the checkpoint of a run before keys were renamed: load, evaluate, resume."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from sparseinst.config import load_config
from sparseinst.data.coco_json import register_user_datasets
from sparseinst.engine.trainer import Trainer
from sparseinst.tools import train_net
from tests.loggers import loggers_restored
from tests.shapes_data import write_shapes

OLD_RUN = Path(__file__).resolve().parents[1] / "old_run"


@pytest.fixture(scope="module")
def opts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    train_json, train_images = write_shapes(folder, 6)
    return [
        "DATASETS.TRAIN_JSON", train_json, "DATASETS.TRAIN_IMAGES", train_images,
        "DATASETS.TEST_JSON", train_json, "DATASETS.TEST_IMAGES", train_images, "SOLVER.MAX_ITER", "5",
    ]  # fmt: skip


def load(*opts):
    return load_config(str(OLD_RUN / "config.yaml"), [str(opt) for opt in opts])


def test_one_warning_lists_the_renamed_keys(caplog):
    with caplog.at_level(logging.WARNING):
        cfg = load()
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    text = record.getMessage()
    assert "config.yaml" in text and "MODEL.SPARSE_INST.INFERENCE.CUDA_GRAPHS -> removed" in text
    assert "MODEL.SPARSE_INST.OUTPUT_MASK_FORMAT -> MODEL.OUTPUT.MASK_FORMAT" in text
    assert "MODEL.SPARSE_INST.INFERENCE.WINOGRAD -> RUNTIME.WINOGRAD" in text
    assert "full_model -> SOLVER.CLIP_TOTAL_NORM 10.0" in text
    assert (cfg.MODEL.OUTPUT.MASK_FORMAT, cfg.RUNTIME.WINOGRAD, cfg.RUNTIME.FUSE) == ("rle", False, True)
    assert (cfg.SOLVER.CLIP_TOTAL_NORM, cfg.SOLVER.CLIP_GRADIENTS.ENABLED) == (10.0, False)


def test_what_is_written_anew_needs_no_translation(tmp_path, caplog):
    (tmp_path / "config.yaml").write_text(load().dump())
    caplog.clear()
    again = load_config(str(tmp_path / "config.yaml"))
    assert not caplog.records and again.dump() == load().dump()


def test_it_is_resumed_and_evaluated(opts, tmp_path):
    pytest.importorskip("timm", reason="the package timm is not installed (pip install 'sparseinst[timm]')")
    shutil.copy(OLD_RUN / "model_final.pth", tmp_path)
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    cfg = load(*opts, "OUTPUT_DIR", tmp_path)
    register_user_datasets(cfg)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 4
    # The optimizer's state is that of the checkpoint, to the bit.
    saved = torch.load(OLD_RUN / "model_final.pth", weights_only=True)
    (state,) = [value["optimizer"] for value in (saved["trainer"], saved) if "optimizer" in value][:1]
    found = trainer.optimizer.state_dict()
    assert len(found["state"]) == len(state["state"]) > 0
    for index, values in state["state"].items():
        assert all(torch.equal(found["state"][index][name], value) for name, value in values.items())
    for ours, theirs in zip(found["param_groups"], state["param_groups"]):
        assert (ours["lr"], ours["weight_decay"], ours["params"]) == (
            theirs["lr"], theirs["weight_decay"], theirs["params"],
        )  # fmt: skip
    assert "segm" in trainer.train()
    assert trainer.steps_done == 5


def test_train_net_evaluates_it(opts, tmp_path):
    pytest.importorskip("timm", reason="the package timm is not installed (pip install 'sparseinst[timm]')")
    data = ["--test-json", opts[1], "--test-images", opts[3]]
    weights = ["MODEL.WEIGHTS", str(OLD_RUN / "model_final.pth"), "OUTPUT_DIR", str(tmp_path)]
    arguments = ["--config-file", str(OLD_RUN / "config.yaml"), *data, "--eval-only", *weights]
    with loggers_restored():
        results = train_net.main(train_net.build_parser().parse_args(arguments))
    assert json.loads((tmp_path / "results.json").read_text())["results"].keys() == results.keys() >= {"segm"}

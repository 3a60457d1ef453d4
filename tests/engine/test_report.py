"""The plots of a run: written at the end, without any random number, and never at the cost of the training."""

import json
import logging
import random

import numpy as np
import pytest
import torch
from PIL import Image

from sparseinst.engine import report
from sparseinst.engine.report import evaluation_report, write_plot
from sparseinst.engine.trainer import Trainer
from sparseinst.evaluation import evaluate
from tests.shapes_data import register_shapes
from tests.tiny_model import tiny_cfg, tiny_model

OF_EVALUATION = {"val_predictions.jpg", "pr_curve.png", "confusion_matrix.png"}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return register_shapes(folder, "report_train", 4), register_shapes(folder, "report_val", 3, seed=1)


def make_cfg(shapes, output_dir, *opts):
    return tiny_cfg(
        "DATASETS.TRAIN", shapes[:1], "DATASETS.TEST", shapes[1:], "MODEL.SPARSE_INST.DECODER.NUM_CLASSES", 4,
        "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (), "OUTPUT_DIR", str(output_dir),
        "MODEL.SPARSE_INST.CLS_THRESHOLD", 0.0, "MODEL.SPARSE_INST.MASK_THRESHOLD", 0.001, "TEST.PLOTS", True, *opts,
    )  # fmt: skip


def files(folder):
    return {path.name for path in folder.iterdir() if path.suffix in (".png", ".jpg")}


def run(cfg):
    model = tiny_model("MODEL.SPARSE_INST.DECODER.NUM_CLASSES", 4, "MODEL.SPARSE_INST.CLS_THRESHOLD", 0.0)
    return evaluate(cfg, model, evaluation_report(cfg))


def test_a_training_ends_with_all_plots(shapes, tmp_path):
    torch.manual_seed(0)
    trainer = Trainer(make_cfg(shapes, tmp_path, "SEED", 1))
    trainer.resume_or_load(resume=False)
    assert "segm" in trainer.train()
    assert files(tmp_path) == {*OF_EVALUATION, "curves.png"}
    for name in files(tmp_path):
        assert min(Image.open(tmp_path / name).size) > 200
    assert not list(tmp_path.glob(".*.partial"))
    assert {"lr_heads", "lr_backbone"} <= json.loads((tmp_path / "metrics.json").read_text().splitlines()[0]).keys()


def test_no_random_number_is_drawn(shapes, tmp_path):
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    cfg = make_cfg(shapes, tmp_path)
    outcomes = []
    model = tiny_model("MODEL.SPARSE_INST.DECODER.NUM_CLASSES", 4, "MODEL.SPARSE_INST.CLS_THRESHOLD", 0.0)
    evaluate(cfg, model, lambda *arguments: outcomes.append(arguments))
    before = states()
    evaluation_report(cfg)(*outcomes[0])
    assert states() == before and files(tmp_path) == OF_EVALUATION


def test_no_plots(shapes, tmp_path):
    cfg = make_cfg(shapes, tmp_path, "TEST.PLOTS", False)
    assert evaluation_report(cfg) is None and run(cfg)["segm"] and not files(tmp_path)


def test_two_data_sets_have_plots_of_their_own(shapes, tmp_path):
    run(make_cfg(shapes, tmp_path, "DATASETS.TEST", shapes))
    stems = ("val_predictions_{}.jpg", "pr_curve_{}.png", "confusion_matrix_{}.png")
    assert files(tmp_path) == {stem.format(name) for stem in stems for name in shapes}


@pytest.mark.parametrize("broken", ["draw_confusion_matrix", "match_masks", "read_image", "draw_precision_recall"])
def test_a_plot_that_fails_costs_one_warning(shapes, tmp_path, monkeypatch, caplog, broken):
    def fail(*args, **kwargs):
        raise ZeroDivisionError("of the plot\nin two lines")

    monkeypatch.setattr(report, broken, fail)
    with caplog.at_level(logging.WARNING, "sparseinst"):
        assert run(make_cfg(shapes, tmp_path))["segm"]
    (warning,) = [record.message for record in caplog.records if "not drawn" in record.message]
    assert warning.endswith("not drawn: ZeroDivisionError: of the plot in two lines")


def test_a_plot_that_cannot_be_written(tmp_path, caplog):
    (tmp_path / "folder").write_text("in the way")
    write_plot(tmp_path / "folder" / "x.png", lambda: b"")
    assert len(caplog.records) == 1 and "not drawn" in caplog.text

"""--resume finds the checkpoint to continue from, whatever happened to the record and to the file times."""

import logging
import os

import pytest
import torch
from torch import nn

from sparseinst.checkpoint import SparseInstCheckpointer
from sparseinst.checkpoint.resumption import find_checkpoint
from sparseinst.engine.output_folder import check_no_earlier_run


class Steps:
    def state_dict(self):
        return {"steps": 1}

    def load_state_dict(self, state_dict):
        self.loaded = state_dict


@pytest.fixture
def folder(tmp_path):
    """Two numbered checkpoints, the final one, and file times that say the opposite."""
    checkpointer = SparseInstCheckpointer(nn.Linear(2, 3), str(tmp_path), trainer=Steps())
    for name, iteration in (("model_0000001", 1), ("model_0000003", 3), ("model_final", 3), ("model_best", 1)):
        checkpointer.save(name, iteration=iteration)
        os.utime(tmp_path / f"{name}.pth", (2e9 - 1e6 * iteration,) * 2)
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    return tmp_path


def test_the_record_decides(folder):
    (folder / "last_checkpoint").write_text("model_best.pth\n")
    assert find_checkpoint(folder) == (folder / "model_best.pth", "")


@pytest.mark.parametrize("record", [None, bytes(16), b"x" * 5000, b"model_gone.pth", b"", b"\xff\xfe", b"."])
def test_without_a_record_the_highest_iteration_is_taken(folder, record):
    (folder / "last_checkpoint").unlink()
    if record is not None:
        (folder / "last_checkpoint").write_bytes(record)
    path, reason = find_checkpoint(folder)
    assert path == folder / "model_final.pth"
    assert "last_checkpoint" in reason and "highest iteration, 3" in reason and "\n" not in reason


def test_circular_links(folder):
    (folder / "model_0000009.pth").symlink_to("model_0000009.pth")
    (folder / "last_checkpoint").unlink()
    (folder / "last_checkpoint").symlink_to("last_checkpoint")
    path, reason = find_checkpoint(folder)
    assert path == folder / "model_final.pth" and "last_checkpoint cannot be read" in reason
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run"):
        check_no_earlier_run(folder)


def test_an_empty_folder(tmp_path):
    assert find_checkpoint(tmp_path) == (None, "")
    (tmp_path / "last_checkpoint").write_text("model_gone.pth")
    assert find_checkpoint(tmp_path) == (None, "")


def test_damaged_checkpoints_are_passed_over_by_iteration(folder, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("sparseinst"), "propagate", True)
    (folder / "last_checkpoint").unlink()
    (folder / "model_final.pth").write_bytes(b"damaged")
    trainer = Steps()
    checkpointer = SparseInstCheckpointer(nn.Linear(2, 3), str(folder), trainer=trainer)
    rest = checkpointer.resume_or_load("", resume=True)
    assert rest["iteration"] == 3 and trainer.loaded == {"steps": 1}
    assert "last_checkpoint is missing: model_0000003.pth is taken" in caplog.text


def test_bare_weights_are_no_resumption(tmp_path):
    model = nn.Linear(2, 3)
    torch.save({"model": model.state_dict()}, tmp_path / "model_final.pth")
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    with pytest.raises(
        ValueError, match="model_final.pth holds weights without the state of a training.*MODEL.WEIGHTS"
    ):
        SparseInstCheckpointer(model, str(tmp_path), trainer=Steps()).resume_or_load("", resume=True)
    # An evaluation needs no more.
    SparseInstCheckpointer(model, str(tmp_path)).resume_or_load("", resume=True)

"""The beginning of a run: config.yaml and log.txt on a full disk, and the seed."""

import argparse
import logging

import pytest
import torch
from detectron2.utils.logger import setup_logger

from sparseinst.checkpoint import OutputError
from sparseinst.engine import run_setup
from sparseinst.engine.run_setup import save_config, set_up_loggers, set_up_run
from tests.disk import little_room


@pytest.fixture(autouse=True)
def loggers(monkeypatch):
    """Undo the changes of the loggers."""
    monkeypatch.setattr(run_setup, "_failed", set())
    yield
    for name in run_setup.LOGGERS:
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    setup_logger.cache_clear()


@pytest.mark.parametrize(("eval_only", "name"), [(False, "config.yaml"), (True, "inference/config.yaml")])
def test_a_full_disk_leaves_the_earlier_config(tmp_path, eval_only, name):
    save_config(str(tmp_path), "KEY: old\n", eval_only=eval_only)
    with little_room(100), pytest.raises(OutputError, match="config.yaml cannot be written: File too large"):
        save_config(str(tmp_path), "KEY: new\n" * 30, eval_only=eval_only)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files == [tmp_path / name] and files[0].read_text() == "KEY: old\n"


def test_rank_0_alone_saves_the_config(tmp_path, monkeypatch):
    monkeypatch.setattr(run_setup.comm, "is_main_process", lambda: False)
    save_config(str(tmp_path), "KEY: 1\n", eval_only=True)
    assert list(tmp_path.iterdir()) == []


def test_a_log_that_cannot_be_written_costs_one_line(tmp_path, capsys):
    with little_room(400):
        set_up_loggers(str(tmp_path))
        for index in range(50):
            logging.getLogger("sparseinst").info("line %d", index)
    printed = capsys.readouterr()
    assert "line 49" in printed.out
    assert printed.err.startswith("WARNING: lines of the log cannot be written") and printed.err.count("\n") == 1
    assert "line 0" in (tmp_path / "log.txt").read_text()


def test_each_rank_has_its_own_random_numbers(monkeypatch):
    monkeypatch.setattr(run_setup, "collect_env_info", lambda: "")

    def drawn(seed, rank):
        monkeypatch.setattr(run_setup.comm, "get_rank", lambda: rank)
        set_up_run(argparse.Namespace(), "", seed=seed, cudnn_benchmark=False)
        return torch.rand(3).tolist()

    assert drawn(4, 0) == drawn(4, 0) != drawn(4, 1)
    assert drawn(4, 1) == drawn(5, 0) != drawn(5, 1)

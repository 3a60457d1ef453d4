"""Trainings that end early: by a signal that ends the data workers too, as clusters send it, or by an error."""

import contextlib
import itertools
import signal
import sys
from types import SimpleNamespace

import pytest
import torch

from sparseinst.data.loader import WorkerDiedError
from sparseinst.engine.interruption import TrainingInterrupted
from sparseinst.engine.trainer import Trainer
from tests.shapes_data import register_shapes
from tests.tiny_model import tiny_cfg


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return register_shapes(tmp_path_factory.mktemp("shapes"), "interruption_train")


def make_trainer(shapes, output_dir, *opts, resume=False):
    torch.manual_seed(0)
    trainer = Trainer(
        tiny_cfg(
            "DATASETS.TRAIN", (shapes,), "DATASETS.TEST", (), "MODEL.SPARSE_INST.DECODER.NUM_CLASSES", 4,
            "INPUT.MIN_SIZE_TRAIN", (32,), "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 4, "SOLVER.BASE_LR", 1e-3,
            "OUTPUT_DIR", str(output_dir), "SEED", 3, *opts,
        )
    )  # fmt: skip
    trainer.resume_or_load(resume=resume)
    return trainer


def test_workers_that_are_missed_between_two_steps(shapes, tmp_path):
    """The state after the last complete step is saved, and the resumed training ends as an undisturbed one."""
    whole = make_trainer(shapes, tmp_path / "whole")
    whole.train()
    trainer = make_trainer(shapes, tmp_path / "run")
    batches = trainer.data_loader.batches

    def two_batches(start):
        yield from itertools.islice(batches(start), 2)
        trainer._signals.received = signal.SIGTERM
        raise WorkerDiedError

    trainer.data_loader.batches = two_batches
    with pytest.raises(TrainingInterrupted):
        trainer.train()
    assert [path.name for path in (tmp_path / "run").glob("model_*.pth")] == ["model_0000001.pth"]
    resumed = make_trainer(shapes, tmp_path / "run", resume=True)
    assert resumed.start_iter == 2
    resumed.train()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_workers_that_end_before_the_signal_arrives(shapes, tmp_path, monkeypatch):
    def fail(self):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated. ")

    monkeypatch.setattr(Trainer, "run_step", fail)
    with pytest.raises(TrainingInterrupted, match="SIGTERM"):
        make_trainer(shapes, tmp_path / "run").train()


def test_workers_that_die_without_a_signal(shapes, tmp_path):
    trainer = make_trainer(shapes, tmp_path / "run")

    def no_batches(start):
        raise WorkerDiedError
        yield

    trainer.data_loader.batches = no_batches
    with pytest.raises(WorkerDiedError):
        trainer.train()


@pytest.mark.parametrize(
    ("error", "ends"),
    [
        (None, ["FINISHED", 0]),
        (RuntimeError("out of memory"), ["FAILED", 1]),
        (TrainingInterrupted(signal.SIGTERM), ["KILLED", 1]),
        (KeyboardInterrupt(), ["KILLED", 1]),
    ],
)
def test_trackers_get_how_a_training_ended(shapes, tmp_path, monkeypatch, error, ends):
    found = []

    def ignore(*args, **kwargs):
        return run

    run = SimpleNamespace(
        id="8",
        info=SimpleNamespace(run_id="7"),
        log=ignore,
        finish=lambda exit_code=0: found.append(exit_code),
    )
    mlflow = {
        **dict.fromkeys(("start_run", "log_text", "log_metrics"), ignore),
        "end_run": lambda status="FINISHED": found.append(status),
    }
    for name, package in {"mlflow": mlflow, "wandb": {"init": ignore}}.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__spec__=SimpleNamespace(origin=name), **package))

    def end(self):
        if error:
            raise error

    monkeypatch.setattr(Trainer, "run_step", end)
    trainer = make_trainer(shapes, tmp_path / "run", "TRACKERS", ["mlflow", "wandb"])
    with pytest.raises(type(error)) if error else contextlib.nullcontext():
        trainer.train()
    assert found == ends

"""The lines of a training: when they come, and what they say."""

import logging
import time

import pytest
import torch
from detectron2.engine import TrainerBase, hooks
from torch import nn

from sparseinst.engine import progress
from sparseinst.engine.optimizer import parameter_groups
from sparseinst.engine.progress import Progress, learning_rate_groups


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)


class SlowTrainer(TrainerBase):
    """Takes its batch after ``reading`` seconds, and ``computing`` more for the step."""

    def __init__(self, reading=0.0, computing=0.0, multiplier=0.5):
        super().__init__()
        self.model = Model()
        groups = parameter_groups(self.model, base_lr=0.1, weight_decay=0.0, backbone_multiplier=multiplier)
        self.optimizer = torch.optim.SGD(groups, lr=0.1)
        self.batches, self.reading, self.computing = [], reading, computing

    def run_step(self):
        time.sleep(self.reading)
        self.batches = [self.iter]
        time.sleep(self.computing)
        self.storage.put_scalars(total_loss=float(self.iter), loss_a=1.0)


def lines(trainer, caplog, iterations, iterations_per_epoch=None):
    trainer.register_hooks([Progress(trainer.model, iterations_per_epoch)])
    with caplog.at_level(logging.INFO, "sparseinst"):
        trainer.train(0, iterations)
    return [record.message for record in caplog.records if record.name == "sparseinst.engine.progress"]


def test_first_last_and_every_twentieth_iteration(caplog):
    found = lines(SlowTrainer(), caplog, 45, iterations_per_epoch=10)
    assert [line.split("iter: ")[1].split()[0] for line in found] == ["1/45", "20/45", "40/45", "45/45"]
    assert "epoch: 4.50/4.50" in found[-1] and found[-1].startswith("eta: 0:00:00")
    assert "lr_heads: 0.1  lr_backbone: 0.05" in found[0] and "total_loss: 0 " in found[0] and "loss_a: 1 " in found[0]


def test_without_epochs(caplog):
    assert "epoch" not in lines(SlowTrainer(), caplog, 1)[0]


def test_the_mean_time_leaves_the_first_iterations_out(caplog):
    trainer = SlowTrainer()
    # The first two are slow at the start of a training, the fifth because of its data.
    run_step, seconds = trainer.run_step, {0: 0.5, 1: 0.5, 4: 0.4}
    trainer.run_step = lambda: (time.sleep(seconds.get(trainer.iter, 0.0)), run_step())
    trainer.register_hooks([hooks.IterationTimer()])
    lines(trainer, caplog, 6)
    # One of four iterations takes 0.4 s.
    assert trainer.storage.latest()["mean_time"][0] == pytest.approx(0.1, abs=0.05)


def test_slow_steps_have_lines_of_their_own(caplog, monkeypatch):
    monkeypatch.setattr(progress, "MAX_SILENCE", 0.05)
    found = lines(SlowTrainer(computing=0.06), caplog, 4)
    assert sum("total_loss" in line for line in found) == 4


@pytest.mark.parametrize(("slow", "word"), [("reading", "waiting for images"), ("computing", "computing the step")])
def test_a_step_that_hangs_says_what_it_waits_for(caplog, monkeypatch, slow, word):
    monkeypatch.setattr(progress, "MAX_SILENCE", 0.1)
    monkeypatch.setattr(progress, "POLL", 0.01)
    found = lines(SlowTrainer(**{slow: 0.5}), caplog, 1)
    # After 0.1 and 0.3 s: each wait is twice the last.
    assert [line.startswith(f"iter: 1/1  {word} for") for line in found] == [True, True, False]


def test_learning_rates_of_a_model_without_a_trained_backbone():
    model = Model()
    model.backbone.requires_grad_(False)
    optimizer = torch.optim.SGD(parameter_groups(model, base_lr=0.1, weight_decay=0.0), lr=0.1)
    assert learning_rate_groups(model, optimizer).keys() == {"lr_heads"}

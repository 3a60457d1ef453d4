"""The benchmark of ground truth, matcher and criterion: both ways compute the same, and memory is counted exactly."""

import pytest
import torch

from sparseinst.data import SparseInstDatasetMapper
from sparseinst.engine import target_benchmark
from sparseinst.engine.target_benchmark import WAYS, TargetBenchmark, main, peak_bytes
from tests.tiny_model import tiny_cfg, tiny_model

QUICK = ["--config-file", "quick/shapes", "--size", "64", "64", "--repetitions", "1", "--threads", "1"]


def test_memory_is_the_most_that_there_was_at_once():
    def function():
        first = torch.zeros(1000)  # 4000 bytes
        second = torch.zeros(2000)
        del first
        third = torch.zeros(500)
        del second, third

    assert peak_bytes(function, torch.device("cpu")) == 12000
    assert peak_bytes(lambda: None, torch.device("cpu")) == 0


@pytest.mark.parametrize("opts", [[], ["MODEL.SPARSE_INST.ANTIALIASED_TARGETS", True]], ids=["", "antialiased"])
def test_both_ways_compute_the_same(opts):
    opts = [*opts, "MODEL.SPARSE_INST.MATCHER.GAMMA", 0.8, "MODEL.SPARSE_INST.LOSS.IAM_WEIGHT", 1.0]
    model, cfg = tiny_model(*opts).train(), tiny_cfg(*opts)
    mappers = {
        "plain": SparseInstDatasetMapper(cfg, is_train=True),
        "ours": SparseInstDatasetMapper(cfg, is_train=True, mask_grid=model.mask_grid),
    }
    benchmark = TargetBenchmark(model, mappers, 2, (60, 90), 9)
    gradients = {}
    for way in WAYS:
        assert min(benchmark.step(way)) > 0
        gradients[way] = [output.grad for output in benchmark.outputs.values()]
    for plain, ours in zip(gradients["plain"], gradients["ours"], strict=True):
        torch.testing.assert_close(plain, ours, rtol=1e-5, atol=1e-7)
    assert benchmark.memory("ours") < benchmark.memory("plain")


def test_the_command(capsys):
    assert main([*QUICK, "--instances", "1", "20", "--opts", "MODEL.DEVICE", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "matcher ms" in printed and "memory of 20 instances less 1: plain" in printed
    assert [line.split()[:2] for line in printed.splitlines()[2:6]] == [
        ["1", "plain"], ["1", "ours"], ["20", "plain"], ["20", "ours"]
    ]  # fmt: skip


def test_what_cannot_be_measured(capsys, monkeypatch):
    assert main([*QUICK, "--images", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err
    monkeypatch.setattr(target_benchmark, "build_model", lambda cfg: torch.nn.Linear(1, 1))
    assert main(QUICK) == 2
    assert "MODEL.META_ARCHITECTURE gives a Linear" in capsys.readouterr().err

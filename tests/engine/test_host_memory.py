"""Freed memory that stays with the process, told by the pages that the system has to give it."""

import platform
import subprocess
import sys

import pytest

from sparseinst.engine import host_memory
from sparseinst.engine.host_memory import keep_freed_memory, keep_freed_memory_as_configured
from sparseinst.engine.setup import load_config

# In a process of its own, since it cannot be taken back. glibc keeps up to seven small rests of aligned blocks between
# large ones, so the first rounds are not counted.
SCRIPT = """
import resource, sys, torch
from sparseinst.engine.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc can be told to")
def test_a_tensor_costs_no_page():
    done = subprocess.run([sys.executable, "-c", SCRIPT, "keep"], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100


@pytest.mark.parametrize("error", [AttributeError, OSError, TypeError])
def test_another_c_library(monkeypatch, error):
    def cdll(name):
        raise error("no such function")

    monkeypatch.setattr("ctypes.CDLL", cdll)
    assert not keep_freed_memory()


@pytest.mark.parametrize(
    ("device", "solver", "inference", "training", "expected"),
    [
        ("cpu", False, True, False, True),
        ("cpu", False, True, True, False),
        ("cpu", True, False, True, True),
        ("cpu", True, False, False, False),
        ("cuda", True, True, True, False),
    ],
)
def test_keys(monkeypatch, device, solver, inference, training, expected):
    cfg = load_config("sparse_inst_r50_giam", ["MODEL.DEVICE", "cpu"])
    assert (cfg.SOLVER.KEEP_FREED_MEMORY, cfg.MODEL.SPARSE_INST.INFERENCE.KEEP_FREED_MEMORY) == (False, True)
    cfg.MODEL.DEVICE = device
    cfg.SOLVER.KEEP_FREED_MEMORY = solver
    cfg.MODEL.SPARSE_INST.INFERENCE.KEEP_FREED_MEMORY = inference
    calls = []
    monkeypatch.setattr(host_memory, "keep_freed_memory", lambda: not calls.append(1))
    assert keep_freed_memory_as_configured(cfg, training) is bool(calls) is expected

"""What is freed is kept; seen from how many pages the system has to fill anew. In processes of their own."""

import os
import subprocess
import sys

import pytest

from sparseinst.config import load_config
from sparseinst.engine import host_memory

# The first rounds are not counted: of aligned pieces glibc leaves up to seven small rests between large ones.
CODE = """
import resource, sys
import torch
from sparseinst.engine.host_memory import keep_freed_memory

print(keep_freed_memory(all_sizes=sys.argv[1] == "all"))
for mebibytes in map(int, sys.argv[2:]):
    for _ in range(20):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensors = [torch.ones(mebibytes * 2**18) for _ in range(4)]
        del tensors
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(which, *mebibytes, **variables):
    environment = {name: value for name, value in os.environ.items() if name not in host_memory._VARIABLES}
    command = [sys.executable, "-c", CODE, which, *map(str, mebibytes)]
    done = subprocess.run(command, env={**environment, **variables}, capture_output=True, text=True, check=True)
    is_kept, *num_faults = done.stdout.split()
    return is_kept == "True", *map(int, num_faults)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc is set, which is Linux's")
def test_freed_memory_is_kept_unless_the_environment_says_otherwise():
    # Four of 12 MiB are 12288 pages of 4 KiB, fewer where the system gives larger ones.
    is_kept, num_faults, num_faults_large = run("small", 12, 40)
    if not is_kept:
        pytest.skip("the C library has no mallopt")
    assert num_faults < 10
    is_kept, num_faults = run("small", 12, MALLOC_TRIM_THRESHOLD_="65536", MALLOC_MMAP_THRESHOLD_="65536")
    assert not is_kept and num_faults > 20
    # Larger than what is kept otherwise.
    assert run("all", 40)[1] < 10 < num_faults_large


def test_elsewhere_nothing_is_done(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: pytest.fail("not to be asked for"))
    assert not host_memory.keep_freed_memory()


@pytest.mark.parametrize(("device", "key"), [("cpu", True), ("cpu", False), ("cuda", True)])
def test_the_key_of_inference(monkeypatch, device, key):
    cfg = load_config("sparse_inst_r50_giam", ["MODEL.DEVICE", "cpu"])
    assert cfg.RUNTIME.KEEP_FREED_MEMORY
    cfg.MODEL.DEVICE, cfg.RUNTIME.KEEP_FREED_MEMORY = device, key
    calls = []
    monkeypatch.setattr(host_memory, "keep_freed_memory", lambda all_sizes: not calls.append(all_sizes))
    assert host_memory.keep_freed_memory_for_inference(cfg) is (device == "cpu" and key)
    assert calls == [True] * (device == "cpu" and key)

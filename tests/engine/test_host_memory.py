"""What is freed is kept; seen from how many pages the system has to fill anew. In processes of their own."""

import os
import subprocess
import sys

import pytest

from sparseinst.engine import host_memory

CODE = """
import resource
import torch
from sparseinst.engine.host_memory import keep_freed_memory

print(keep_freed_memory())
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    # 48 MiB, which are freed together.
    tensors = [torch.ones(3 * 2**20) for _ in range(4)]
    del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(**variables):
    environment = {name: value for name, value in os.environ.items() if name not in host_memory._VARIABLES}
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, env={**environment, **variables}, capture_output=True, text=True, check=True)
    is_kept, num_faults = done.stdout.split()
    return is_kept == "True", int(num_faults)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc is set, which is Linux's")
def test_freed_memory_is_kept_unless_the_environment_says_otherwise():
    is_kept, num_faults = run()
    if not is_kept:
        pytest.skip("the C library has no mallopt")
    # 48 MiB are 12288 pages of 4 KiB, fewer where the system gives larger ones.
    assert num_faults < 10
    is_kept, num_faults = run(MALLOC_TRIM_THRESHOLD_="65536", MALLOC_MMAP_THRESHOLD_="65536")
    assert not is_kept and num_faults > 20


def test_elsewhere_nothing_is_done(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not host_memory.keep_freed_memory()

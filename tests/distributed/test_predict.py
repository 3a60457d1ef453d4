"""`sparseinst predict` under torchrun: a killed process ends the run, and the same command completes it."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from sparseinst.inference.resumable_file import shards
from tests.distributed.commands import REPO, TIMEOUT, Command, processes, wait_until
from tests.tiny_model import tiny_cfg, tiny_model
from tests.tools.demo_scenes import save_scene

NUM_IMAGES = 150


@pytest.fixture
def arguments(tmp_path):
    opts = ("MODEL.SPARSE_INST.CLS_THRESHOLD", 0.0, "MODEL.WEIGHTS", str(tmp_path / "model.pth"))
    torch.save({"model": tiny_model(*opts[:2]).state_dict()}, tmp_path / "model.pth")
    (tmp_path / "tiny.yaml").write_text(tiny_cfg(*opts).dump())
    for index in range(NUM_IMAGES):
        save_scene(tmp_path / "in" / f"{index:03}.png", (90, index, 90), size=(240, 320))
    return ["predict", "--config-file", str(tmp_path / "tiny.yaml"), "--input", str(tmp_path / "in"), "--output"]


def by_torchrun(arguments):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "sparseinst"]
    return [sys.executable, *launcher, *map(str, arguments)]


def test_a_killed_process_and_the_same_command_again(tmp_path, arguments):
    output = tmp_path / "out.jsonl"
    command = Command(by_torchrun([*arguments, output]), tmp_path / "log")
    wait_until(lambda: not command.is_alive() or len(shards(output)) == 2, TIMEOUT)
    wait_until(lambda: not command.is_alive() or shards(output)[1].read_bytes().count(b"\n") > 3, TIMEOUT)
    known = processes()
    ranks = [pid for pid in command.descendants() if known[pid][0] == command.pid and "predict" in known[pid][1]]
    assert len(ranks) == 2, command.stderr
    os.kill(ranks[1], signal.SIGKILL)
    assert command.wait() != 0
    assert len(shards(output)) == 2 and not (output.exists() and output.read_bytes())
    again = Command(by_torchrun([*arguments, output]), tmp_path / "again")
    assert again.wait() == 0, again.stderr
    assert "images had a line already" in again.stdout and f"{output}: all {NUM_IMAGES} images" in again.stdout
    alone = [sys.executable, "-m", "sparseinst", *arguments, str(tmp_path / "one.jsonl")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    subprocess.run(alone, cwd=REPO, env=environment, check=True, capture_output=True)
    assert output.read_bytes() == (tmp_path / "one.jsonl").read_bytes() and not shards(output)

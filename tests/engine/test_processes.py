"""What is refused before processes are started, and what torchrun's processes are told by."""

import argparse
import atexit
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.utils import comm

from sparseinst.engine.processes import check_process_arguments, is_started_by_torchrun, run_processes
from sparseinst.tools.train_net import build_parser

TWO_MACHINES = ["--num-machines", "2", "--machine-rank", "1"]


def check(*flags):
    check_process_arguments(build_parser().parse_args(list(flags)))


def start_by_torchrun(monkeypatch, local_world_size, world_size):
    for name, value in (
        ("RANK", 1), ("LOCAL_RANK", 1), ("WORLD_SIZE", world_size), ("LOCAL_WORLD_SIZE", local_world_size),
    ):  # fmt: skip
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-gpus", "0"], "--num-gpus 0"),
        (["--num-machines", "0"], "--num-machines 0"),
        (["--num-machines", "2", "--machine-rank", "2"], "--machine-rank is 2; it must be from 0 to 1"),
        (["--machine-rank", "-1"], "--machine-rank is -1"),
        (["--dist-timeout", "0"], "--dist-timeout"),
        ([*TWO_MACHINES, "--dist-url", "auto"], "--dist-url is auto"),
        ([*TWO_MACHINES, "--dist-url", "tcp://localhost"], "tcp://HOST:PORT"),
        ([*TWO_MACHINES, "--dist-url", "tcp://:29500"], "tcp://HOST:PORT"),
        ([*TWO_MACHINES, "--dist-url", "tcp://localhost:99999"], "tcp://HOST:PORT"),
        ([*TWO_MACHINES, "--dist-url", "localhost:29500"], "tcp://HOST:PORT"),
    ],
)
def test_refused_by_name(flags, message):
    with pytest.raises(ValueError, match=message):
        check(*flags)


def test_accepted():
    check()
    check("--num-gpus", "2", "--dist-url", "auto")
    check(*TWO_MACHINES, "--dist-url", "tcp://localhost:29500")
    check(*TWO_MACHINES, "--dist-url", "file:///tmp/store")


def test_torchrun_s_own_numbers_count(monkeypatch):
    assert not is_started_by_torchrun()
    start_by_torchrun(monkeypatch, local_world_size=2, world_size=6)
    assert is_started_by_torchrun()
    check()
    check("--num-gpus", "2", "--num-machines", "3")
    with pytest.raises(ValueError, match="leave out --num-gpus"):
        check("--num-gpus", "3")
    with pytest.raises(ValueError, match="leave out --num-machines"):
        check("--num-machines", "2")
    start_by_torchrun(monkeypatch, local_world_size=2, world_size=3)
    with pytest.raises(ValueError, match="as many on each"):
        check()


def write_threads(folder, rank):
    tasks = Path("/proc/self/task").iterdir()
    (folder / f"threads{rank}").write_text("\n".join((task / "comm").read_text().strip() for task in tasks))


def reduce_and_note_threads(args):
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 3))
    model.cycle = [model]
    model(torch.rand(2, 3)).sum().backward()
    comm.gather(1)
    write_threads(args.folder / "in_main", comm.get_rank())
    atexit.register(write_threads, args.folder / "at_exit", comm.get_rank())


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="names of threads come from Linux's /proc")
@pytest.mark.parametrize("launcher", [[], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]])
def test_no_thread_of_gloo_outlives_main(launcher, tmp_path):
    for when in ("in_main", "at_exit"):
        (tmp_path / when).mkdir()
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    subprocess.run([sys.executable, *launcher, __file__, str(tmp_path)], env=environment, check=True, timeout=120)
    for rank in range(2):
        assert "gloo" in (tmp_path / "in_main" / f"threads{rank}").read_text()
        assert "gloo" not in (tmp_path / "at_exit" / f"threads{rank}").read_text()


if __name__ == "__main__":
    num_gpus = 1 if is_started_by_torchrun() else 2
    namespace = {"num_gpus": num_gpus, "num_machines": 1, "machine_rank": 0, "dist_url": "auto", "dist_timeout": 2}
    run_processes(reduce_and_note_threads, argparse.Namespace(**namespace, folder=Path(sys.argv[1])))

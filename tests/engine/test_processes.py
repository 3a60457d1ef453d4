"""What is refused before processes are started, and what torchrun's processes are told by."""

import pytest

from sparseinst.engine.processes import check_process_arguments, is_started_by_torchrun
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

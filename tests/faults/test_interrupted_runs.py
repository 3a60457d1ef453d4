"""Trainings that are killed at random moments and resumed end with the weights of one that was left alone."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.faults.child import Child, is_full, num_cases, run_in_child
from tests.faults.interrupted_run import MAX_ITER, phase, train, write_config
from tests.shapes_data import write_shapes

TIMEOUT = 120
REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupted")
    config = folder / "run.yaml"
    write_config(config, write_shapes(folder, 8), write_shapes(folder, 3, seed=1, split="test"))
    # The first child waits for the server's imports; how long a run takes, the second one tells.
    run_in_child(train, config, folder / "first", False, 3, timeout=TIMEOUT)
    output = folder / "whole"
    outcome = run_in_child(train, config, output, False, 3, timeout=TIMEOUT)
    assert outcome.exit_code == 0, outcome.output
    return folder, config, output, outcome.seconds


def assert_same_end(first, second):
    """Weights, optimizer, schedule, scores: all that the final checkpoint holds."""
    first, second = (torch.load(folder / "model_final.pth", weights_only=True) for folder in (first, second))
    assert first["iteration"] == second["iteration"] == MAX_ITER - 1
    assert_equal(first, second, "model_final")


def assert_equal(first, second, name):
    if isinstance(first, dict):
        assert first.keys() == second.keys(), name
        for key in first:
            assert_equal(first[key], second[key], f"{name}.{key}")
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second), name
    else:
        assert first == second, name


def interrupt(child, output, signal_number, wanted_phase, delay):
    """Send a signal after a delay, counted from the wanted phase where one is given. Returns the phase it struck."""
    if wanted_phase is not None:
        while child.is_alive() and phase(output, child.output()) != wanted_phase:
            time.sleep(0.005)
    until = time.monotonic() + delay
    while child.is_alive() and time.monotonic() < until:
        time.sleep(0.005)
    if not child.is_alive():
        return "finished"
    struck = phase(output, child.output())
    child.send(signal_number)
    return struck


def test_killed_at_random_moments(workspace):
    folder, config, whole, seconds = workspace
    rng = random.Random(0)
    output = folder / "killed"
    phases = Counter()
    # One of six in an evaluation, one in the middle of writing a checkpoint, four at moments uniform over a run.
    aimed = Counter()
    while phases.total() - phases["finished"] < num_cases(1, 50) or aimed["saving"] < num_cases(1, 12):
        wanted = [None, "evaluating", "saving", None, None, None][(phases + aimed).total() % 6]
        child = Child(train, config, output, wanted == "saving", 3)
        delay = rng.uniform(0, 0.2 if wanted else seconds)
        struck = interrupt(child, output, signal.SIGKILL, wanted, delay)
        outcome = child.wait(TIMEOUT)
        assert not outcome.timed_out
        if outcome.exit_code == 0:
            assert_same_end(whole, output)
            shutil.rmtree(output)
            phases["finished"] += 1
            continue
        assert outcome.signal == signal.SIGKILL, outcome.output
        (aimed if wanted else phases)[struck] += 1
    outcome = run_in_child(train, config, output, False, 3, timeout=TIMEOUT)
    assert outcome.exit_code == 0, outcome.output
    assert_same_end(whole, output)
    assert not list(output.glob(".*.partial"))
    print("phases of SIGKILL at random:", dict(phases), "aimed at:", dict(aimed))


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop(workspace, signal_number):
    folder, config, whole, seconds = workspace
    rng = random.Random(signal_number)
    output = folder / f"signal_{signal_number}"
    phases = Counter()
    for number in range(num_cases(2 if signal_number == signal.SIGTERM else 1, 10)):
        child = Child(train, config, output, False, 3)
        wanted = "evaluating" if number % 2 else "training"
        struck = interrupt(child, output, signal_number, wanted, rng.uniform(0, 0.4))
        outcome = child.wait(TIMEOUT)
        phases["finished" if outcome.exit_code == 0 else struck] += 1
        if outcome.exit_code == 0:
            shutil.rmtree(output)
            continue
        assert outcome.exit_code == 128 + signal_number, outcome.output
        assert "--resume" in outcome.output
        newest = max(output.glob("model_*.pth"), key=os.path.getmtime)
        # In an evaluation that is made up for nothing is new.
        if struck == "training":
            # A data worker that is being started for an evaluation may print one.
            assert "Traceback" not in outcome.output, outcome.output[outcome.output.index("Traceback") - 200 :]
            assert f"Saving checkpoint to {newest}" in outcome.output
    outcome = run_in_child(train, config, output, False, 3, timeout=TIMEOUT)
    assert outcome.exit_code == 0, outcome.output
    assert_same_end(whole, output)
    print(f"phases of signal {signal_number}:", dict(phases))


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_training_and_its_workers_are_asked_to_stop(workspace, signal_number):
    """Clusters and `timeout` signal each process of a group."""
    folder, config, _, _ = workspace
    output, log = folder / f"group_{signal_number}", folder / f"group_{signal_number}.log"
    # A shell ignores SIGINT for its background commands.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "from sparseinst.tools import train_net; train_net.cli(sys.argv[1:])"
    command = [sys.executable, "-c", code, "--config-file", str(config), "--resume", "DATALOADER.NUM_WORKERS", "2"]
    command += ["SEED", "3", "SOLVER.MAX_ITER", "100000", "TEST.EVAL_PERIOD", "0", "OUTPUT_DIR", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    with log.open("w") as file:
        run = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    until = time.monotonic() + TIMEOUT
    while not (output / "model_0000002.pth").exists():
        assert run.poll() is None and time.monotonic() < until, log.read_text()
        time.sleep(0.01)
    os.killpg(run.pid, signal_number)
    assert run.wait(TIMEOUT) == 128 + signal_number, log.read_text()
    assert "Traceback" not in log.read_text() and "--resume" in log.read_text(), log.read_text()
    newest = max(output.glob("model_*.pth"), key=os.path.getmtime)
    # Periodic checkpoints are those of steps 3, 6, 9 and so on.
    assert f"Saving checkpoint to {newest}" in log.read_text().split("model_0000002.pth", 1)[1], log.read_text()


def test_a_seed_that_nobody_chose(workspace):
    """With SEED -1 the run remembers the one that it drew."""
    folder, config, _, _ = workspace
    first = folder / "unseeded"
    child = Child(train, config, first, False, -1)
    while child.is_alive() and not (first / "model_0000002.pth").exists():
        time.sleep(0.005)
    child.send(signal.SIGKILL)
    child.wait(TIMEOUT)
    second = folder / "unseeded_too"
    shutil.copytree(first, second)
    for output in (first, second):
        outcome = run_in_child(train, config, output, False, -1, timeout=TIMEOUT)
        assert outcome.exit_code == 0, outcome.output
    assert_same_end(first, second)


def test_a_damaged_checkpoint_is_passed_over(workspace):
    folder, config, whole, _ = workspace
    output = folder / "damaged"
    shutil.copytree(whole, output)
    (output / "model_final.pth").unlink()
    newest = output / f"model_{MAX_ITER - 1:07d}.pth"
    (output / "last_checkpoint").write_text(newest.name)
    newest.write_bytes(newest.read_bytes()[:100_000])
    outcome = run_in_child(train, config, output, False, 3, timeout=TIMEOUT)
    assert outcome.exit_code == 0, outcome.output
    assert f"Cannot resume from {newest}" in outcome.output
    assert_same_end(whole, output)


@pytest.mark.skipif(not is_full(), reason="slow: make test-faults")
def test_two_processes_are_killed_and_resumed(workspace):
    folder, config, _, _ = workspace
    command = [
        sys.executable, str(REPO / "train_net.py"), "--config-file", str(config), "--resume", "--num-gpus", "2",
        "--dist-url", "auto", "SEED", "3", "SOLVER.IMS_PER_BATCH", "4", "OUTPUT_DIR",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}

    def start(output):
        with (folder / "two.log").open("a") as log:
            return subprocess.Popen(
                [*command, str(output)], env=environment, stdout=log, stderr=log, start_new_session=True
            )

    whole, killed = folder / "two_whole", folder / "two_killed"
    assert start(whole).wait(TIMEOUT) == 0
    for name in ("model_0000002.pth", "model_0000005.pth"):
        run = start(killed)
        until = time.monotonic() + TIMEOUT
        while not (killed / name).exists():
            assert run.poll() is None and time.monotonic() < until, (folder / "two.log").read_text()
            time.sleep(0.01)
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    assert start(killed).wait(TIMEOUT) == 0
    assert_same_end(whole, killed)

"""train_net.py as a user starts it on several processes: by --num-gpus, on two machines, by torchrun."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.shapes_data import write_shapes
from tests.tiny_model import tiny_cfg

REPO = Path(__file__).resolve().parents[2]
# No command of these tests takes longer, on slow cores.
TIMEOUT = 240


def write_workspace(folder: Path, *opts) -> list[str]:
    """A config file and data; returns the arguments that name them."""
    cfg = tiny_cfg(
        "MODEL.SPARSE_INST.DECODER.NUM_CLASSES", 4, "MODEL.RESNETS.NORM", "FrozenBN", "SOLVER.IMS_PER_BATCH", 2,
        "SOLVER.STEPS", (), "SOLVER.WARMUP_ITERS", 0, *opts,
    )  # fmt: skip
    (folder / "tiny.yaml").write_text(cfg.dump())
    train_json, train_images = write_shapes(folder, 6)
    test_json, test_images = write_shapes(folder, 5, seed=1, split="test")
    return [
        "--config-file", str(folder / "tiny.yaml"), "--train-json", train_json, "--train-images", train_images,
        "--test-json", test_json, "--test-images", test_images,
    ]  # fmt: skip


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def by_launch(*args, script="train_net.py") -> list[str]:
    """Two processes of one machine."""
    return [sys.executable, str(REPO / script), "--num-gpus", "2", "--dist-url", "auto", *map(str, args)]


def by_two_machines(port: int, machine_rank: int, *args, num_gpus=1, script="train_net.py") -> list[str]:
    """One of two machines."""
    return [
        sys.executable, str(REPO / script), "--num-gpus", str(num_gpus), "--num-machines", "2",
        "--machine-rank", str(machine_rank), "--dist-url", f"tcp://127.0.0.1:{port}", *map(str, args),
    ]  # fmt: skip


def by_torchrun(*args, nodes=(), script="train_net.py") -> list[str]:
    """Two processes of one machine, or those of one node where ``nodes`` has torchrun's own arguments."""
    nodes = nodes or ["--standalone", "--nproc_per_node", "2"]
    return [sys.executable, "-m", "torch.distributed.run", *map(str, nodes), str(REPO / script), *map(str, args)]


class Command:
    """A command that runs beside the test.

    Args:
        command: its arguments.
        folder: its output goes to files in there.
        environment: on top of the test's own.
    """

    def __init__(self, command: list[str], folder: Path, **environment: str) -> None:
        folder.mkdir(exist_ok=True)
        self._stdout, self._stderr = folder / "stdout", folder / "stderr"
        self._process = subprocess.Popen(
            command,
            cwd=REPO,
            env={
                **os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(REPO),
                **environment,
            },
            stdout=self._stdout.open("w"),
            stderr=self._stderr.open("w"),
        )  # fmt: skip
        self.pid = self._process.pid

    @property
    def stdout(self) -> str:
        """What it has written so far."""
        return self._stdout.read_text()

    @property
    def stderr(self) -> str:
        """What it has written so far."""
        return self._stderr.read_text()

    def is_alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def wait(self, timeout: float = TIMEOUT) -> int:
        """Wait for its end; returns its exit code."""
        return self._process.wait(timeout)

    def send(self, signal_number: int) -> None:
        """Send a signal to it alone."""
        self._process.send_signal(signal_number)

    def descendants(self) -> list[int]:
        """Process ids of all that it has started, with what these have started, oldest first."""
        parents = {pid: parent for pid, (parent, _) in processes().items()}
        found = [self.pid]
        for pid in found:
            found += sorted(child for child, parent in parents.items() if parent == pid)
        return found[1:]

    def ranks(self) -> list[int]:
        """Process ids of the ranks of this machine, by rank."""
        known = processes()
        return [
            pid
            for pid in self.descendants()
            if any(word in known.get(pid, (0, ""))[1] for word in ("spawn_main", "train_net.py"))
            and known[pid][0] == self.pid
        ]

    def kill(self) -> None:
        """End it and all that it has started."""
        for pid in [self.pid, *self.descendants()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()


def processes() -> dict[int, tuple[int, str]]:
    """Parent and command line of every process that runs, by id; without those that have ended unread."""
    known = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    known[int(folder.name)] = (int(parent), (folder / "cmdline").read_bytes().decode())
    return known


def wait_until(condition, seconds: float) -> float:
    """Wait for a condition; returns how long it took, fails where that is too long."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"not within {seconds} s"
        time.sleep(0.05)
    return time.monotonic() - start

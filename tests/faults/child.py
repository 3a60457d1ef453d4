"""Run a function in a process of its own, and report how that process ended.

The processes are forked from one server that has imported what they need, so that each costs milliseconds. Fault tests
come in two lengths: short in `make test`, full in `make test-faults`, which sets SPARSEINST_FAULTS=full.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# What a child's exit code is where an exception passed through the function.
EXIT_EXCEPTION = 70

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch", "detectron2.engine", "detectron2.evaluation", "pycocotools.mask", "matplotlib.pyplot",
     "torch.utils.tensorboard", "scipy.optimize", "sparseinst.backbones", "sparseinst.engine.trainer",
     "sparseinst.engine.run_setup", "sparseinst.inference", "sparseinst.modeling.sparse_inst.model",
     "sparseinst.inference.many_images", "sparseinst.tools.demo", "sparseinst.tools.train_net", "tests.faults.child"]
)  # fmt: skip


def is_full() -> bool:
    """Return whether SPARSEINST_FAULTS asks for the slow, full form of the fault tests."""
    return os.environ.get("SPARSEINST_FAULTS") == "full"


def num_cases(short: int, full: int) -> int:
    """Return the number of cases of a fault to try."""
    return full if is_full() else short


class Outcome(NamedTuple):
    """How a child process ended.

    Attributes:
        exit_code: 0, what the function exited with, or EXIT_EXCEPTION; None where a signal ended it.
        signal: the signal that ended it, or None; SIGKILL where it was killed for want of time.
        timed_out: it ran longer than it was allowed to.
        seconds: how long it ran.
        output: its stdout and stderr; ends with the traceback where an exception passed through.
    """

    exit_code: int | None
    signal: int | None
    timed_out: bool
    seconds: float
    output: str


class Child:
    """A function that runs in a process of its own.

    Args:
        function: of a module that can be imported; with its arguments it must be picklable.
    """

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        handle, name = tempfile.mkstemp(prefix="child-", suffix=".txt")
        os.close(handle)
        self._output = Path(name)
        self._process = _context.Process(target=_run, args=(name, function, args))
        self._start = time.monotonic()
        self._process.start()

    @property
    def pid(self) -> int:
        """Of the child, which leads a process group of its own."""
        return self._process.pid

    def output(self) -> str:
        """What it has written so far."""
        return self._output.read_text(encoding="utf-8", errors="replace")

    def is_alive(self) -> bool:
        """Whether it still runs."""
        return self._process.is_alive()

    def send(self, signal_number: int) -> None:
        """Send a signal to it, not to its children."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal_number)

    def wait(self, timeout: float) -> Outcome:
        """Wait for its end, at most ``timeout`` seconds; then it is killed with all that it started."""
        self._process.join(timeout)
        timed_out = self._process.is_alive()
        # Its workers too, which it leaves behind where it was killed.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.join()
        code = self._process.exitcode
        outcome = Outcome(
            exit_code=code if code >= 0 else None,
            signal=-code if code < 0 else None,
            timed_out=timed_out,
            seconds=time.monotonic() - self._start,
            output=self.output(),
        )
        self._output.unlink()
        self._process.close()
        return outcome


def run_in_child(function: Callable[..., Any], *args: Any, timeout: float = 60) -> Outcome:
    """Run a function in a process of its own, see :class:`Child`, and wait for its end."""
    return Child(function, *args).wait(timeout)


def _run(output: str, function: Callable[..., Any], args: tuple) -> None:
    os.setpgid(0, 0)
    # As in a command: data workers are forked. Those of a server would import everything anew, for 5 seconds each.
    multiprocessing.set_start_method("fork", force=True)
    handle = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)
    code = 0
    try:
        function(*args)
    except SystemExit as error:
        code = error.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = EXIT_EXCEPTION
    # So that multiprocessing ends the data workers.
    sys.exit(code or 0)

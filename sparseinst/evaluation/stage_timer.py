"""The clock of evaluations and benchmarks: seconds by stage, and memory."""

import contextlib
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import torch

CPU = torch.device("cpu")


def now(device: torch.device) -> float:
    """Return seconds of ``time.perf_counter`` after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_bytes(device: torch.device) -> int:
    """Return the most bytes that were allocated on the device so far; on the CPU: the peak resident memory."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_bytes()


def resident_bytes(entry: str = "VmHWM") -> int:
    """Return the resident memory of this process: "VmHWM" the peak, "VmRSS" now; without /proc always the peak."""
    status = Path("/proc/self/status")
    if not status.is_file():
        # In bytes on macOS.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # getrusage would include the parent's memory before exec.
    (line,) = (line for line in status.read_text().splitlines() if line.startswith(f"{entry}:"))
    return int(line.split()[1]) * 1024


class StageTimer:
    """Measure the seconds of named stages: ``with timer.stage("network"): ...``.

    The time of an inner stage does not count for the outer one, so the totals add up to the whole.

    Args:
        device: synchronized where a stage begins and ends.

    Attributes:
        seconds: of each run of each stage; the stages in the order in which they first began.
    """

    def __init__(self, device: torch.device = CPU) -> None:
        self.device = device
        self.seconds: dict[str, list[float]] = {}
        # For each running stage the seconds of its inner stages.
        self._inner: list[float] = []

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time of the block for the stage, also where it ends with an error."""
        laps = self.seconds.setdefault(name, [])
        self._inner.append(0.0)
        start = now(self.device)
        try:
            yield
        finally:
            seconds = now(self.device) - start
            laps.append(seconds - self._inner.pop())
            if self._inner:
                self._inner[-1] += seconds

    def totals(self) -> dict[str, float]:
        """Return the seconds of each stage over all its runs."""
        return {name: sum(laps) for name, laps in self.seconds.items()}

    def __str__(self) -> str:
        """Return the total and the share of each stage."""
        totals = self.totals()
        total = sum(totals.values())
        stages = [f"{name} {each:.1f} s ({100 * each / total if total else 0:.1f} %)" for name, each in totals.items()]
        return f"{total:.1f} s: {', '.join(stages)}"

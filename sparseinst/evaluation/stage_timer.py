"""The clock of evaluations and benchmarks: seconds by stage, and the peak memory."""

import contextlib
import resource
import sys
import time
from collections.abc import Iterator

import torch

CPU = torch.device("cpu")


def now(device: torch.device) -> float:
    """Return seconds of ``time.perf_counter`` after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_bytes(device: torch.device) -> int:
    """Return the most bytes that were allocated on the device so far; on the CPU: that the process held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Kilobytes on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class StageTimer:
    """Measure the seconds of named stages: ``with timer.stage("network"): ...``.

    A stage within another one does not count for the outer one, so the totals add up to the whole.

    Args:
        device: synchronised where a stage begins and ends.

    Attributes:
        seconds: of each stage, one figure for each time it ran; in the order in which the stages first began.
    """

    def __init__(self, device: torch.device = CPU) -> None:
        self.device = device
        self.seconds: dict[str, list[float]] = {}
        # Of each stage that runs: the seconds of the stages within it.
        self._inner: list[float] = []

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the block's time for the stage, also where the block ends with an error."""
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
        """Return the seconds of each stage, over all times that it ran."""
        return {name: sum(laps) for name, laps in self.seconds.items()}

    def means(self) -> dict[str, float]:
        """Return the mean seconds of each stage, over all times that it ran."""
        return {name: sum(laps) / len(laps) for name, laps in self.seconds.items() if laps}

    def __str__(self) -> str:
        """Return the total, then the stages with their shares."""
        totals = self.totals()
        total = sum(totals.values())
        stages = [f"{name} {each:.1f} s ({100 * each / total if total else 0:.1f} %)" for name, each in totals.items()]
        return f"{total:.1f} s: {', '.join(stages)}"

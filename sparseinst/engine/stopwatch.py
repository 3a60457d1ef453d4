"""Where the time of a run goes: every second belongs to one part, and the parts sum up to the whole."""

import contextlib
import time
from collections.abc import Iterator


class Stopwatch:
    """Seconds by part. ``with watch("model"): ...``; a part within another one is not counted for that.

    Attributes:
        seconds: by part, in the order of their first beginnings.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count what is done within for the part."""
        self._count()
        self._running.append(part)
        self.seconds.setdefault(part, 0.0)
        try:
            yield
        finally:
            self._count()
            self._running.pop()

    def total(self) -> float:
        """Seconds of all parts."""
        return sum(self.seconds.values())

    def __str__(self) -> str:
        """The total, then the parts with their shares."""
        total = self.total()
        parts = [
            f"{part} {seconds:.1f} s ({100 * seconds / total if total else 0:.1f} %)"
            for part, seconds in self.seconds.items()
        ]
        return f"{total:.1f} s: {', '.join(parts)}"

    def _count(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

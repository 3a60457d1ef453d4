"""Write the scalars of a training to metrics.json and TensorBoard; a full disk does not end the training."""

import json
import logging
import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from detectron2.utils.events import EventWriter, TensorboardXWriter, get_event_storage

from sparseinst.checkpoint.atomic_write import append_whole, write_text_atomically

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.json"


def build_writers(output_dir: str) -> list[EventWriter]:
    """Create the folder, and return the writers of metrics.json and TensorBoard."""
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    metrics = MetricsFile(Path(output_dir) / METRICS_FILE)
    return [OptionalWriter(metrics, METRICS_FILE), OptionalWriter(TensorboardXWriter(output_dir), "TensorBoard")]


class MetricsFile(EventWriter):
    """Write one JSON object for each iteration, in a line of its own.

    Replaces Detectron2's JSONWriter, which leaves half a line on a full disk, and after --resume writes the iterations
    since the last checkpoint a second time. Here a line is written completely or not at all, and replaces the
    interrupted run's lines of a later iteration, and its values of the same iteration.

    Args:
        path: of the file.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self._path = Path(path)
        self._last: int | None = None

    def write(self) -> None:
        """Write the scalars that are newer than the last call; losses and times as medians of 20 iterations.

        Raises:
            OSError: the disk is full.
        """
        entries = new_scalars(self._last)
        if not entries:
            return
        if self._last is None:
            first, before = min(entries), read_metrics(self._path)
            for entry in before:
                if entry["iteration"] == first:
                    # A resumed run may only repeat the evaluation of its first iteration.
                    entries[first] = {**entry, **entries[first]}
            write_text_atomically(self._path, "".join(_line(entry) for entry in before if entry["iteration"] < first))
        self._last = max(entries)
        append_whole(self._path, "".join(_line({**entries[key], "iteration": key}) for key in sorted(entries)))


class OptionalWriter(EventWriter):
    """Call a writer until it fails: then log one WARNING and leave it out.

    Args:
        writer: any.
        name: of its output.
        errors: that end it; by default those of a full disk.
    """

    def __init__(self, writer: EventWriter, name: str, errors: tuple[type[Exception], ...] = (OSError,)) -> None:
        self._writer = writer
        self._name = name
        self._errors = errors
        self._has_failed = False

    def write(self) -> None:
        """Write."""
        self._try(self._writer.write)

    def close(self) -> None:
        """Close."""
        self._try(self._writer.close)

    def _try(self, call: Callable[[], None]) -> None:
        if self._has_failed:
            return
        try:
            call()
        except self._errors as error:
            self._has_failed = True
            logger.warning("%s ends here, and the training goes on: %s", self._name, error)


def new_scalars(last: int | None) -> dict[int, dict[str, float]]:
    """Return the scalars of the event storage by iteration; losses and times as medians of 20 iterations.

    Args:
        last: iterations up to this one are left out; None: none.
    """
    entries: dict[int, dict[str, float]] = defaultdict(dict)
    for name, (value, iteration) in get_event_storage().latest_with_smoothing_hint(20).items():
        if last is None or iteration > last:
            entries[iteration][name] = value
    return entries


def read_metrics(path: str | os.PathLike) -> list[dict[str, float]]:
    """Return the entries of a metrics.json, without lines that a killed writer left incomplete; empty without a file.

    Args:
        path: of a file of `MetricsFile` or of Detectron2's JSONWriter.
    """
    if not Path(path).is_file():
        return []
    entries = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("iteration"), int):
            entries.append(entry)
    return entries


def _line(entry: dict[str, float]) -> str:
    return json.dumps(entry, sort_keys=True) + "\n"

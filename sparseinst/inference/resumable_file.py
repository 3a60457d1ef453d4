"""Write lines to a file by one or several processes, so that a run continues after a kill at any moment.

One process writes OUT.jsonl. Each of several processes writes a shard, OUT.rank0.jsonl, OUT.rank1.jsonl, ...; the last
one that ends merges them into OUT.jsonl. No process waits for another. The first line of each file is the header. A
line counts once it ends in a line break, so a killed process leaves at most one line that is written anew.
"""

import contextlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from sparseinst.checkpoint.atomic_write import append_whole, write_atomically
from sparseinst.checkpoint.file_lock import try_lock
from sparseinst.inference.prediction_lines import header_differences

_START = b'{"sparseinst": '


class Place(NamedTuple):
    """Hold an image's line: its file, its start and length in bytes, and whether it has an error."""

    path: Path
    start: int
    length: int
    has_error: bool


class _Scan(NamedTuple):
    """Hold the positions of a file's lines by image, and the end of the last complete line."""

    places: dict[str, Place]
    end: int


class ResumableFile:
    """The file of this process, locked and without a torn line, inside a ``with`` block.

    Args:
        output: the file of the whole run.
        header: identifies the run.
        rank, num_ranks: of this process.

    Raises:
        ValueError: a file of another run is there, lines follow a damaged one, or another process writes this one;
            with one process also where another one writes a shard.
        OSError: the file cannot be written.
    """

    def __init__(self, output: Path, header: dict, rank: int = 0, num_ranks: int = 1) -> None:
        self._output = output
        self._header = header
        self.path = output if num_ranks == 1 else output.with_name(f"{output.stem}.rank{rank}{output.suffix}")

    def __enter__(self) -> "ResumableFile":
        self._output.parent.mkdir(parents=True, exist_ok=True)
        if self.path == self._output:
            for shard in shards(self._output):
                _open_locked(shard).close()
        self._lock = _open_locked(self.path)
        try:
            self._scan = _scan(self.path, self._header)
            self._lock.truncate(self._scan.end)
            if self._scan.end == 0:
                self.append(json.dumps(self._header))
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.close()

    def done(self) -> dict[str, Place]:
        """Return the images that had a line in any file of the run when this one was opened."""
        scans = (self._scan if path == self.path else _scan(path, self._header) for path in _files(self._output))
        return {name: place for scan in scans for name, place in scan.places.items()}

    def append(self, line: str) -> None:
        """Append a line atomically. Raise OSError on a full disk; the file then stays as it was."""
        append_whole(self.path, line + "\n")


def merge(output: Path, header: dict, names: Sequence[str]) -> bool:
    """Merge the shards into ``output``, in the order of the names, and remove them, where every image has a line.

    The shard of a process that still runs is left for that process, which merges when it ends.

    Returns:
        Whether ``output`` is complete. False too where another process is merging.

    Raises:
        ValueError: a file of another run is there.
        OutputError: the disk is full; the shards are unchanged.
    """
    # Before the lock: of processes that end at the same time the last one sees all lines, so one of them merges.
    if len(_all_places(output, header)) < len(names):
        return False
    if not shards(output):
        return True
    with output.open("ab") as lock:
        if not try_lock(lock):
            return False
        places = _all_places(output, header)
        # Unless another process has done it while this one waited.
        if any(place.path != output for place in places.values()):
            write_atomically(output, lambda file: _write(file, header, [places[name] for name in names]))
        for shard in shards(output):
            # A process that loses its shard would write another one without a header.
            with contextlib.suppress(ValueError), _open_locked(shard):
                shard.unlink(missing_ok=True)
    return True


def shards(output: Path) -> list[Path]:
    """Return the shards of a run that exist."""
    name = re.compile(rf"{re.escape(output.stem)}\.rank\d+{re.escape(output.suffix)}")
    return sorted(path for path in output.parent.glob("*.rank*") if name.fullmatch(path.name))


def _open_locked(path: Path) -> BinaryIO:
    """Open a file for appending, and lock it. Raise ValueError where another process holds the lock."""
    while True:
        file = path.open("ab")
        if not try_lock(file):
            file.close()
            raise ValueError(f"{path} is in use by another process. Wait for it, or give another --output")
        # A process that merges may have removed the file meanwhile.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return file
        file.close()


def _files(output: Path) -> list[Path]:
    """Return the files of a run. ``output`` is the last: while another process merges, it gets what shards lose."""
    return [*shards(output), output]


def _write(file: BinaryIO, header: dict, places: Sequence[Place]) -> None:
    sources = {path: path.open("rb") for path in {place.path for place in places}}
    try:
        file.write(json.dumps(header).encode() + b"\n")
        for place in places:
            sources[place.path].seek(place.start)
            file.write(sources[place.path].read(place.length))
    finally:
        for source in sources.values():
            source.close()


def _all_places(output: Path, header: dict) -> dict[str, Place]:
    """Return the positions of all lines; lines of ``output`` have precedence."""
    places: dict[str, Place] = {}
    for path in _files(output):
        places.update(_scan(path, header).places)
    return places


def _scan(path: Path, header: dict) -> _Scan:
    """Read the lines of a file; skip blank lines and a torn or damaged last line.

    Raises:
        ValueError: the file belongs to another run, or lines follow a damaged one.
    """
    places: dict[str, Place] = {}
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return _Scan(places, 0)
    with file:
        line = file.readline()
        # A killed process leaves a part of the header, or an empty file.
        if not line.endswith(b"\n") and (line.startswith(_START) or _START.startswith(line)):
            return _Scan(places, 0)
        _check_header(path, line, header)
        end = position = len(line)
        damaged = 0
        # A torn line is the last one, also where another process writes its rest meanwhile.
        for number, line in enumerate(iter(file.readline, b""), 2):
            if damaged and line.strip():
                raise ValueError(
                    f"--output {path}: line {damaged} is damaged, and lines follow it: remove line {damaged} to "
                    "predict its image again"
                )
            result = _parsed(line) or {}
            name = result.get("file_name")
            if isinstance(name, str):
                places[name] = Place(path, position, len(line), "error" in result)
                end = position + len(line)
            elif not line.endswith(b"\n"):
                break
            elif line.strip():
                damaged = number
            position += len(line)
    return _Scan(places, end)


def _check_header(path: Path, line: bytes, header: dict) -> None:
    found = _parsed(line)
    if found is None or "sparseinst" not in found:
        raise ValueError(f"--output {path} was not written by `sparseinst predict`, and is left as it is. Give another")
    texts = header_differences(found, header)
    if texts:
        more = f", and {len(texts) - 2} more entries differ" if len(texts) > 2 else ""
        raise ValueError(
            f"--output {path} belongs to another run: {'; '.join(texts[:2])}{more}. Give another --output, or remove it"
        )


def _parsed(line: bytes) -> dict | None:
    """Return the JSON object of a line; None where the line is torn or damaged."""
    try:
        value = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        value = None
    return value if isinstance(value, dict) else None

"""Prepare the folder of a run: writable, locked against other runs, without an earlier run's checkpoints."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from sparseinst.checkpoint.atomic_write import remove_partial_files
from sparseinst.checkpoint.file_lock import try_lock

LOCK_NAME = ".running"


@contextlib.contextmanager
def claimed(folder: str | os.PathLike) -> Iterator[Path]:
    """Create and lock a folder inside a ``with`` block. The system releases the lock of a killed process.

    Yields:
        The folder.

    Raises:
        ValueError: the folder cannot be made or written to, or another run holds the lock.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK_NAME).open("a+", encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"OUTPUT_DIR {folder} cannot be written to: {error.strerror or error}. Give another OUTPUT_DIR"
        ) from error
    with lock:
        _lock(lock, folder)
        # The number only helps to find the run, so a full disk does not matter here.
        with contextlib.suppress(OSError):
            os.ftruncate(lock.fileno(), 0)
            os.write(lock.fileno(), f"{os.getpid()}\n".encode())
        remove_partial_files(folder)
        remove_partial_files(folder / "inference")
        yield folder


def check_no_earlier_run(folder: str | os.PathLike) -> None:
    """Raise ValueError where a folder holds checkpoints, which a new training would overwrite."""
    folder = Path(folder)
    checkpoints = sorted(path.name for path in folder.glob("model_*.pth"))
    if checkpoints:
        raise ValueError(
            f"OUTPUT_DIR {folder} holds checkpoints of an earlier run ({checkpoints[-1]} is the last), which a "
            "new run would overwrite. Continue it with --resume, give another OUTPUT_DIR, or remove that folder"
        )


def check_free_space(folder: str | os.PathLike, num_bytes: int) -> None:
    """Raise ValueError where a folder has less than ``num_bytes`` free, the size of one checkpoint."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise ValueError(
            f"OUTPUT_DIR {folder} has {free / 1e9:.2f} GB free, and one checkpoint takes about "
            f"{num_bytes / 1e9:.2f} GB. Make room, or give another OUTPUT_DIR"
        )


def _lock(lock: TextIO, folder: Path) -> None:
    if not try_lock(lock):
        lock.seek(0)
        holder = lock.read().strip()
        process = f" (process {holder})" if holder else ""
        raise ValueError(
            f"OUTPUT_DIR {folder} is in use by another run{process}. Wait for it, or give another OUTPUT_DIR"
        )

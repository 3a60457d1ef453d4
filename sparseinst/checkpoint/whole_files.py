"""Files that are either whole or not there, whenever the process or the machine stops."""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

# A file that is being written has this suffix, and a dot before its name.
PARTIAL_SUFFIX = ".partial"


class OutputError(OSError):
    """A file that cannot be written: the disk is full, say."""


def write_whole(path: str | os.PathLike, write: Callable[[BinaryIO], object]) -> None:
    """Write a file under another name, force it to the disk, then give it its name.

    Args:
        path: of the file; one that is there is replaced, and stays as it is until then.
        write: writes the content into an open file.

    Raises:
        OutputError: it cannot be written; what was there before is untouched.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}{PARTIAL_SUFFIX}")
    try:
        try:
            with partial.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            _sync_folder(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
    except OSError as error:
        raise _output_error(path, error) from error
    except RuntimeError as error:
        # torch.save puts an error of its own over the one of the disk.
        if not isinstance(error.__context__, OSError):
            raise
        raise _output_error(path, error.__context__) from error


def remove_partial_files(folder: str | os.PathLike) -> None:
    """Remove what interrupted calls of :func:`write_whole` left in a folder that nobody writes to now."""
    for path in Path(folder).glob(f".*{PARTIAL_SUFFIX}"):
        with contextlib.suppress(OSError):
            path.unlink()


def _sync_folder(folder: Path) -> None:
    # The name is in the folder's own data. Not every system can open a folder.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _output_error(path: Path, error: OSError) -> OutputError:
    try:
        free = f"; {shutil.disk_usage(path.parent).free / 1e9:.2f} GB are free there"
    except OSError:
        free = ""
    return OutputError(
        f"{path} cannot be written: {error.strerror or error}{free}. Files that were there are as they were. Make "
        "room, or give another OUTPUT_DIR"
    )

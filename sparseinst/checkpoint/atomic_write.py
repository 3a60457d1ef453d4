"""Write files atomically: a stopped process or machine leaves the old file or the new one."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

# Suffix of the temporary file; its name also starts with a dot.
PARTIAL_SUFFIX = ".partial"


class OutputError(OSError):
    """Raised where a file cannot be written, because the disk is full for example."""


def write_atomically(path: str | os.PathLike, write: Callable[[BinaryIO], object]) -> None:
    """Write a temporary file next to ``path``, force it to the disk, then rename it.

    Args:
        path: of the file; an existing file is replaced.
        write: writes the content into an open file.

    Raises:
        OutputError: the file cannot be written; an existing file is unchanged.
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
        # torch.save raises its own RuntimeError over the disk's OSError.
        if not isinstance(error.__context__, OSError):
            raise
        raise _output_error(path, error.__context__) from error


def write_text_atomically(path: str | os.PathLike, text: str) -> None:
    """Write a text file in UTF-8 as :func:`write_atomically` does."""
    write_atomically(path, lambda file: file.write(text.encode()))


def append_whole(path: str | os.PathLike, text: str) -> None:
    """Append a text in UTF-8 to a file. On a full disk the file stays as it was; a killed process leaves a part.

    Raises:
        OSError: the disk is full.
    """
    content = text.encode()
    with Path(path).open("ab", buffering=0) as file:
        size = file.tell()
        try:
            if file.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(size)
            raise


@contextlib.contextmanager
def output_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary folder; after the with statement move its content into ``folder``, or nothing after an error.

    A file replaces the old file. A folder replaces the old folder, whose other files are copied into it first. Where
    the process is killed between the two moves of a folder, the old folder is left in the temporary one.

    Args:
        folder: is made where it does not exist.

    Raises:
        OutputError: the temporary folder cannot be made, or its content cannot be moved. Errors of the with statement
            pass: `as_output_error` is for those of writing.
    """
    folder = Path(folder)
    with as_output_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # Process ids are not unique: containers can share the folder.
        partial = Path(tempfile.mkdtemp(PARTIAL_SUFFIX, ".", folder))
    try:
        yield partial
        with as_output_error(folder):
            _move_content(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_writable(folder: str | os.PathLike) -> None:
    """Raise OutputError where `output_folder` could not make its temporary folder. Make no folder."""
    folder = Path(folder)
    with as_output_error(folder):
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        tempfile.TemporaryDirectory(PARTIAL_SUFFIX, ".", nearest).cleanup()


@contextlib.contextmanager
def as_output_error(path: str | os.PathLike) -> Iterator[None]:
    """Raise OutputError, which names the path of ``--output``, in place of an OSError of the with statement."""
    try:
        yield
    except OSError as error:
        raise _output_error(Path(path), error, "--output") from error


def _move_content(source: Path, folder: Path) -> None:
    for new in sorted(source.iterdir()):
        old, target = source / f"{new.name}.old", folder / new.name
        is_folder = new.is_dir() and target.is_dir()
        if is_folder:
            _copy_missing(target, new)
        for file in [path for path in (new, *new.rglob("*")) if path.is_file()]:
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        if is_folder:
            os.replace(target, old)
        try:
            os.replace(new, target)
        except OSError:
            # The temporary folder is removed.
            if is_folder:
                os.replace(old, target)
            raise
    _sync_folder(folder)


def _copy_missing(source: Path, folder: Path) -> None:
    present = {path.name for path in folder.iterdir()}
    ignored = lambda path, _: present if Path(path) == source else ()  # noqa: E731
    shutil.copytree(source, folder, symlinks=True, ignore=ignored, dirs_exist_ok=True)


def remove_partial_files(folder: str | os.PathLike) -> None:
    """Remove the temporary files of interrupted :func:`write_atomically` calls from a folder without other writers."""
    for path in Path(folder).glob(f".*{PARTIAL_SUFFIX}"):
        with contextlib.suppress(OSError):
            path.unlink()


def _sync_folder(folder: Path) -> None:
    # Makes the rename durable. Some systems cannot open a folder.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _output_error(path: Path, error: OSError, key: str = "OUTPUT_DIR") -> OutputError:
    try:
        free = f"; {shutil.disk_usage(path.parent).free / 1e9:.2f} GB are free there"
    except OSError:
        free = ""
    remedy = "Make room, or write" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Write"
    return OutputError(
        f"{path} cannot be written: {error.strerror or error}{free}. Existing files are unchanged. {remedy} to another "
        f"folder ({key})"
    )

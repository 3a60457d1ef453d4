"""Prepare the process of a command: its terminal output, and how its threads wait."""

import contextlib
import functools
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import TextIO

logger = logging.getLogger(__name__)

# Exit code after an error of the user's input, which is printed in one line; argparse's own errors have 2.
EXIT_ERROR = 1
# The same where 1 is the result of a run: demo, predict, export, check and compare.
EXIT_NOT_RUN = 2
# Exit code after Ctrl-C, as shells give it.
EXIT_INTERRUPTED = 130
_NO_OPENCV = (
    "OpenCV cannot be imported ({}). Install it: pip install 'sparseinst[headless]', or pip install "
    "opencv-python-headless"
)
# Starts of warnings of other packages that a user cannot act on.
FOREIGN_WARNINGS = (
    "`torch.jit.",
    "`broadcast_buffers` is deprecated",
    "__array__ implementation",
    "pkg_resources is deprecated",
    # Detectron2's own mapper.
    "The given NumPy array is not writable",
    # OpenVINO traces the network; the optimized network is compared with the model afterwards.
    "Output nr ",
)
# Turns of a waiting thread's loop before it sleeps, read by the OpenMP that Linux wheels of PyTorch bring. Its default,
# 300000, takes the processor from the thread that it waits for where other programs run: docs/performance.md.
SPIN_COUNT = "4000"


def prepare_console() -> None:
    """Survive closed streams, hide warnings of other packages, and let waiting threads sleep early.

    This holds in this process and in those that it starts. Every command calls it before it imports PyTorch.
    """
    survive_closed_streams()
    hide_foreign_warnings()
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def report_error(error: object, code: int = EXIT_ERROR) -> int:
    """Print an error of the user's input in one line on stderr, and return the exit code."""
    print("error:", " ".join(map(str.strip, str(error).splitlines())), file=sys.stderr)
    return code


def hide_foreign_warnings() -> None:
    """Ignore FOREIGN_WARNINGS in this process and, through PYTHONWARNINGS, in ranks and data workers."""
    # A log record about a compiler that nothing here uses.
    logging.getLogger("torch.utils.cpp_extension").addFilter(_is_about_something_else)
    for start in FOREIGN_WARNINGS:
        warnings.filterwarnings("ignore", re.escape(start))
    wanted = [f"ignore:{start}" for start in FOREIGN_WARNINGS]
    present = os.environ.get("PYTHONWARNINGS", "")
    missing = [text for text in wanted if text not in present]
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [present, *missing]))


def _is_about_something_else(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("No CUDA runtime is found")


def with_exit_codes(error_code: int = EXIT_ERROR) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Let a command report an error of the user's input and return the code; return 130 after Ctrl-C."""

    def decorate(main: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(main)
        def wrapper(*args: object, **kwargs: object) -> int:
            try:
                return main(*args, **kwargs)
            except (ValueError, ImportError, OSError) as error:
                # Also where a library that OpenCV needs is missing.
                is_opencv = isinstance(error, ImportError) and error.name == "cv2"
                return report_error(_NO_OPENCV.format(error) if is_opencv else error, error_code)
            except KeyboardInterrupt:
                print("Interrupted", file=sys.stderr)
                return EXIT_INTERRUPTED

        return wrapper

    return decorate


def survive_closed_streams() -> None:
    """Replace a closed standard stream by the null device, and drop text that a stream does not take any more.

    Services and cron may close a stream, ``| head`` closes a pipe, and a terminal can vanish. A run goes on.
    """
    # A file that took the number of a closed stream would receive the messages of C libraries.
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            setattr(sys, name, _LastingStream(stream))
    logging.raiseExceptions = False


class _LastingStream(io.TextIOWrapper):
    """Write to a standard stream until it fails, then to the null device."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(
            stream.buffer,
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            self._drop()

    def _drop(self) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)


@contextlib.contextmanager
def only_in_log_file(*names: str) -> Iterator[None]:
    """Keep the records of loggers from the terminal inside a ``with`` block; log.txt gets them."""
    handlers = [handler for name in names for handler in logging.getLogger(name).handlers]
    levels = {handler: handler.level for handler in handlers if getattr(handler, "stream", None) is sys.stdout}
    for handler in levels:
        handler.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for handler, level in levels.items():
            handler.setLevel(level)

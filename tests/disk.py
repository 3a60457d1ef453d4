"""A disk that is full, as far as this process can tell."""

import contextlib
import resource


@contextlib.contextmanager
def little_room(num_bytes):
    """Let no file grow beyond this size inside a ``with`` block; Python ignores the signal, and raises OSError."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

"""Lock a file against other processes; the system releases the lock of a killed process."""

from typing import IO

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None


def try_lock(file: IO) -> bool:
    """Lock an open file until it is closed.

    Returns:
        False where another process holds the lock; True too on a system or a file system without locks.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True

"""How the C library deals with memory that is freed."""

import ctypes
import os
import sys

# Of glibc's malloc.h, see man 3 mallopt; and the environment variables that set the same.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
# The largest that glibc takes. Larger pieces go back to the system at once, as they would anyway.
_LARGEST_KEPT = 32 * 2**20
_KEPT_IN_ALL = 2**30


def keep_freed_memory() -> bool:
    """Keep up to a GiB of what is freed for what is asked for next; of this process, and those that it forks.

    A training frees its gradients and activations in each step, and asks for as much in the next one. glibc gives the
    larger part back to the system in between, which then fills each page with zeros again. No more memory is held at
    once than the step's most.

    Returns:
        False, and nothing is done, where there is no glibc, or where the environment says how it is to deal with it.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _VARIABLES):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Either one, set alone, would freeze the other one at what it is at the start: 128 KiB.
    return mallopt is not None and all(
        mallopt(parameter, value) == 1
        for parameter, value in ((_M_MMAP_THRESHOLD, _LARGEST_KEPT), (_M_TRIM_THRESHOLD, _KEPT_IN_ALL))
    )

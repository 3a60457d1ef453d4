"""Memory of the CPU that is freed stays with the process.

Feature maps and masks take tens of megabytes. Pieces of that size glibc asks of the system each time and gives back at
once, and the system fills every page with zeros again: of a step's or a picture's time that can be a tenth and more.
"""

import ctypes
import os
import sys

from detectron2.config import CfgNode

# Of glibc's malloc.h, see man 3 mallopt; and the environment variables that set the same.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")
_SMALL = (
    # The largest that glibc takes; set alone, either one would freeze the other at 128 KiB.
    (_M_MMAP_THRESHOLD, 32 * 2**20),
    (_M_TRIM_THRESHOLD, 2**30),
)
# No piece beside the heap, and a heap that does not shrink.
_ALL = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1))


def keep_freed_memory(all_sizes: bool = False) -> bool:
    """Keep what is freed for what is asked for next, from now on, in this process and in those that it forks.

    It is for a command, or for a program that wants it: it holds for all of the process, and cannot be taken back.

    Args:
        all_sizes: False: pieces of up to 32 MiB, a GiB in all; the process holds no more than it did at its most.
            True: everything; the process grows by what lies unused between pieces of different sizes.

    Returns:
        False, and nothing is done, where there is no glibc, or where the environment says how it is to deal with it.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _VARIABLES):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(*setting) == 1 for setting in (_ALL if all_sizes else _SMALL))


def keep_freed_memory_for_inference(cfg: CfgNode) -> bool:
    """:func:`keep_freed_memory` of all sizes, where RUNTIME.KEEP_FREED_MEMORY says so.

    Not with a GPU: there the tensors are not in this memory.
    """
    wanted = cfg.RUNTIME.KEEP_FREED_MEMORY
    return cfg.MODEL.DEVICE == "cpu" and wanted and keep_freed_memory(all_sizes=True)

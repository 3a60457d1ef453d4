"""Keep freed CPU memory in the process.

Feature maps and masks take tens of megabytes. By default glibc requests such blocks from the system and returns them
at once, and the system fills each page with zeros: 10% or more of the time of a step or an image.
"""

import ctypes
import os
import sys

from detectron2.config import CfgNode

# Constants of glibc's malloc.h, see man 3 mallopt; and the environment variables that set the same options.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")
_SMALL = (
    # The largest value of glibc; setting only one of the two would fix the other at 128 KiB.
    (_M_MMAP_THRESHOLD, 32 * 2**20),
    (_M_TRIM_THRESHOLD, 2**30),
)
# All blocks in the heap, and a heap that does not shrink.
_ALL = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1))


def keep_freed_memory(all_sizes: bool = False) -> bool:
    """Reuse freed memory for later allocations, in this process and in the processes that it forks.

    Affects the whole process and cannot be undone, so only commands call it.

    Args:
        all_sizes: False: blocks of up to 32 MiB, 1 GiB in total; the process never exceeds its earlier peak.
            True: all blocks; the process grows by the gaps between blocks of different sizes.

    Returns:
        False, without any effect, where glibc is missing or the environment sets its options.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _VARIABLES):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(*setting) == 1 for setting in (_ALL if all_sizes else _SMALL))


def keep_freed_memory_for_inference(cfg: CfgNode) -> bool:
    """Keep freed memory of all sizes with RUNTIME.KEEP_FREED_MEMORY, and return whether that took effect.

    Has no effect with a GPU, because its tensors are not in host memory.
    """
    wanted = cfg.RUNTIME.KEEP_FREED_MEMORY
    return cfg.MODEL.DEVICE == "cpu" and wanted and keep_freed_memory(all_sizes=True)

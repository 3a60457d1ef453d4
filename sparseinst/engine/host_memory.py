"""Memory of the CPU that is freed stays with the process.

A feature map takes tens of megabytes. Blocks of that size glibc asks of the system at each allocation and gives back
at once, and the system clears each page when it is first touched: of a network's time that is a tenth and more.
"""

import ctypes

from detectron2.config import CfgNode

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Keep what is freed for the next tensors, from now on, in this process and in those that it forks.

    It is for a command, or for a program that wants it: a library does not decide this for the process that it runs
    in. The process then does not shrink, and grows by what lies unused between blocks of different sizes.

    Returns:
        Whether it was done. Without glibc it is not, and nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        # Another C library; Windows knows no name None.
        return False
    # No blocks beside the heap, and a heap that does not shrink.
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT))


def keep_freed_memory_as_configured(cfg: CfgNode, training: bool) -> bool:
    """:func:`keep_freed_memory` where the config wants it: on the CPU, with a GPU the tensors are not in this memory.

    Args:
        cfg: MODEL.DEVICE, and KEEP_FREED_MEMORY of SOLVER or of MODEL.SPARSE_INST.INFERENCE.
        training: which of the two.
    """
    keys = cfg.SOLVER if training else cfg.MODEL.SPARSE_INST.INFERENCE
    return cfg.MODEL.DEVICE == "cpu" and keys.KEEP_FREED_MEMORY and keep_freed_memory()

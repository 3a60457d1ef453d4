"""Limit the memory that the boolean masks of one image take."""


class MaskMemoryError(ValueError):
    """Raised where the boolean masks of an image would take more memory than allowed."""


def check_mask_memory(num_masks: int, size: tuple[int, int], max_mask_gib: float, remedy: str) -> None:
    """Check the memory of boolean masks before they are allocated.

    Args:
        num_masks: number of masks.
        size: (height, width) of each.
        max_mask_gib: most memory, in GiB.
        remedy: ends the message of the error.

    Raises:
        MaskMemoryError: the masks would take more.
    """
    height, width = size
    num_bytes = num_masks * height * width
    if num_bytes > max_mask_gib * 2**30:
        raise MaskMemoryError(
            f"{num_masks} boolean masks of {height}x{width} pixels take {num_bytes / 2**30:.2f} GiB, more than "
            f"MODEL.OUTPUT.MAX_MASK_GIB allows ({max_mask_gib:g}). {remedy}"
        )

"""Limit the memory that the boolean masks of one image take."""


class MaskMemoryError(ValueError):
    """Raised where the boolean masks of an image would take more memory than allowed."""


def check_mask_memory(
    num_masks: int, size: tuple[int, int], max_mask_gib: float, remedy: str, item_size: int = 1
) -> None:
    """Check the memory of masks before they are allocated.

    Args:
        num_masks: number of masks.
        size: (height, width) of each.
        max_mask_gib: most memory, in GiB.
        remedy: ends the message of the error.
        item_size: bytes of a pixel.

    Raises:
        MaskMemoryError: the masks would take more.
    """
    height, width = size
    num_bytes = num_masks * height * width * item_size
    kind = "boolean masks" if item_size == 1 else f"masks with {item_size} bytes a pixel"
    if num_bytes > max_mask_gib * 2**30:
        raise MaskMemoryError(
            f"{num_masks} {kind} of {height}x{width} pixels take {num_bytes / 2**30:.2f} GiB, more than "
            f"MODEL.OUTPUT.MAX_MASK_GIB allows ({max_mask_gib:g}). {remedy}"
        )

"""Run a network whose batch size is fixed or limited on batches of any size."""

from collections.abc import Callable

import torch


def in_batches(
    run: Callable[[torch.Tensor], dict[str, torch.Tensor]],
    images: torch.Tensor,
    batch_size: int | None,
    most: int | None = None,
) -> dict[str, torch.Tensor]:
    """Run a network on parts of ``batch_size`` images, the last one filled with zeros, or of up to ``most`` images.

    Args:
        run: the network; takes exactly ``batch_size`` images.
        images: (B, 3, h, w).
        batch_size: None: the network takes any number of images, up to ``most``.
        most: None: no limit.

    Returns:
        The network's dict for the B images.
    """
    size = batch_size or most or len(images)
    if size == len(images) or (batch_size is None and size > len(images)):
        return run(images)
    parts = []
    for part in images.split(size):
        missing = batch_size - len(part) if batch_size else 0
        full = torch.cat([part, part.new_zeros((missing, *part.shape[1:]))]) if missing else part
        parts.append({name: value[: len(part)] for name, value in run(full).items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

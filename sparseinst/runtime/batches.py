"""Run a network whose batch size is fixed on batches of any size."""

from collections.abc import Callable

import torch


def in_batches(
    run: Callable[[torch.Tensor], dict[str, torch.Tensor]], images: torch.Tensor, batch_size: int | None
) -> dict[str, torch.Tensor]:
    """Run a network on parts of ``batch_size`` images, the last one filled with zeros.

    Args:
        run: the network; takes exactly ``batch_size`` images.
        images: (B, 3, h, w).
        batch_size: None: the network takes any number of images.

    Returns:
        The network's dict for the B images.
    """
    if batch_size is None or batch_size == len(images):
        return run(images)
    parts = []
    for part in images.split(batch_size):
        missing = batch_size - len(part)
        full = torch.cat([part, part.new_zeros((missing, *part.shape[1:]))]) if missing else part
        parts.append({name: value[: len(part)] for name, value in run(full).items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

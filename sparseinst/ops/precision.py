"""Where mixed precision ends: what sums over a whole map, and what takes powers and logarithms, runs in float32."""

import contextlib

import torch


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Switches autocast off inside a with statement; does nothing on devices that have none, such as "meta"."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()

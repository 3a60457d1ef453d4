"""Turn mixed precision off: sums over a whole map, powers and logarithms need float32."""

import contextlib

import torch


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Return a context without autocast; it has no effect on devices that lack autocast, such as "meta"."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()

"""torch.compile where it works."""

import logging
from collections.abc import Callable

import torch

logger = logging.getLogger(__name__)

Network = Callable[[torch.Tensor], dict[str, torch.Tensor]]


def compiled(network: Network) -> Network:
    """The network through torch.compile, or, after one line in the log, as it is where that does not work."""
    current: Network = torch.compile(network)

    def run(images: torch.Tensor) -> dict[str, torch.Tensor]:
        nonlocal current
        if current is network:
            return network(images)
        try:
            return current(images)
        except RuntimeError as error:
            # Where the network itself is at fault it fails again, as it is.
            outputs = network(images)
            current = network
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            logger.warning("torch.compile does not work here, so the network runs as it is: %s", reason)
            return outputs

    return run

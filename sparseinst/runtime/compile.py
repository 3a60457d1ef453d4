"""torch.compile with a fallback."""

import logging
from collections.abc import Callable

import torch

logger = logging.getLogger(__name__)

Network = Callable[[torch.Tensor], dict[str, torch.Tensor]]


def compiled(network: Network) -> Network:
    """Compile a network by torch.compile; where that fails, log one line and run the network as it is."""
    current: Network = torch.compile(network)

    def run(images: torch.Tensor) -> dict[str, torch.Tensor]:
        nonlocal current
        if current is network:
            return network(images)
        try:
            return current(images)
        except RuntimeError as error:
            # The network's own errors are raised here again.
            outputs = network(images)
            current = network
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            logger.warning("torch.compile does not work here, so the network runs as it is: %s", reason)
            return outputs

    return run

"""torch.compile with a fallback."""

import contextlib
import logging
import threading
from collections.abc import Iterator

import torch

from sparseinst.modeling.meta_arch import Network

logger = logging.getLogger(__name__)

# The flag of oneDNN belongs to the process.
_ONEDNN_LOCK = threading.Lock()


def compiled(network: Network) -> Network:
    """Compile a network by torch.compile; where that fails, log one line and run the network as it is."""
    return _or_uncompiled(torch.compile(network), network)


def compiled_for_inference(network: Network) -> Network:
    """Compile a network for the size of the first images, and for all sizes at the first images of another size.

    The compiler itself may compile again where small images (below about 256x256 pixels) follow large ones, or the
    reverse. Where compilation fails, log one line and run the network as it is. Any thread may call the result.
    """
    one_size, all_sizes = torch.compile(network, dynamic=False), torch.compile(network, dynamic=True)
    first_shape: torch.Size | None = None
    is_compiled_for_all = False
    lock = threading.Lock()

    def run(images: torch.Tensor) -> dict[str, torch.Tensor]:
        nonlocal first_shape, is_compiled_for_all
        with lock:
            first_shape = first_shape or images.shape
            if images.shape != first_shape and not is_compiled_for_all:
                # For small maps PyTorch does not use oneDNN's convolution, and the compiler would add the limit of each
                # convolution as a condition of the graph. The compiled graph makes the choice at each call.
                with _without_onednn():
                    all_sizes(_not_square(images))
                is_compiled_for_all = True
        return (one_size if images.shape == first_shape else all_sizes)(images)

    return _or_uncompiled(run, network)


def _not_square(images: torch.Tensor) -> torch.Tensor:
    """Return the images, or, where their sides are equal, each twice side by side: a graph would keep them equal."""
    if images.shape[2] != images.shape[3]:
        return images
    is_channels_last = images.is_contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(images.is_inference()):
        twice = images.repeat(1, 1, 1, 2)
        return twice.contiguous(memory_format=torch.channels_last if is_channels_last else torch.contiguous_format)


@contextlib.contextmanager
def _without_onednn() -> Iterator[None]:
    # torch.backends.mkldnn.flags() would set other flags too, and warn.
    with _ONEDNN_LOCK:
        before = torch.backends.mkldnn.enabled
        torch.backends.mkldnn.enabled = False
        try:
            yield
        finally:
            torch.backends.mkldnn.enabled = before


def _or_uncompiled(compiled_network: Network, network: Network) -> Network:
    current = compiled_network

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

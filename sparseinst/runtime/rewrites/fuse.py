"""Rewrite a network to an equal one with fewer operations: fused modules, and norms folded into convolutions."""

import copy
import logging

import torch
from torch import nn

from sparseinst.modeling.meta_arch import InstanceSegmenter
from sparseinst.runtime.output_difference import is_close
from sparseinst.runtime.rewrites.fold_norms import fold_norms

logger = logging.getLogger(__name__)

# Sides of the example in pixels: multiples of every stride, with enough tiles for Winograd convolutions.
_EXAMPLE_SIZE = (192, 256)


def inference_copy(model: InstanceSegmenter) -> InstanceSegmenter:
    """Return a copy in eval mode whose parameters have no gradient."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def example_images(model: InstanceSegmenter) -> torch.Tensor:
    """Return one image of normal noise, of a size that the model's `preprocess` makes and the network accepts."""
    image = torch.zeros((len(model.pixel_mean), *_EXAMPLE_SIZE), dtype=torch.uint8)
    size = model.preprocess([{"image": image}]).tensor.shape
    return torch.randn(size, generator=torch.Generator().manual_seed(0)).to(model.device)


def fused_copy(model: InstanceSegmenter) -> InstanceSegmenter:
    """Return a copy for inference, fused where its outputs stay the same; otherwise one line in the log says why not.

    Each module that has a method ``fuse() -> nn.Module`` is replaced by the equal, cheaper module that it returns.
    """
    fused, example = inference_copy(model), example_images(model)
    try:
        with torch.no_grad():
            expected = fused.network(example)
            # timm's modules offer a fusion of their own norms; other modules offer one when theirs are folded.
            offers: set[nn.Module] = set()
            _use_offers(fused, offers)
            fold_norms(fused, lambda: fused.network(example))
            _use_offers(fused, offers)
            if is_close(fused.network(example), expected, model.ranks_instances):
                return fused
        # A backbone may use a convolution's output next to its norm's, which no hook sees.
        reason = "its outputs would change"
    # The fuse() of a module is a user's code, which can raise anything.
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    logger.warning("The network cannot be fused, and runs as it is: %s", reason)
    return inference_copy(model)


def _use_offers(module: nn.Module, offers: set[nn.Module]) -> None:
    """Replace modules inside by the result of their own ``fuse()``, outermost first, and add these to ``offers``."""
    for name, child in list(module.named_children()):
        if child in offers:
            continue
        offer = child.fuse() if callable(getattr(child, "fuse", None)) else child
        # A fuse() that returns None fuses in place.
        if offer is child or offer is None:
            _use_offers(child, offers)
        else:
            setattr(module, name, offer.eval())
            offers.add(offer)

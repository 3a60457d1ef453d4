"""Set how a training runs the network: layout, compilation, and recomputed activations.

Names of parameters and the format of checkpoints do not change.
"""

import contextlib
import fnmatch
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sparseinst.modeling.meta_arch import InstanceSegmenter
from sparseinst.runtime.compile import compiled

# Processes exchange counts in the criterion, so a recomputation would block.
EXCLUDED = ("criterion",)


def prepare_for_training(
    model: nn.Module, *, channels_last: bool = False, compile: bool = False, recompute: Sequence[str] = ()
) -> None:
    """Change in place how a model runs its network in training mode; eval mode does not change.

    Args:
        model: an InstanceSegmenter, without DistributedDataParallel.
        channels_last: weights and feature maps in channels-last layout.
        compile: run the network through ``torch.compile``, which compiles for one size at the first step and for all
            sizes at the second step. Without a C++ compiler the network runs in eager mode, with one line in the log.
        recompute: see `recompute_activations`.

    Raises:
        ValueError: no module has such a name; a model that is not an InstanceSegmenter cannot be compiled.
    """
    if channels_last:
        model.to(memory_format=torch.channels_last)
    recompute_activations(model, recompute)
    if compile:
        if not isinstance(model, InstanceSegmenter):
            raise ValueError(
                f"SOLVER.COMPILE is True, and MODEL.META_ARCHITECTURE {type(model).__name__} is not an "
                "InstanceSegmenter: set it to False"
            )
        model.set_training_network(compiled(model.network))


def recompute_activations(model: nn.Module, patterns: Sequence[str]) -> None:
    """Store only the inputs of some modules and compute the rest again in the backward pass (activation checkpointing).

    Saves memory and makes steps slower. Gradients are the same, and running statistics are updated once.

    Args:
        model: changed in place.
        patterns: names of modules as in ``named_modules``, except those of the criterion; ``*`` stands for any
            characters. Modules inside a chosen module are ignored.

    Raises:
        ValueError: a pattern does not match any module with a forward pass.
    """
    candidates = {
        name: module for name, module in model.named_modules() if name and name.partition(".")[0] not in EXCLUDED
    }
    chosen: set[str] = set()
    for pattern in patterns:
        names = [
            name
            for name, module in candidates.items()
            if fnmatch.fnmatchcase(name, pattern) and type(module).forward is not nn.Module.forward
        ]
        if not names:
            below = [name for name in candidates if name.count(".") <= 1]
            raise ValueError(
                f"SOLVER.RECOMPUTE has {pattern!r}, which matches no module of the model with a forward pass. There "
                f"are {', '.join(below)}, and the modules inside them"
            )
        chosen.update(names)
    for name in chosen:
        parents = {name[:index] for index, letter in enumerate(name) if letter == "."}
        if not parents & chosen:
            module = candidates[name]
            # deepcopy copies the module inside a partial.
            module.forward = functools.partial(_forward_again, type(module).forward, module)


def _forward_again(forward: Callable, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if not (module.training and torch.is_grad_enabled()):
        return forward(module, *args, **kwargs)
    # A compiled program updates running statistics in its forward pass only.
    contexts = {} if torch.compiler.is_compiling() else {"context_fn": functools.partial(_contexts, module)}
    return checkpoint(forward, module, *args, use_reentrant=False, **contexts, **kwargs)


def _contexts(module: nn.Module) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """Return the contexts of the first and the second forward pass."""
    return contextlib.nullcontext(), _frozen_statistics(module)


@contextlib.contextmanager
def _frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Freeze running statistics while norms use the statistics of the batch."""
    norms = [part for part in module.modules() if getattr(part, "track_running_stats", False)]
    saved = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, num_batches_tracked) in zip(norms, saved):
            norm.momentum, norm.num_batches_tracked = momentum, num_batches_tracked

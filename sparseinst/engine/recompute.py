"""How a training runs the network: layout, compilation, and recomputed activations.

Names of parameters do not change, so neither do checkpoints.
"""

import contextlib
import fnmatch
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import nn
from torch.utils.checkpoint import checkpoint

from sparseinst.modeling.meta_arch import InstanceSegmenter
from sparseinst.runtime.compile import compiled

# Processes exchange numbers in the criterion; a recomputation would block.
EXCLUDED = ("criterion",)


def prepare_for_training(
    model: nn.Module, *, channels_last: bool = False, compile: bool = False, recompute: Sequence[str] = ()
) -> None:
    """Change in place how a model runs its network in training mode; eval mode does not change.

    Args:
        model: an InstanceSegmenter, without DistributedDataParallel.
        channels_last: weights and feature maps in channels-last layout.
        compile: run the network through ``torch.compile``, which compiles for one size at the first step and for all
            sizes at the second one. Without a C++ compiler one line in the log says so, and the network runs as it is.
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


def prepare_as_configured(cfg: CfgNode, model: nn.Module) -> None:
    """Call `prepare_for_training` with the options of SOLVER."""
    solver = cfg.SOLVER
    prepare_for_training(model, channels_last=solver.CHANNELS_LAST, compile=solver.COMPILE, recompute=solver.RECOMPUTE)


def recompute_activations(model: nn.Module, patterns: Sequence[str]) -> None:
    """Store only the inputs of some modules and compute the rest again in the backward pass (activation checkpointing).

    Takes less memory and a longer step. Gradients are the same, and running statistics are updated once.

    Args:
        model: changed in place.
        patterns: names of modules as in ``named_modules``, except those of the criterion; ``*`` stands for any
            characters. Of nested modules the outermost counts.

    Raises:
        ValueError: a pattern that matches no module, or only lists of modules, which have no forward pass.
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
            # A partial, because deepcopy copies the module inside it.
            module.forward = functools.partial(_forward_again, type(module).forward, module)


def _forward_again(forward: Callable, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if not (module.training and torch.is_grad_enabled()):
        return forward(module, *args, **kwargs)
    # A compiled program updates running statistics in its forward pass only.
    contexts = {} if torch.compiler.is_compiling() else {"context_fn": functools.partial(_contexts, module)}
    return checkpoint(forward, module, *args, use_reentrant=False, **contexts, **kwargs)


def _contexts(module: nn.Module) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """Return the contexts of the first and the second forward pass."""
    return contextlib.nullcontext(), _statistics_kept(module)


@contextlib.contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Keep running statistics as they are while norms use those of the batch."""
    norms = [part for part in module.modules() if getattr(part, "track_running_stats", False)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, num_batches_tracked) in zip(norms, kept):
            norm.momentum, norm.num_batches_tracked = momentum, num_batches_tracked

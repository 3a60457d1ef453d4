"""How a training runs the network: in another layout, compiled, with activations that are computed again.

None of it changes a parameter's name, so checkpoints are those of the plain model.
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

from sparseinst.modeling.sparse_inst.model import SparseInst
from sparseinst.runtime.compile import compiled

# The criterion exchanges numbers with other processes: computed again, they would wait for one another.
PARTS = ("backbone", "encoder", "decoder")


def prepare_for_training(
    model: nn.Module, *, channels_last: bool = False, compile: bool = False, recompute: Sequence[str] = ()
) -> None:
    """Change in place how a model runs its network in training mode; in eval mode it runs as before.

    Args:
        model: a SparseInst, without DistributedDataParallel.
        channels_last: weights and feature maps in channels-last layout.
        compile: run the network through ``torch.compile``. It is compiled at the first step, and once more, then for
            all sizes, at the first batch of another size. Without a C++ compiler a line says so, and it runs as it is.
        recompute: see :func:`recompute_activations`.

    Raises:
        ValueError: no module has such a name; the model cannot be compiled.
    """
    if channels_last:
        model.to(memory_format=torch.channels_last)
    recompute_activations(model, recompute)
    if compile:
        if not isinstance(model, SparseInst):
            raise ValueError(f"SOLVER.COMPILE is for the meta-architecture SparseInst, not {type(model).__name__}")
        model.training_network = compiled(model.plain_network)


def prepare_as_configured(cfg: CfgNode, model: nn.Module) -> None:
    """:func:`prepare_for_training` as SOLVER says."""
    solver = cfg.SOLVER
    prepare_for_training(model, channels_last=solver.CHANNELS_LAST, compile=solver.COMPILE, recompute=solver.RECOMPUTE)


def recompute_activations(model: nn.Module, patterns: Sequence[str]) -> None:
    """Activation checkpointing: modules keep their inputs alone, and compute the rest again in the backward pass.

    Less memory for a longer step: what each module keeps inside for its gradient is there only while its own gradient
    is computed. Gradients are the same, and running statistics move once.

    Args:
        model: changed in place.
        patterns: names of modules below backbone, encoder and decoder, as ``named_modules`` has them; ``*`` stands for
            any characters. Of modules inside of one another the outermost counts.

    Raises:
        ValueError: a pattern that fits none, or only a list of modules, which computes nothing by itself.
    """
    candidates = {
        name: module for name, module in model.named_modules() if name.partition(".")[0] in PARTS and name != ""
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
                f"SOLVER.RECOMPUTE has {pattern!r}, and no module of the model that computes something is named so. "
                f"There are {', '.join(below)}, and what is below them"
            )
        chosen.update(names)
    for name in chosen:
        parents = {name[:index] for index, letter in enumerate(name) if letter == "."}
        if not parents & chosen:
            module = candidates[name]
            # A partial, which a copy of the model copies with its own module in it.
            module.forward = functools.partial(_forward_again, type(module).forward, module)


def _forward_again(forward: Callable, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if not (module.training and torch.is_grad_enabled()):
        return forward(module, *args, **kwargs)
    # A compiled program keeps what happens to running statistics to its forward pass.
    contexts = {} if torch.compiler.is_compiling() else {"context_fn": functools.partial(_contexts, module)}
    return checkpoint(forward, module, *args, use_reentrant=False, **contexts, **kwargs)


def _contexts(module: nn.Module) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """What the first forward pass and the second one run in."""
    return contextlib.nullcontext(), _statistics_kept(module)


@contextlib.contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Norms use the batch's statistics as before, and their running ones stay as they are."""
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

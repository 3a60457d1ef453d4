"""Finds where in a training step the first number that is not finite comes from, by repeating the step under hooks."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

INPUT = "the input of"
OUTPUT = "the output of"
INSIDE = "a value inside"
GRADIENT_OF_INPUT = "the gradient of the input of"
GRADIENT_OF_OUTPUT = "the gradient of the output of"
GRADIENT_OF_PARAMETER = "the gradient of the parameter"


class Finding(NamedTuple):
    """The first thing of a step that was not finite, in the order of execution.

    Attributes:
        batch: which of the step's batches, from 0.
        what: OUTPUT; INSIDE, between the modules that a module consists of; INPUT, of the whole model; or one of the
            GRADIENTs.
        name: of the module or parameter; "" is the whole model.
        kind: type of the module, or shape of the parameter.
        parameters: the module's own parameters that are not finite.
    """

    batch: int
    what: str
    name: str
    kind: str
    parameters: list[str]

    def __str__(self) -> str:
        text = f"{self.what} {self.name or 'the whole model'} ({self.kind})"
        if self.what in (OUTPUT, INSIDE):
            text += ", whose input was finite"
        if self.parameters:
            text += f", but not its {' and '.join(self.parameters)}"
        return text


def step_losses(
    model: nn.Module, batch: list[dict], normalizer: Sequence, device: torch.device, amp_dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """The model's losses of one batch.

    Args:
        normalizer: one LossNormalizer, or nothing.
        amp_dtype: what to compute in where that suffices; None: float32.
    """
    with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
        return model(batch, *normalizer)


def find_first_non_finite(
    model: nn.Module,
    batches: list[list[dict]],
    normalizer: Sequence = (),
    *,
    device: torch.device,
    amp_dtype: torch.dtype | None = None,
    loss_scale: float = 1.0,
    with_gradients: bool = False,
) -> tuple[Finding | None, dict[str, float]]:
    """Repeat a step, from the random state that is set, and watch every module.

    All batches are computed, whatever is found: other processes may take part in them. The parameters' ``grad`` is left
    alone; running statistics move.

    Args:
        model: in training mode, without DistributedDataParallel.
        batches: as the model takes them.
        normalizer, amp_dtype: see :func:`step_losses`.
        loss_scale: what the losses are multiplied by before their gradients are computed.
        with_gradients: look at gradients too; they matter where all outputs are finite.

    Returns:
        What was found, None where everything was finite; and the losses, summed over the batches.
    """
    watch = _Watch(model, with_gradients)
    losses: dict[str, float] = {}
    try:
        for watch.batch, batch in enumerate(batches):
            # A forward pass that is repeated for its activations may end in the middle of a module.
            watch.entered.clear()
            with torch.set_grad_enabled(with_gradients):
                batch_losses = step_losses(model, batch, normalizer, device, amp_dtype)
            if with_gradients:
                parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
                torch.autograd.grad(sum(batch_losses.values()) * loss_scale, parameters, allow_unused=True)
            for name, loss in batch_losses.items():
                losses[name] = losses.get(name, 0.0) + loss.item()
    finally:
        watch.remove()
    return watch.output or watch.gradient, losses


class _Watch:
    def __init__(self, model: nn.Module, with_gradients: bool) -> None:
        self.batch = 0
        self.output: Finding | None = None
        self.gradient: Finding | None = None
        self.with_gradients = with_gradients
        self.handles = []
        # Names of the modules that are being computed, outermost first.
        self.entered: list[str] = []
        self.modules = dict(model.named_modules())
        # Compiled programs pass hooks over.
        self.model, self.training_network = model, getattr(model, "training_network", None)
        if self.training_network is not None:
            model.training_network = None
        for name, module in self.modules.items():
            self.handles += [
                module.register_forward_pre_hook(functools.partial(self._before, name), with_kwargs=True),
                module.register_forward_hook(functools.partial(self._after, name), with_kwargs=True),
            ]
        if with_gradients:
            for name, parameter in model.named_parameters():
                self._watch_gradient(parameter, GRADIENT_OF_PARAMETER, name, str(tuple(parameter.shape)))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        if self.training_network is not None:
            self.model.training_network = self.training_network

    def _before(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        # What was not finite before any module's output was, comes from an operation of the enclosing module's own.
        self._look((args, kwargs), *((INSIDE, self.entered[-1]) if self.entered else (INPUT, name)))
        self.entered.append(name)
        if self.with_gradients:
            for tensor in tensors_in((args, kwargs)):
                self._watch_gradient(tensor, GRADIENT_OF_INPUT, name, type(module).__name__)

    def _after(self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        self.entered.pop()
        self._look(output, OUTPUT, name)
        if self.with_gradients:
            for tensor in tensors_in(output):
                self._watch_gradient(tensor, GRADIENT_OF_OUTPUT, name, type(module).__name__)

    def _look(self, values: Any, what: str, name: str) -> None:
        if self.output is None and not all_finite(values):
            module = self.modules[name]
            parameters = [key for key, value in module.named_parameters(recurse=False) if not all_finite(value)]
            self.output = Finding(self.batch, what, name, type(module).__name__, parameters)

    def _watch_gradient(self, tensor: torch.Tensor, what: str, name: str, kind: str) -> None:
        def look(gradient: torch.Tensor) -> None:
            if self.gradient is None and not all_finite(gradient):
                self.gradient = Finding(self.batch, what, name, kind, [])

        if tensor.requires_grad:
            self.handles.append(tensor.register_hook(look))


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested dicts, lists and tuples; what else there is, is passed over."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def all_finite(value: Any) -> bool:
    """Whether every number in nested tensors is finite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors_in(value))

"""Find losses and gradients that are NaN or Inf before they reach the weights, on all processes together."""

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import nn

from sparseinst.checkpoint import OutputError
from sparseinst.config import check_keys

logger = logging.getLogger(__name__)

Losses = dict[str, torch.Tensor]
# Computes the losses of one part of a step again, from its index.
Repeat = Callable[[int], Losses]

CHECKPOINT = "model_nonfinite"
MAX_NAMES = 4
# At this loss scale the gradient scaler does not enlarge gradients, so it does not cause an overflow.
UNSCALED = 1.0


class NonFiniteStepError(FloatingPointError):
    """Raised where a loss or gradient is NaN or Inf and the training stops before the step."""


class Verdict(NamedTuple):
    """Decision of all processes about a step.

    Attributes:
        take_step: update the weights; False: skip the step and drop its gradients.
        also: for each of the caller's own flags, whether any process set it.
        losses: this process's losses, on the host.
        gradient_norm: the Euclidean norm of all gradients together, before a gradient scaler unscales them; a scalar
            on their device. The norm overflows before the gradients do.
    """

    take_step: bool
    also: list[bool]
    losses: Losses
    gradient_norm: torch.Tensor


class FiniteGuard:
    """Check the losses and gradients of each step, and stop or skip where one is NaN or Inf.

    A bad step is repeated under hooks, which find the first module with a bad output or gradient. A stop saves
    model_nonfinite.pth, the training before the step, as the last checkpoint: ``--resume`` repeats the step. Gradients
    that only a gradient scaler made overflow are left to the scaler, which skips the step and lowers its scale.

    Args:
        cfg: SOLVER.NONFINITE is read.
        model: without DistributedDataParallel.
        grad_scaler: enabled or not.
        checkpointer: saves the model and the training.

    Raises:
        ValueError: an invalid value of SOLVER.NONFINITE.
    """

    def __init__(
        self, cfg: CfgNode, model: nn.Module, grad_scaler: torch.amp.GradScaler, checkpointer: DetectionCheckpointer
    ) -> None:
        check_keys(cfg, "SOLVER.NONFINITE.ACTION", "SOLVER.NONFINITE.MAX_SKIPS")
        nonfinite = cfg.SOLVER.NONFINITE
        self.max_skips = nonfinite.MAX_SKIPS if nonfinite.ACTION == "skip" else 0
        self.max_scaler_skips = nonfinite.MAX_SKIPS
        self.model = model
        self.grad_scaler = grad_scaler
        self.checkpointer = checkpointer
        # Cached, because a search through all modules is slow.
        self._parameters = list(model.parameters())
        self._norms = [module for module in model.modules() if getattr(module, "track_running_stats", False)]
        self.start_step()
        # Skipped steps, in all and in a row; of the scaler's skips in a row only those at a scale of at most 1.
        self.counts = {"skipped": 0, "in_row": 0, "scaler_skipped": 0, "scaler_in_row": 0}

    def start_step(self) -> None:
        """Copy the running statistics; call it before the first forward pass of a step."""
        # Read anew at each step, because PreciseBN replaces the buffers.
        buffers = [buffer for norm in self._norms for buffer in norm.buffers(recurse=False)]
        self._statistics = [(buffer, buffer.clone()) for buffer in buffers]

    def check(
        self, losses: Losses, batches: Sequence[list[dict]], repeat: Repeat, iteration: int, also: Sequence[bool] = ()
    ) -> Verdict:
        """Decide about a step; all processes call it after the last backward pass, before gradients are unscaled.

        Args:
            losses: scalars of the step, not scaled, without a graph.
            batches: the parts of the step, for the image files in the messages.
            repeat: compute the losses of one part again, from its index, with the random numbers of the step and
                without DistributedDataParallel; called for all parts in order.
            iteration: for the messages and the checkpoint.
            also: the caller's own flags, which go into the same exchange.

        Raises:
            NonFiniteStepError: on all processes, with the same message.
        """
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        values = torch.stack([*losses.values(), norm])
        is_bad = ~torch.isfinite(values)
        # full_like, because a copy to a GPU synchronizes.
        votes = [is_bad[:-1].any(), is_bad[-1], *(torch.full_like(is_bad[0], flag) for flag in also)]
        # Synchronizes the device once per step.
        sizes = [len(values), len(votes)]
        host_values, votes = torch.cat([values, any_rank(torch.stack(votes).to(values.dtype))]).cpu().split(sizes)
        any_loss, any_gradient, *also = votes.bool().tolist()
        if any_gradient:
            # The squares of finite gradients can overflow. The maximum norm cannot, but takes longer.
            largest = nn.utils.get_total_norm(gradients, norm_type=math.inf)
            any_gradient = bool(any_rank((~torch.isfinite(largest)).to(values.dtype)))
        is_finite = not any_loss and not any_gradient
        if is_finite:
            self.counts.update(in_row=0, scaler_in_row=0)
        take_step = is_finite or (not any_loss and self._is_left_to_scaler(iteration))
        if not take_step:
            self._stop_or_skip(losses, batches, repeat, iteration, "loss" if any_loss else "gradient")
        return Verdict(take_step, also, dict(zip(losses, host_values)), norm)

    def state_dict(self) -> dict:
        """Return the counts."""
        return dict(self.counts)

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore the counts of :meth:`state_dict`."""
        self.counts.update(state_dict)

    def _is_left_to_scaler(self, iteration: int) -> bool:
        """Count a step that the gradient scaler will skip; return False where it has skipped too many."""
        if not self.grad_scaler.is_enabled():
            return False
        scale = self.grad_scaler.get_scale()
        if scale <= UNSCALED and self.counts["scaler_in_row"] >= self.max_scaler_skips:
            return False
        self.counts["scaler_skipped"] += 1
        self.counts["scaler_in_row"] += scale <= UNSCALED
        get_event_storage().put_scalar("nonfinite/scaler_skips", self.counts["scaler_skipped"], smoothing_hint=False)
        logger.info(f"Iteration {iteration}: a gradient overflows at the loss scale {scale:g}; the scaler lowers it")
        return True

    def _stop_or_skip(
        self, losses: Losses, batches: Sequence[list[dict]], repeat: Repeat, iteration: int, what: str
    ) -> None:
        stops = what == "gradient" and self.grad_scaler.is_enabled() or self.counts["in_row"] >= self.max_skips
        report = self._report(losses, batches, repeat, what)
        for buffer, value in self._statistics:
            buffer.copy_(value)
        saved = ""
        if stops and comm.is_main_process():
            saved = f"--resume repeats the step from {CHECKPOINT}.pth, the training before it"
            try:
                self.checkpointer.save(CHECKPOINT, iteration=iteration - 1)
            except OutputError as error:
                saved = f"The training before the step cannot be saved: {error}"
        # Synchronizes: an error on one process must not end another one that still writes.
        reports, saved = (list(filter(None, texts)) for texts in zip(*comm.all_gather((report, saved))))
        text = "\n".join([f"A {what} is NaN or Inf at iteration {iteration}.", *(reports or ["On no process alone."])])
        if stops:
            in_row = max(self.counts["in_row"], self.counts["scaler_in_row"])
            raise NonFiniteStepError(
                f"{text}\n{in_row} steps in a row were skipped before it (SOLVER.NONFINITE.MAX_SKIPS). Lower "
                "SOLVER.BASE_LR, enable SOLVER.CLIP_GRADIENTS, or train without SOLVER.AMP; SOLVER.NONFINITE.ACTION "
                f"skip goes on without such steps. {saved[0]}"
            )
        self.counts["skipped"] += 1
        self.counts["in_row"] += 1
        get_event_storage().put_scalar("nonfinite/skipped_steps", self.counts["skipped"], smoothing_hint=False)
        counts = f"{self.counts['skipped']} in all, {self.counts['in_row']} in a row"
        logger.warning(f"{text}\nThe step is skipped: {counts}")

    def _report(self, losses: Losses, batches: Sequence[list[dict]], repeat: Repeat, what: str) -> str:
        """Describe the step on this process; return "" where it is finite. All processes call it together."""
        loss_scale = self.grad_scaler.get_scale() if what == "gradient" else 1.0
        first = find_first_nonfinite(self.model, len(batches), repeat, loss_scale)
        bad_losses = [f"{name} {loss.item()}" for name, loss in losses.items() if not all_finite(loss)]
        # DistributedDataParallel averages the gradients, so only the repetition finds the process.
        if not bad_losses and not first and (what == "loss" or comm.get_world_size() > 1):
            return ""
        lines = [f"Process {comm.get_rank()} of {comm.get_world_size()}: " + (", ".join(bad_losses) or "finite losses")]
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        for text, tensors in (
            ("parameters whose gradient is NaN or Inf", gradients if what == "gradient" else {}),
            ("parameters that are NaN or Inf", dict(self.model.named_parameters())),
        ):
            if names := [name for name, tensor in tensors.items() if not all_finite(tensor)]:
                rest = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
                lines.append(f"  {text}: {', '.join(names[:MAX_NAMES])}{rest}")
        lines.append(f"  NaN or Inf first in: {first or 'nothing, when the step was repeated'}")
        files = [str(x.get("file_name", "an image without file_name")) for batch in batches for x in batch]
        return "\n".join([*lines, f"  images: {', '.join(files)}"])


def any_rank(votes: torch.Tensor) -> torch.Tensor:
    """Return for each vote, 0 or 1, whether it is 1 on any process, by one small all_reduce in place."""
    if comm.get_world_size() > 1:
        torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MAX)
    return votes


def find_first_nonfinite(model: nn.Module, num_parts: int, repeat: Repeat, loss_scale: float = 1.0) -> str:
    """Repeat a step and name the first module whose output, or else whose gradient, is NaN or Inf.

    Computes all parts, because other processes may take part in them. Compiled networks run without their compiler,
    which ignores hooks. The parameters' ``grad`` does not change; running statistics do.

    Args:
        model: whose modules ``repeat`` runs.
        num_parts: parts of the step.
        repeat: compute the losses of one part, from its index, with a graph.
        loss_scale: factor of the losses before the backward pass.

    Returns:
        A text such as "the output of encoder.fusion (Conv2d), whose input was finite"; "" where everything is finite.
    """
    found: dict[str, str] = {}
    place = ""

    def look(kind: str, text: str, values: Any) -> None:
        if kind not in found and not all_finite(values):
            found[kind] = text + place

    def watch(values: Any, text: str, rest: str = "") -> None:
        look("value", text + rest, values)
        for tensor in tensors_in(values):
            if tensor.requires_grad:
                tensor.register_hook(functools.partial(look, "gradient", f"the gradient of {text}"))

    handles = []
    for name, module in model.named_modules():
        text = f"{name or 'the whole model'} ({type(module).__name__})"
        handles += [
            module.register_forward_pre_hook(
                lambda _, args, kwargs, text=text: watch((args, kwargs), f"the input of {text}"), with_kwargs=True
            ),
            # The pre-hook reports a bad input first.
            module.register_forward_hook(
                lambda _, args, output, text=text: watch(output, f"the output of {text}", ", whose input was finite")
            ),
        ]
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        with torch.compiler.set_stance("force_eager"):
            for index in range(num_parts):
                if num_parts > 1:
                    place = f", in part {index + 1} of {num_parts} of the step (SOLVER.ACCUMULATE_STEPS)"
                total = sum(repeat(index).values()) * loss_scale
                gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
                for name, gradient in reversed(list(zip(parameters, gradients))):
                    look("gradient", f"the gradient of the parameter {name}", gradient)
    finally:
        for handle in handles:
            handle.remove()
    return found.get("value") or found.get("gradient", "")


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Return the tensors in nested dicts, lists and tuples; ignore other values."""
    if isinstance(value, dict | list | tuple):
        items = value.values() if isinstance(value, dict) else value
        return [tensor for item in items for tensor in tensors_in(item)]
    return [value] if isinstance(value, torch.Tensor) else []


def all_finite(value: Any) -> bool:
    """Return whether no tensor in nested values has NaN or Inf."""
    # Detached: recomputed activations must save the same tensors with and without this call.
    return all(bool(torch.isfinite(tensor.detach()).all()) for tensor in tensors_in(value))
